"""What one run left in its folder, read with patience: what is broken or unknown is a note, and the rest is shown.

It knows no stage by name. Runs of other versions have other files, columns and settings; nothing here depends on one
of them being there.
"""

from __future__ import annotations

import functools
import glob
import json
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.report.runs import (
    FAILED,
    FINISHED,
    HYDRA,
    INTERRUPTED,
    STAMP,
    UNFINISHED,
    Run,
    Unreadable,
    chosen_names,
    flat,
    reason,
)
from prefetch import plain_yaml
from prefetch.runs.redaction import Redactor
from prefetch.trace.packed import check_table

MOST_TABLE = 64 << 20  # bytes of its values
LONGEST_TEXT = 200_000  # bytes of a log or page that are read


def read_run(folder: Path) -> Run | Unreadable:
    """Everything that can be read; unreadable only where neither settings nor numbers nor an error can."""
    try:
        return _read(folder)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        return Unreadable(folder, f"what it says is not what runs say ({reason(error)})")


def _read(folder: Path) -> Run | Unreadable:
    notes: list[str] = []
    about = _object(_parsed(folder / "run.json", _json, notes))
    hydra = _hydra_folder(folder)
    config, hidden = _config(hydra, notes)
    metrics = _numbers(_parsed(folder / "metrics.json", _json, notes), notes)
    lineage = _object(_parsed(folder / "lineage.json", _json, notes))
    error = hidden.text(_text(folder / "error.txt"))
    if not (about or config or metrics or lineage or error):
        return Unreadable(folder, "; ".join(notes) or "it holds no settings, metrics or error")
    settings, below = flat(config), folder.name if hydra.parent != folder else ""
    stage = str(about.get("stage") or below or settings.get("stage.name") or "unknown")
    state, message = _state(folder, hidden.value(about), error)
    return Run(
        folder=folder,
        stage=stage,
        state=state,
        message=message,
        began=str(about.get("began") or _began(folder)),
        seconds=_seconds(about.get("seconds"), state),
        version=_version(about),
        settings=settings | {"stage.name": stage},
        metrics=metrics,
        lineage=lineage,
        **_typed(hydra, config, hidden, notes, stage, about),
        **_files(folder, hydra, hidden),
        notes=tuple(notes),
    )


def _version(about: Mapping[str, Any]) -> str:
    return " ".join(str(about[key]) for key in ("version", "commit") if about.get(key))


def _config(hydra: Path, notes: list[str]) -> tuple[dict[str, Any], Redactor]:
    """Settings without secrets: runs of older versions kept what they were told."""
    config = _object(_parsed(hydra / "config.yaml", plain_yaml.load, notes))
    try:
        hidden = Redactor(config)
        return _object(hidden.value(config)), hidden
    except RecursionError:
        notes.append("config.yaml cannot be read (it holds itself, or nothing but depth)")
        return {}, Redactor({})


def _typed(
    hydra: Path,
    config: dict[str, Any],
    hidden: Redactor,
    notes: list[str],
    stage: str,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What was chosen and typed, and where."""
    told = _object(_parsed(hydra / "hydra.yaml", plain_yaml.load, notes)) if config else {}
    runtime = _object(_object(told.get("hydra", told)).get("runtime"))
    words = _overrides(_parsed(hydra / "overrides.yaml", plain_yaml.load, notes), stage)
    return {
        "choices": _choices(runtime, config),
        "overrides": None if words is None else hidden.words(words),
        "typed_in": str(about.get("seen_from") or runtime.get("cwd") or ""),
    }


def _files(folder: Path, hydra: Path, hidden: Redactor) -> dict[str, Any]:
    """What it wrote for people."""
    return {
        "tables": _tables(folder, hidden),
        "pictures": _pictures(folder),
        "pages": {path.name: hidden.text(_text(path)) for path in _own(folder, "*.md")},
        "log": hidden.text(_log(folder, hydra)),
    }


def _own(folder: Path, pattern: str) -> list[Path]:
    """Links that lead out of somebody's folder are not followed: a page would show what it was not given."""
    root = folder.resolve()
    return [path for path in sorted(folder.glob(pattern)) if path.resolve().is_relative_to(root)]


def _json(text: str) -> Any:
    """Half a pair of UTF-16, which JSON can say and no file can hold, becomes a question mark."""
    value = json.loads(text)
    if "\\ud" not in text.lower():
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


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
        is_number = isinstance(item, (int, float)) and abs(item) <= sys.float_info.max
        if is_number:
            found[name] = item
        else:
            odd.append(name)
    if odd:
        notes.append(f"metrics.json: left out, no numbers: {', '.join(odd)[:200]}")
    return found


def _text(path: Path, *, is_end: bool = False) -> str:
    """The beginning of a long file, or its end."""
    try:
        with path.open("rb") as file:
            if is_end:
                file.seek(max(0, path.stat().st_size - LONGEST_TEXT))
            return file.read(LONGEST_TEXT).decode(errors="replace").strip()
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
    paths = _own(folder, "*.csv")
    return {path.stem: functools.partial(_frame, path, hidden) for path in paths}


def _frame(path: Path, hidden: Redactor) -> pd.DataFrame:
    typed = _own(path.parent, f"{glob.escape(path.stem)}.parquet")
    if not typed:
        return hidden.frame(pd.read_csv(path))
    check_table(typed[0], MOST_TABLE)
    return hidden.frame(pd.read_parquet(typed[0]))


def _pictures(folder: Path) -> dict[str, Path]:
    """Drawings where there are any: they are small and sharp."""
    found = {path.stem: path for path in _own(folder, "*.png")}
    return found | {path.stem: path for path in _own(folder, "*.svg")}


def _log(folder: Path, hydra: Path) -> str:
    logs = _own(folder, "*.log") or _own(hydra.parent, "*.log")
    texts = [_text(path, is_end=True) for path in logs]
    return "\n".join(text for text in texts if text)
