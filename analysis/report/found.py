"""Which runs a report is of: a folder, a sweep, a list, offline runs of W&B, or the latest in the store's index.

It opens no table and compares nothing. A run that is found twice counts once; reports are not reported on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.report.reading import read_run
from analysis.report.runs import FOLDER, HYDRA, Run, Unreadable, is_run, reason
from analysis.report.tracked_runs import read_tracked
from prefetch.errors import ConfigError
from prefetch.manifest import MANIFEST
from prefetch.runs.index import RUNS
from prefetch.runs.tracked import find_offline_runs

LATEST = re.compile(r"latest:(\d+)")
LEFT_OUT = ("report",)  # a page about pages says nothing
COLLECTION = "all"  # its stages are runs of their own, below it
PASSED_BY = (HYDRA, "wandb", ".git", ".venv", "node_modules", "__pycache__")


@dataclass
class Found:
    asked: str  # in words
    runs: list[Run] = field(default_factory=list)  # the oldest first
    unreadable: list[Unreadable] = field(default_factory=list)
    twice: int = 0  # runs that were found again
    gone: int = 0  # entries of the index whose folder is no more


def find(asked: Any, store: Path) -> Found:
    """`asked` is what report.runs says; `store` has the index of runs."""
    places = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if not places or None in places:
        raise ConfigError(f"report.runs={asked}: names no run; give a folder, a list, or latest:20")
    found = Found(", ".join(map(str, places)))
    seen: set[str] = set()
    for place in map(str, places):
        if latest := LATEST.fullmatch(place):
            _take_latest(found, int(latest.group(1)), store, seen)
        else:
            _take_place(found, Path(place), seen)
    _drop_told_twice(found)
    found.runs.sort(key=lambda run: (run.began, _in_order(str(run.folder))))
    return found


def _drop_told_twice(found: Found) -> None:
    """What the tracker tells of a run whose own folder is there as well: the folder has everything."""
    own = {_numbers(run) for run in found.runs if run.source == FOLDER and run.metrics}
    kept = [run for run in found.runs if run.source == FOLDER or _numbers(run) not in own]
    found.twice += len(found.runs) - len(kept)
    found.runs = kept


def _numbers(run: Run) -> tuple[Any, ...]:
    return run.stage, tuple(sorted(run.metrics.items()))


def _in_order(text: str) -> list[tuple[int, str]]:
    """Job 10 after job 9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]


def _take_latest(found: Found, most: int, store: Path, seen: set[str]) -> None:
    """The newest entries of the index, as far as their folders are still there."""
    if most < 1:
        raise ConfigError(f"report.runs=latest:{most}: must be at least 1")
    entries = sorted((store / RUNS).glob("*.json"), key=_written_s, reverse=True)
    taken = 0
    for entry in entries:
        if taken == most:
            break
        try:
            folder = Path(json.loads(entry.read_text())["folder"])
            is_there = folder.is_dir()  # a name can be too long for any disk
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            found.unreadable.append(Unreadable(entry, "the entry of the store's index is damaged"))
            continue
        if not is_there:
            found.gone += 1
        else:
            taken += _take(found, _runs_at(folder), seen)


def _written_s(entry: Path) -> float:
    """0 where another process took it away meanwhile."""
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _take_place(found: Found, place: Path, seen: set[str]) -> None:
    if not place.exists():
        raise ConfigError(
            f"report.runs={place}: does not exist; give a folder of runs, a sweep's folder, a list of these, or "
            "latest:20"
        )
    before = len(found.runs) + len(found.unreadable) + found.twice
    if place.is_file():
        _take(found, [read_tracked(place)], seen)
    else:
        _take(found, _below(place), seen)
    if len(found.runs) + len(found.unreadable) + found.twice == before:
        raise ConfigError(
            f"report.runs={place}: no run in it; a run's folder has .hydra/config.yaml, metrics.json, lineage.json or "
            "error.txt, an offline run of W&B has run-ID.wandb"
        )


def _take(found: Found, read: Iterable[Run | Unreadable], seen: set[str]) -> int:
    taken = 0
    for one in read:
        if isinstance(one, Unreadable):
            if f"unreadable {one.place}" not in seen:
                found.unreadable.append(one)
            seen.add(f"unreadable {one.place}")
            continue
        if one.stage in LEFT_OUT:
            continue
        marks = _marks(one)
        if marks & seen:
            found.twice += 1
            continue
        seen |= marks
        found.runs.append(one)
        taken += 1
    return taken


def _marks(run: Run) -> set[str]:
    """By which a run is known again: its place, and what it says, for a folder that was copied."""
    said: list[Any] = [
        run.stage,
        run.began,
        run.state,
        run.message,
        run.overrides,
        dict(run.metrics),
    ]
    said += [sorted(run.lineage), sorted(run.settings.items(), key=str), run.folder.name]
    digest = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()
    return {str(run.folder.resolve()), digest}


def _below(top: Path) -> Iterator[Run | Unreadable]:
    """Runs in a folder, however deep; offline files of the tracker where no run's own folder holds them."""
    for here, folders, _ in os.walk(top):
        folder = Path(here)
        if folder != top and (folder / MANIFEST).is_file():
            folders.clear()  # an artifact
            continue
        folders[:] = sorted(name for name in folders if name not in PASSED_BY)
        if _may_be_run(folder):
            yield from _runs_at(folder, with_inner=False)
    for path in find_offline_runs(top):
        if not any(is_run(above) for above in _between(path, top)):
            yield read_tracked(path)


def _may_be_run(folder: Path) -> bool:
    """Also where nobody may look."""
    try:
        return is_run(folder)
    except OSError:
        return True


def _between(path: Path, top: Path) -> Iterator[Path]:
    for above in path.parents:
        yield above
        if above == top:
            return


def _runs_at(folder: Path, *, with_inner: bool = True) -> Iterator[Run | Unreadable]:
    """One folder's run; of `stage=all` the stages stand for it, unless it ended before the first."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
        one = read_run(folder) if is_run(folder) else Unreadable(folder, "no run in it")
    except OSError as error:  # no permission, a disk that went away
        yield Unreadable(folder, reason(error))
        return
    if not (isinstance(one, Run) and one.stage == COLLECTION and inner):
        yield one
    elif with_inner:
        yield from map(read_run, inner)
