"""A run from what the experiment tracker's offline file says of it; used where the run's own folder is not at hand.

The file is read by `prefetch.runs.tracked`; this file knows its names for metrics, tables and pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.report.runs import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    TRACKED,
    UNFINISHED,
    Run,
    Unreadable,
    chosen_names,
    flat,
    reason,
)
from prefetch.errors import PrefetchError
from prefetch.runs.redaction import Redactor
from prefetch.runs.tracked import OfflineRun, read_offline_run

STATES = {"finished": FINISHED, "failed": FAILED}


def read_tracked(path: Path) -> Run | Unreadable:
    """One `run-*.wandb`."""
    try:
        return _read(path, read_offline_run(path))
    except (PrefetchError, OSError) as error:
        return Unreadable(path, str(error).removeprefix(f"{path}: "))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        return Unreadable(path, f"what it says is not what runs say ({reason(error)})")


def _read(path: Path, told: OfflineRun) -> Run | Unreadable:
    config = {name: value for name, value in told.config.items() if name not in _OWN}
    config = Redactor(config).value(config)
    if not (config or told.summary):
        return Unreadable(path, told.cut or "it holds neither settings nor numbers")
    state, message = _state(told)
    stage = told.job_type or _stage_of(config)
    return Run(
        folder=path.parent,
        stage=stage,
        state=state,
        message=message,
        began=_iso(told.started_s),
        version=_version(told.config.get("run")),
        source=TRACKED,
        settings=flat(config) | {"stage.name": stage},
        choices=chosen_names(config),
        metrics=_metrics(told),
        tables={_last(name): functools.partial(_frame, told, name) for name in told.tables()},
        pictures=_pictures(told),
        lineage=_lineage(told.config.get("lineage")),
        notes=(f"the tracker's file ends early: {told.cut}",) if told.cut else (),
    )


_OWN = ("lineage", "upstream", "uses", "run", "_wandb")  # not settings


def _version(value: Any) -> str:
    return str(value.get("version", "")) if isinstance(value, Mapping) else ""


def _state(told: OfflineRun) -> tuple[str, str]:
    error = told.summary.get("error")
    message = str(error) if error else ""
    if message.startswith("interrupted"):
        return INTERRUPTED, message
    state = STATES.get(told.state, UNFINISHED)
    if state == UNFINISHED:
        return state, "no end was written: it was killed, or runs still"
    return (FAILED, message) if message else (state, message)


def _stage_of(config: Mapping[str, Any]) -> str:
    stage = config.get("stage")
    return str(stage.get("name", "unknown")) if isinstance(stage, Mapping) else "unknown"


def _metrics(told: OfflineRun) -> dict[str, float]:
    """Numbers of the summary; a metric defined with its best value holds it one level down."""
    found: dict[str, float] = {}
    for name, value in told.summary.items():
        inner = list(value.values()) if isinstance(value, Mapping) else [value]
        is_number = len(inner) == 1 and isinstance(inner[0], (int, float))
        if is_number and not isinstance(inner[0], bool) and not name.startswith("_"):
            found[name] = inner[0]
    return found


def _frame(told: OfflineRun, name: str) -> pd.DataFrame:
    columns, rows = told.table(name)
    return pd.DataFrame(rows, columns=columns)


def _pictures(told: OfflineRun) -> dict[str, Path]:
    try:
        found = told.pictures()
    except PrefetchError:
        return {}  # it names files outside its folder, which are not followed
    return {_last(name): path for name, path in found.items() if path.is_file()}


def _last(name: str) -> str:
    """table/results -> results."""
    return name.rpartition("/")[2]


def _lineage(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return {str(key): {} for key in value} if isinstance(value, list) else {}


def _iso(seconds: int) -> str:
    if not seconds:
        return ""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError) as error:
        return reason(error)
