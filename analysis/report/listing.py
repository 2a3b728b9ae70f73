"""The contents as plain rows: per run, per group of seeds, what went wrong, and the whole that the page opens with.

It writes no file and no markup: the page and the Markdown show the same rows.
"""

from __future__ import annotations

from typing import Any

from analysis.report.comparing import SEED, SeedGroup, seed_of
from analysis.report.contents import Contents, shown_setting
from analysis.report.packed import plain
from analysis.report.runs import FINISHED, Run


def row_of(of: Contents, run: Run) -> list[Any]:
    """A value per column."""
    return [
        shown_setting(run, column.name)
        if column.kind == "setting"
        else plain(run.metrics.get(column.name))
        for column in of.columns
    ]


def group_row(of: Contents, group: SeedGroup) -> tuple[list[Any], list[Any], list[Any]]:
    """Values, and the ends of their intervals."""
    newest = of.runs[group.runs[-1]]
    values, low, high = row_of(of, newest), list[Any](), list[Any]()
    for at, column in enumerate(of.columns):
        told = group.metrics.get(column.name) if column.kind == "metric" else None
        if column.kind == "metric" and len(group.runs) > 1:
            values[at] = None if told is None else plain(told.mean)
        if column.name == SEED and len(group.runs) > 1:
            values[at] = ", ".join(map(str, group.seeds))
        low.append(None if told is None else plain(told.low))
        high.append(None if told is None else plain(told.high))
    return values, low, high


def index(of: Contents) -> dict[str, Any]:
    """What the page opens with."""
    runs = []
    for run, name, mark in zip(of.runs, of.ids, of.marks, strict=True):
        runs.append(
            {"id": name, "name": run.name, "stage": run.stage, "state": run.state, "mark": mark,
             "message": run.message[:2000], "began": run.began, "seconds": plain(run.seconds), "seed": seed_of(run),
             "source": run.source, "cells": row_of(of, run)}
        )  # fmt: skip
    groups = []
    for group in of.groups:
        cells, low, high = group_row(of, group)
        groups.append(
            {"runs": group.runs, "seeds": group.seeds, "cells": cells, "low": low, "high": high}
            if len(group.runs) > 1
            else {"runs": group.runs, "seeds": group.seeds}
        )
    return {
        "columns": [vars(column) for column in of.columns],
        "runs": runs,
        "groups": groups,
        "common": [[name, plain(value)] for name, value in of.compared.common],
        "without_effect": of.compared.without_effect,
        "problems": problems(of),
        "charts": [chart.id for chart in of.charts],
        "legend": LEGEND,
    }


LEGEND = (
    "Columns with a coloured edge are settings that differ between the rows shown; a tinted cell is not what more than "
    "half of them have. Simulated: the time comes from the simulator, not from a device. Cheats: it knows what a real "
    "system cannot. Brackets are Student's 95 % interval over seeds."
)


def problems(of: Contents) -> list[dict[str, str]]:
    """Runs that did not finish, runs that were read in part, places that could not be read."""
    found = [{"id": "", "place": str(one.place), "why": one.why} for one in of.found.unreadable]
    for run, name in zip(of.runs, of.ids, strict=True):
        title = f"{run.stage} {run.name}"
        if run.state != FINISHED:
            found.append({"id": name, "place": title, "why": _ended(run)})
        if run.notes or run.failures:
            told = [*run.notes, *(f"table {table}: {why}" for table, why in run.failures.items())]
            found.append({"id": name, "place": title, "why": "; ".join(told)})
    return [*found, *({"id": "", "place": "Beside these", "why": note} for note in of.notes())]


def _ended(run: Run) -> str:
    message = run.message[:2000]
    return message if message.startswith(run.state) else f"{run.state}: {message}"
