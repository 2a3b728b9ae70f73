"""What one run left in its folder, read with patience: what is broken or unknown is a note, and the rest is shown.

It knows no stage by name, compares nothing and knows no page. Runs of other versions have other files, columns and
settings; nothing here depends on one of them being there.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prefetch.redaction import Redactor

FINISHED, FAILED, INTERRUPTED, UNFINISHED = "finished", "failed", "interrupted", "unfinished"
FOLDER, TRACKED = "folder", "W&B offline"  # where a run was read
STATES = (FINISHED, FAILED, INTERRUPTED, UNFINISHED)
SIGNS = (
    "metrics.json",
    "lineage.json",
    "error.txt",
    "run.json",
)  # any of them makes a folder a run
HYDRA = ".hydra"
STAMP = re.compile(r"(\d{8}-\d{6})(?:-\d+)?")
LONGEST_TEXT = 200_000  # characters of a log or page that are read
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


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


def read_run(folder: Path) -> Run | Unreadable:
    """Everything that can be read; unreadable only where neither settings nor numbers nor an error can."""
    notes: list[str] = []
    about = _object(_parsed(folder / "run.json", json.loads, notes))
    hydra = _hydra_folder(folder)
    config = _object(_parsed(hydra / "config.yaml", _yaml, notes))
    hidden = Redactor(config)  # runs of older versions kept what they were told
    config = _object(hidden.value(config))
    metrics = _numbers(_parsed(folder / "metrics.json", json.loads, notes), notes)
    lineage = _object(_parsed(folder / "lineage.json", json.loads, notes))
    error = hidden.text(_text(folder / "error.txt"))
    if not (about or config or metrics or lineage or error):
        return Unreadable(folder, "; ".join(notes) or "it holds no settings, metrics or error")
    told = _object(_parsed(hydra / "hydra.yaml", _yaml, notes)) if config else {}
    runtime = _object(_object(told.get("hydra", told)).get("runtime"))
    settings = flat(config)
    stage = str(about.get("stage") or (folder.name if hydra.parent != folder else ""))
    stage = stage or str(settings.get("stage.name") or "unknown")
    state, message = _state(folder, hidden.value(about), error)
    words = _overrides(_parsed(hydra / "overrides.yaml", _yaml, notes), stage)
    return Run(
        folder=folder,
        stage=stage,
        state=state,
        message=message,
        began=str(about.get("began") or _began(folder)),
        seconds=_seconds(about.get("seconds"), state),
        version=" ".join(str(about[key]) for key in ("version", "commit") if about.get(key)),
        settings=settings | {"stage.name": stage},
        choices=_choices(runtime, config),
        overrides=None if words is None else hidden.words(words),
        typed_in=str(about.get("seen_from") or runtime.get("cwd") or ""),
        metrics=metrics,
        tables=_tables(folder, hidden),
        pictures=_pictures(folder),
        pages={path.name: hidden.text(_text(path)) for path in sorted(folder.glob("*.md"))},
        log=hidden.text(_log(folder, hydra)),
        lineage=lineage,
        notes=tuple(notes),
    )


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


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=Loader)


def _parsed(path: Path, parse: Callable[[str], Any], notes: list[str]) -> Any:
    """What a file says; None = there is none, or a note says why it cannot be read."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text())
    except Exception as error:  # half a file, other bytes, no permission
        notes.append(f"{path.name} cannot be read ({reason(error)})")
        return None


def _object(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _numbers(value: Any, notes: list[str]) -> dict[str, float]:
    found, odd = {}, []
    for name, item in _object(value).items():
        is_number = isinstance(item, (int, float)) and math.isfinite(item)
        if is_number:
            found[name] = item
        else:
            odd.append(name)
    if odd:
        notes.append(f"metrics.json: left out, no numbers: {', '.join(odd)[:200]}")
    return found


def _text(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(LONGEST_TEXT).strip()
    except OSError:
        return ""


def _hydra_folder(folder: Path) -> Path:
    """A stage that `stage=all` ran lies below the run that Hydra knows."""
    own = folder / HYDRA
    above = folder.parent / HYDRA
    return above if not own.is_dir() and above.is_dir() else own


def _state(folder: Path, about: Mapping[str, Any], error: str) -> tuple[str, str]:
    said = str(about.get("error") or error)
    if about.get("state") in (FINISHED, FAILED, INTERRUPTED):
        return str(about["state"]), said
    if error:
        return (INTERRUPTED if error.startswith("interrupted") else FAILED), error
    has_end = any((folder / name).is_file() for name in ("metrics.json", "lineage.json"))
    if has_end and not about:
        return FINISHED, ""  # written before runs said how they stand
    return UNFINISHED, "no end was written: it was killed, or runs still"


def _began(folder: Path) -> str:
    """From the folder's name, whoever's clock that was; then from its oldest file."""
    for name in (folder.name, folder.parent.name):
        if found := STAMP.fullmatch(name):
            try:
                began = datetime.strptime(found.group(1), "%Y%m%d-%H%M%S")
                return began.isoformat()
            except ValueError:
                continue
    times = [path.stat().st_mtime for path in folder.iterdir() if path.is_file()]
    return datetime.fromtimestamp(min(times), UTC).isoformat(timespec="seconds") if times else ""


def _seconds(value: Any, state: str) -> float | None:
    is_known = isinstance(value, (int, float)) and state != UNFINISHED
    return float(value) if is_known else None


def _choices(runtime: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    told = _object(runtime.get("choices"))
    if not told:
        return chosen_names(config)
    return {name: str(v) for name, v in told.items() if v is not None and "/" not in name}


def _overrides(value: Any, stage: str) -> list[str] | None:
    """What was typed; of `stage=all` the one stage is named that this folder is of."""
    if not isinstance(value, list):
        return None
    words = [str(word) for word in value]
    return [f"stage={stage}" if word == "stage=all" else word for word in words]


def _tables(folder: Path, hidden: Redactor) -> dict[str, Callable[[], pd.DataFrame]]:
    """Those that have a CSV: the others are for programs, too long to look at. Parquet is read where there is one."""
    paths = sorted(folder.glob("*.csv"))
    return {path.stem: functools.partial(_frame, path, hidden) for path in paths}


def _frame(path: Path, hidden: Redactor) -> pd.DataFrame:
    typed = path.with_suffix(".parquet")
    return hidden.frame(pd.read_parquet(typed) if typed.is_file() else pd.read_csv(path))


def _pictures(folder: Path) -> dict[str, Path]:
    """Drawings where there are any: they are small and sharp."""
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    return found | {path.stem: path for path in sorted(folder.glob("*.svg"))}


def _log(folder: Path, hydra: Path) -> str:
    logs = sorted(folder.glob("*.log")) or sorted(hydra.parent.glob("*.log"))
    return "\n".join(text for text in map(_text, logs) if text)
