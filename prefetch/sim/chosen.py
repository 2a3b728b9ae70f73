"""Which machine a run is about: the one that its YAML describes, or the one that this store measured last.

It measures nothing: who does is named in the configuration, as everything that the middle floor needs of the top.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from prefetch import leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.sim.hardware import HARDWARE_FILE, KIND, Hardware

log = logging.getLogger(__name__)


def hardware_of(cfg: Config, store: Store) -> Hardware:
    """`hardware=measured` without a path takes the sealed measurement, says which, and enters it into the lineage."""
    leaf = cast(DictConfig, cfg.hardware)
    if OmegaConf.select(leaf, "path", default="") is not None:
        return cast(Hardware, leaves.instantiate(leaf, "hardware"))
    made = store.make(leaves.locate(cfg.makers[KIND])(cfg))
    when = made.manifest["made"]
    found: Any = leaves.instantiate(
        cast(DictConfig, OmegaConf.merge(leaf, {"path": str(made.folder / HARDWARE_FILE)})),
        "hardware",
    )
    log.info("hardware=measured: %s, measured %s (%s/%s)", found.name, when, KIND, made.key)
    return cast(Hardware, found)
