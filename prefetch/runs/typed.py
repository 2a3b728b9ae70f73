"""What a user typed: put in order, refused where nobody can mean it, and mistakes explained in one line.

It knows no stage and runs nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from prefetch import config
from prefetch.config import Config
from prefetch.errors import ConfigError, PrefetchError, one_line
from prefetch.written import FULL

SWEEP = ("-m", "--multirun")
READS_TRACE_AND_SOURCE = ("traces",)  # stages: one as it is, the other beside it


def in_order(words: Sequence[str]) -> list[str]:
    """`-m` first: between overrides Hydra's parser does not know it."""
    return [*[word for word in words if word in SWEEP][:1], *(w for w in words if w not in SWEEP)]


def at_home(words: Sequence[str]) -> list[str]:
    """A ~ that begins a value is the home, as after the = of the shell: bash leaves it in `source.path=~/x`."""
    home = str(Path("~").expanduser())
    return [re.sub(r"^([^=]+=[\"']*)~(?=/)", lambda found: found[1] + home, word) for word in words]


def refuse_dead_words(cfg: Config, words: Sequence[str]) -> None:
    """Beside `trace=` the source is not asked: an axis of its settings would be an axis of nothing."""
    dead = [word for word in words if re.match(r"source[.=]", word)]
    is_read = cfg.train.test_trace is not None or cfg.stage.name in READS_TRACE_AND_SOURCE
    if cfg.trace is not None and dead and not is_read:
        raise ConfigError(
            f"{dead[0]}: trace={cfg.trace} is used as it is, so that this changes nothing; leave out one of the two"
        )


def refuse(words: Sequence[str]) -> None:
    """What Hydra would take and nobody means: keys that no stage reads, and lists of choices merged into one."""
    groups = [word.partition("=")[0] for word in words if word.partition("=")[0] in _groups()]
    if twice := [group for group in groups if groups.count(group) > 1]:
        raise ConfigError(
            f"{twice[0]}=: given twice, and only one of them can hold; to run each, use -m {twice[0]}=ONE,OTHER"
        )
    for word in words:
        if word.startswith("+") and not word.lstrip("+").startswith("hydra"):
            raise ConfigError(
                f"{word}: nothing reads an added key; leave out the + to set one that exists"
            )
        group, _, value = word.partition("=")
        if value == "null" and group in _groups():
            raise ConfigError(f"{word}: names no choice; leave it out, or take one of {group}'s")
        if value.startswith("[") and group in _groups():
            names = value.strip("[]").replace(" ", "")
            raise ConfigError(
                f"{word}: a group takes one name; to run each, use -m {group}={names}"
            )


def explain(error: BaseException) -> str:
    """One line that says what was wrong and lists what exists; whatever was typed, it stays one."""
    return one_line(_explained(error))


def _explained(error: BaseException) -> str:
    if isinstance(error, PrefetchError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        advice = (
            "; free the disk, or pass hydra.run.dir=DIR store=DIR" if error.errno in FULL else ""
        )
        return f"{error.filename or 'input or output'}: {error.strerror or error}{advice}"
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}; {error.__cause__}"
    line = text.split("Config search path")[0]
    for noise in (
        r"To append to your (config|default list) use \S+",
        r"(object|reference)_type=\S+",
        r"See https\S+ for \w+",
    ):
        line = re.sub(noise, "", line)
    if several := re.match(r"Ambiguous value for argument '(.*?)'\s*1\.", line):
        line = f"{several[1]}: several values; to run each, add -m; a list is written key=[a,b], text key='\"a,b\"'"
    if isinstance(error, OverrideParseException):
        line = _written_wrong(str(error.override), line)
    if re.search(r"hydra/launcher/(joblib|submitit_\w+)'", line):
        line += "; these launchers come with pip install 'expert-prefetch[sweep]'"
    if "not a ListConfig" in line:
        line += "; a list is written key=[a,b]"
    return " ".join(f"{line}{_siblings(text)}".split())


def _written_wrong(word: str, line: str) -> str:
    """A word that Hydra's grammar does not know, and what was probably meant by it."""
    key, equals, value = word.partition("=")
    if not equals:
        meant = next((group for group in sorted(_groups()) if word in config.choices(group)), None)
        hint = f"; did you mean {meant}={word}?" if meant else ""
        return f"{word}: expected key=value{hint}"
    if "~" in value:
        return (
            f"{word}: a ~ is not understood here; write the path in full, such as {key}=$HOME/..."
        )
    return (
        f"{word}: {line}; letters beyond ASCII and brackets need quotes of their own: 'key=\"...\"'"
    )


def _siblings(text: str) -> str:
    """What stands beside the key that was not found, from the configuration without it."""
    found = re.search(r"full_key: (\S+)", text)
    if not found or "Key '" not in text:
        return ""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = [word for word in sys.argv[1:] if re.fullmatch(r"\w+=\w+", word)]
    groups = [word for word in chosen if word.split("=")[0] in _groups() - {"experiment"}]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node: Any = compose("config", overrides=groups)
    parent = found.group(1).rpartition(".")[0]
    for part in parent.split(".") if parent else []:
        node = node.get(part) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig):
        return ""
    names = sorted(str(name) for name in node if name != "_target_")
    return f"; {parent or 'the root'} has: {', '.join(names) or 'nothing to set'}"


def _groups() -> set[str]:
    return {path.name for path in config.CONFIGS.iterdir() if path.is_dir()}
