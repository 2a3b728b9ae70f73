"""A sweep of many runs: where it writes, what each job came to, and how to go on. It knows no stage.

A sweep goes on where it stopped when the same command is given its folder: jobs that stand finished there are found
as they are (`Standing.done`), the others are run. What jobs share lies in the store in any case.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from prefetch.runs import standing
from prefetch.runs.redaction import Redactor

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
    if not _begun or not (folder := _begun.pop()).is_dir():
        return
    hidden = Redactor()
    hidden.yaml(folder / "multirun.yaml")  # also of jobs that could not be composed
    if lines := _told(folder, hidden.words(typed)):
        print("\n".join(lines), file=sys.stderr)


def _told(folder: Path, typed: Sequence[str]) -> list[str]:
    found = sorted(folder.rglob(".hydra"))
    jobs = {str(path.parent.relative_to(folder)): _came_to(path.parent) for path in found}
    if not jobs:
        return []
    counts = Counter(state for state, _ in jobs.values())
    came_to = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines = [f"sweep {folder}: of {len(jobs)} jobs begun {came_to}"]
    bad: dict[tuple[str, str], list[str]] = {}
    for job, end in jobs.items():
        if end[0] != standing.FINISHED:
            bad.setdefault(end, []).append(job)
    for (state, error), names in list(bad.items())[:SHOWN]:
        lines.append(
            f"  {state}: {error.removeprefix(f'{state}: ')} (job {', '.join(sorted(names, key=_in_order))})"
        )
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} other reasons")
    if bad:
        given = any(word.startswith(f"{FOLDER}=") for word in typed)
        again = [*typed, *(() if given else (f"{FOLDER}={folder}",))]
        if counts[standing.RUNNING]:
            lines.append("  jobs of a cluster may be running still: wait for them, or cancel them")
        lines.append(f"to run only what is not finished: {standing.command(again)}")
    return lines


def _in_order(job: str) -> tuple[int, str]:
    return (int(job) if job.isdigit() else -1, job)


def _came_to(folder: Path) -> tuple[str, str]:
    """A job that ended before its run began (or on a machine that is gone) left no word of itself."""
    told = standing.read(folder / standing.NAME)
    if "state" not in told:
        return "lost", "nothing was written"
    return str(told["state"]), str(told.get("error") or "it was killed, or runs still")
