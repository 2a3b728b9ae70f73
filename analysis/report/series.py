"""Series of points out of rows of tables: one name, one line; the mean over seeds with its interval.

It knows no table. Where runs differ in settings that a table's own columns do not name, these stand in a series' name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.report.comparing import GROUPS, Estimate, compare, estimate, setting
from analysis.report.kinship import strangers
from analysis.report.labels import clock
from analysis.report.runs import Run

TOLD = (  # by the rows of tables, by their columns, or below
    "policy", "predictor", "memory", "seed", "simulator.clock", "simulator.cache", "simulator.horizon",
    "evaluate.policies", "evaluate.predictors", "evaluate.capacities", "evaluate.horizons", "evaluate.required_recall",
    "train.horizons", "train.baselines", "train.export",
)  # fmt: skip
OWN_GROUPS = ("policy", "predictor")


@dataclass(frozen=True)
class Point:
    """What one row of one run's table says."""

    series: str
    x: float
    y: float
    run: int  # its place in the list of runs
    seed: int | None
    cheats: bool = False
    low: float = math.nan
    high: float = math.nan
    over: str = ""  # what the row's own interval is over
    beside: str = ""  # the series that it is the other half of


@dataclass
class Series:
    name: str
    cheats: bool
    runs: list[int]
    beside: str = ""
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    over: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    id: str
    title: str
    x: str  # label with its unit
    y: str
    note: str
    variants: Mapping[str, Sequence[Series]]  # one is shown at a time, the first to begin with
    dots: bool = False  # points that are no line
    front: bool = False  # the points that no other beats on both axes are joined
    shares: str = ""  # axes ("x", "y", "xy") whose numbers are shares


def suffixes(having: Sequence[tuple[int, Run]]) -> Callable[[int, Mapping[Any, Any]], str]:
    """What a series' name must add, since these runs differ in more than their tables' columns say."""
    columns = compare([run for _, run in having]).columns
    shared = [c for c in columns if c not in TOLD]
    own = {g: [c for c in shared if c.startswith(f"{g}.")] for g in OWN_GROUPS}
    rest = [c for c in shared if not c.startswith(tuple(f"{g}." for g in OWN_GROUPS))]
    by_run = dict(having)
    clocks = {clock(run) for run in by_run.values()} - {None}
    beside = strangers(having, TOLD)

    def suffix(i: int, row: Mapping[Any, Any]) -> str:
        run = by_run[i]
        asked = rest + [
            c for g in OWN_GROUPS for c in own[g] if str(row.get(g)) == run.choices.get(g)
        ]
        told = [_said(c, setting(run, c)) for c in asked if setting(run, c) is not None]
        if len(clocks) > 1:
            told.append(str(clock(run)))
        told += beside[i]
        return f" ({', '.join(told)})" if told else ""

    return suffix


def _said(column: str, value: Any) -> str:
    return str(value) if column in GROUPS else f"{column.rpartition('.')[2]}={value}"


def chart_of(points: Mapping[str, Sequence[Point]], **said: Any) -> Chart | None:
    """None = there is nothing to show."""
    variants = {key: _series(found) for key, found in points.items()}
    variants = {key: series for key, series in variants.items() if series}
    return Chart(variants=variants, **said) if variants else None


def _series(points: Sequence[Point]) -> list[Series]:
    """Points of one place are one: the newest run of every seed, then the mean over seeds."""
    by: dict[str, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if math.isfinite(point.x) and math.isfinite(point.y):
            by[point.series][round(point.x, 9)].append(point)
    return [_one_series(name, places) for name, places in by.items()]


def _one_series(name: str, places: Mapping[float, list[Point]]) -> Series:
    everyone = [point for found in places.values() for point in found]
    runs = sorted({point.run for point in everyone})
    made = Series(name, any(p.cheats for p in everyone), runs, everyone[0].beside)
    for x in sorted(places):
        by_seed = {point.seed: point for point in places[x]}  # runs stand oldest first
        told = estimate({seed: point.y for seed, point in by_seed.items()})
        low, high, over = _interval(told, next(reversed(by_seed.values())))
        for column, value in zip(
            (made.x, made.y, made.low, made.high, made.over),
            (x, told.mean, low, high, over),
            strict=True,
        ):
            column.append(value)  # type: ignore[attr-defined]
    return made


def _interval(told: Estimate, point: Point) -> tuple[float | None, float | None, str]:
    """Over seeds where there are several, else the row's own."""
    if told.low is not None:
        return told.low, told.high, f"{told.n} seeds"
    if math.isfinite(point.low) and math.isfinite(point.high):
        return point.low, point.high, point.over
    return None, None, ""


def number(row: Mapping[Any, Any], column: str, default: float = math.nan) -> float:
    """NaN for what is no number: a table of another version may hold anything."""
    try:
        return float(row.get(column, default))
    except (TypeError, ValueError):
        return math.nan
