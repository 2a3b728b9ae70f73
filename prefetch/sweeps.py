"""A sweep of many runs: where it writes, what each job came to, and how to go on. It knows no stage.

A sweep goes on where it stopped when the same command is given its folder: jobs that stand finished there are found
as they are (`Standing.done`), the others are run. What jobs share lies in the store in any case.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from prefetch import standing

FOLDER = "hydra.sweep.dir"
SHOWN = 10  # reasons; a sweep may hold hundreds of jobs
_begun: list[Path] = []  # of this process; Hydra tells a callback, and an end asks


class Watch(Callback):
    """Hydra's: it hears of a sweep before any job begins, on the machine where it was typed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _begun.append(Path(config.hydra.sweep.dir))


def is_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def name() -> str | None:
    """What the runs of one sweep share."""
    return Path(HydraConfig.get().sweep.dir).name if is_sweep() else None


def words(stage: str) -> list[str]:
    """What was typed for this run, or would be for this job of a sweep, or for one stage of several."""
    hydra = HydraConfig.get()
    typed = list(hydra.overrides.task)
    if stage == hydra.runtime.choices["stage"]:
        return typed
    return [*(word for word in typed if not word.startswith("stage=")), f"stage={stage}"]


def close(typed: Sequence[str]) -> None:
    """Says what came of the sweep of this process, if it was one."""
    if _begun and (folder := _begun.pop()).is_dir():
        print("\n".join(_told(folder, typed)), file=sys.stderr)


def _told(folder: Path, typed: Sequence[str]) -> list[str]:
    jobs = {path.parent.name: _came_to(path.parent) for path in sorted(folder.glob("*/.hydra"))}
    counts = Counter(state for state, _ in jobs.values())
    came_to = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines = [f"sweep {folder}: of {len(jobs)} jobs {came_to}"]
    bad: dict[tuple[str, str], list[str]] = {}
    for job, end in jobs.items():
        if end[0] != standing.FINISHED:
            bad.setdefault(end, []).append(job)
    for (state, error), names in list(bad.items())[:SHOWN]:
        lines.append(f"  {state}: {error} (job {', '.join(sorted(names, key=_in_order))})")
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} other reasons")
    if bad:
        given = any(word.startswith(f"{FOLDER}=") for word in typed)
        again = [*typed, *(() if given else (f"{FOLDER}={folder}",))]
        lines.append(f"to run only what is not finished: {standing.command(again)}")
    return lines


def _in_order(job: str) -> tuple[int, str]:
    return (int(job) if job.isdigit() else -1, job)


def _came_to(folder: Path) -> tuple[str, str]:
    """A job that ended before its run began (or on a machine that is gone) left no word of itself."""
    try:
        told = json.loads((folder / standing.NAME).read_text())
        return str(told["state"]), str(told["error"] or "it was killed, or runs still")
    except (OSError, ValueError, KeyError, TypeError):
        return "lost", "nothing was written"
