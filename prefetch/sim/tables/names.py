"""What a table calls the choices of a run. It knows no table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from prefetch import config
from prefetch.config import Config


def name_of(cfg: Config, group: str) -> str:
    """What was typed after `group=`."""
    leaf = OmegaConf.to_container(cast(DictConfig, getattr(cfg, group)), resolve=True)
    target = str(cast(dict[str, Any], leaf)["_target_"])
    return _names(config.CONFIGS / group).get(target, target)


@cache
def _names(folder: Path) -> dict[str, str]:
    """Of every class that a choice of this group names, the first such choice."""
    names = dict[str, str]()
    for path in sorted(folder.glob("*.yaml")):
        names.setdefault(str(OmegaConf.select(OmegaConf.load(path), "_target_")), path.stem)
    return names
