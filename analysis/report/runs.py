"""What a run is to a report: settings, numbers, tables, texts, and what of it could not be read.

It reads no run, knows no stage by name, compares nothing and knows no page.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

FINISHED, FAILED, INTERRUPTED, UNFINISHED = "finished", "failed", "interrupted", "unfinished"
FOLDER, TRACKED = "folder", "W&B offline"  # where a run was read
STATES = (FINISHED, FAILED, INTERRUPTED, UNFINISHED)
SIGNS = ("metrics.json", "lineage.json", "error.txt", "run.json")  # any makes a folder a run
HYDRA = ".hydra"
STAMP = re.compile(r"(\d{8}-\d{6})(?:-\d+)?")


@dataclass(frozen=True, eq=False)
class Run:
    """One run; `read_table` opens a table when somebody asks for it."""

    folder: Path
    stage: str
    state: str  # one of STATES
    message: str = ""  # why it did not finish
    began: str = ""  # ISO, UTC where the run says so
    seconds: float | None = None
    version: str = ""
    source: str = FOLDER
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> plain value
    choices: Mapping[str, str] = field(default_factory=dict)  # group -> the name that was chosen
    overrides: Sequence[str] | None = None  # None = not known
    typed_in: str = ""  # the folder that relative paths stand for
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Callable[[], pd.DataFrame]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)  # name.md -> Markdown
    log: str = ""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what of it could not be read, and why

    @property
    def name(self) -> str:
        """Its folder as a person knows it: a run's time, or a sweep's time and the job's number."""
        last, above = self.folder.name, self.folder.parent.name
        if self.source != FOLDER:
            return last
        return last if STAMP.fullmatch(last) else f"{above}/{last}"

    @functools.cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """Tables that were opened, by name."""
        return {}

    def table(self, name: str) -> pd.DataFrame | None:
        """The table of this name; None = there is none, or it cannot be read."""
        if name in self.tables and name not in self.frames:
            try:
                self.frames[name] = self.tables[name]()
            except Exception as error:  # a damaged file meets its parser
                self.frames[name] = pd.DataFrame()
                self.failures[name] = reason(error)
        frame = self.frames.get(name)
        return None if frame is None or frame.empty else frame

    @functools.cached_property
    def failures(self) -> dict[str, str]:
        """Tables that could not be read, and why; known once somebody asked for them."""
        return {}


@dataclass(frozen=True)
class Unreadable:
    """A place where a run was expected, and what stood in the way."""

    place: Path
    why: str


def is_run(folder: Path) -> bool:
    has_config = (folder / HYDRA / "config.yaml").is_file()
    return has_config or any((folder / sign).is_file() for sign in SIGNS)


def flat(config: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; a list is its JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif isinstance(value, (list, tuple, Mapping)):
            found[name] = json.dumps(value, default=str)
        else:
            found[name] = value if isinstance(value, (int, float, str)) else _spoken(value)
    return found


def chosen_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Group -> choice where Hydra's own record is lost: from the modules of the classes."""
    found = {}
    for group, leaf in config.items():
        target = str(leaf.get("_target_", "")) if isinstance(leaf, Mapping) else ""
        if target.count(".") and group not in ("stage", "tracker"):
            found[group] = str(leaf.get("name") or target.split(".")[-2])
    return found


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _spoken(value: Any) -> str | None:
    return None if value is None else str(value)
