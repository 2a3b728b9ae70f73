"""The contents as plain rows: per run, per group of seeds, what went wrong, and the whole that the page opens with.

It writes no file and no markup: the page and the Markdown show the same rows.
"""

from __future__ import annotations

from typing import Any

from analysis.report.comparing import SEED, SeedGroup, seed_of
from analysis.report.contents import Contents, plural, shown_setting
from analysis.report.labels import clock
from analysis.report.packed import OF_A_MEAN, exact, plain, short
from analysis.report.runs import FINISHED, Run

MOST_PROBLEMS = 1000  # that a page names
LONGEST_MESSAGE = 500  # characters; all of it stands in the run's own view


def row_of(of: Contents, run: Run) -> list[Any]:
    """A value per column."""
    return [
        shown_setting(run, column.name)
        if column.kind == "setting"
        else exact(run.metrics.get(column.name))
        for column in of.columns
    ]


def group_row(of: Contents, group: SeedGroup) -> tuple[list[Any], list[Any], list[Any]]:
    """Values, and the ends of their intervals."""
    newest = of.runs[group.runs[-1]]
    values, low, high = row_of(of, newest), list[Any](), list[Any]()
    for at, column in enumerate(of.columns):
        told = group.metrics.get(column.name) if column.kind == "metric" else None
        if column.kind == "metric" and len(group.runs) > 1:
            values[at] = None if told is None else plain(told.mean, OF_A_MEAN)
        if column.name == SEED and len(group.runs) > 1:
            values[at] = ", ".join(map(str, group.seeds))
        low.append(None if told is None else plain(told.low, OF_A_MEAN))
        high.append(None if told is None else plain(told.high, OF_A_MEAN))
    return values, low, high


def group_name(of: Contents, group: SeedGroup, run: Run) -> str:
    """Of several runs it says how many seeds the numbers are means of."""
    several = len(group.runs) > 1
    return f"{plural(len(group.seeds), 'seed')}: {run.name}" if several else run.name


def group_mark(of: Contents, group: SeedGroup) -> str:
    """A run that failed has no table that could say it: any of the group's says it for all."""
    return next((of.marks[at] for at in group.runs if of.marks[at]), "")


def index(of: Contents) -> dict[str, Any]:
    """What the page opens with."""
    return {
        "columns": [vars(column) for column in of.columns],
        "runs": [_run(of, at) for at in range(len(of.runs))],
        "groups": [_group(of, group) for group in of.groups],
        "common": [[name, short(plain(value))] for name, value in of.compared.common],
        "without_effect": of.compared.without_effect,
        "problems": problems(of),
        "charts": [chart.id for chart in of.charts],
        "legend": LEGEND,
    }


def _run(of: Contents, at: int) -> dict[str, Any]:
    run = of.runs[at]
    return {
        "id": of.ids[at], "name": run.name, "stage": run.stage, "state": run.state, "mark": of.marks[at],
        "clock": clock(run) or "", "message": short(run.message), "began": run.began, "seconds": plain(run.seconds),
        "seed": seed_of(run), "source": run.source, "cells": [short(value) for value in row_of(of, run)],
    }  # fmt: skip


def _group(of: Contents, group: SeedGroup) -> dict[str, Any]:
    told: dict[str, Any] = {"runs": group.runs, "seeds": group.seeds}
    if len(group.runs) > 1:
        cells, told["low"], told["high"] = group_row(of, group)
        told["cells"] = [short(value) for value in cells]
        told["mark"] = group_mark(of, group)
        told["name"] = group_name(of, group, of.runs[group.runs[0]])
    return told


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
            told = [*run.notes, *(f"table {table}: {why}" for table, why in run.failures.items())][
                :20
            ]
            found.append({"id": name, "place": title, "why": "; ".join(told)})
    beside = [{"id": "", "place": "Beside these", "why": note} for note in of.notes()]
    if len(found) > MOST_PROBLEMS:
        why = (
            f"{len(found) - MOST_PROBLEMS:,} more problems: the table of runs and the log name them"
        )
        beside.append({"id": "", "place": "Beside these", "why": why})
    return [*found[:MOST_PROBLEMS], *beside]


def _ended(run: Run) -> str:
    message = run.message[:LONGEST_MESSAGE]
    return message if message.startswith(run.state) else f"{run.state}: {message}"
