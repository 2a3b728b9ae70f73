"""Charts of the simulator's cells: hits, times, memory against slowdown, and how good guesses must be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.report.comparing import seed_of
from analysis.report.labels import CHEATS
from analysis.report.runs import Run
from analysis.report.series import Chart, Point, chart_of, number, suffixes

COMMON_WAYS = ("chosen", "lru", "no prefetch", "curve", "optimum", "oracle prefetch")


@dataclass(frozen=True)
class CellPoint:
    name: str
    run: int
    seed: int | None
    cheats: bool
    row: Mapping[Any, Any]


def cells_of(runs: Sequence[Run]) -> list[CellPoint]:
    """Rows of every table of cells that ran."""
    having = [(i, run, frame) for i, run in enumerate(runs) if (frame := _results(run)) is not None]
    suffix = suffixes([(i, run) for i, run, _ in having])
    several = _several_horizons(frame for *_, frame in having)
    return [
        CellPoint(
            _way(row, several) + suffix(i, row), i, seed_of(run), row.get("mark") == CHEATS, row
        )
        for i, run, frame in having
        for row in frame.to_dict("records")
    ]


def _several_horizons(frames: Iterable[pd.DataFrame]) -> bool:
    """0 is the horizon of rows without guesses."""
    empty = pd.Series(dtype=float)
    return len({h for frame in frames for h in frame.get("horizon", empty).dropna() if h}) > 1


def _results(run: Run) -> pd.DataFrame | None:
    frame = run.table("results")
    has_cells = frame is not None and {"policy", "memory_savings"} <= set(frame)
    return frame if has_cells else None


def _way(row: Mapping[Any, Any], several_horizons: bool) -> str:
    """lru, lru + markov, host compute."""
    way = str(row.get("way", "chosen"))
    if way not in COMMON_WAYS:
        return way
    name, guesser = str(row["policy"]), str(row.get("predictor", "none"))
    if guesser != "none":
        ahead = f", {row.get('horizon')} ahead" if several_horizons else ""
        name += f" + {guesser}{ahead}"
    misses = str(row.get("misses", "wait"))
    return name if misses in ("wait", "nan") else f"{name}, misses: {misses}"


def hit_rate(cells: Sequence[CellPoint]) -> Chart | None:
    return _by_memory(
        cells,
        "hit_rate",
        id="hit-rate",
        title="Hit rate",
        shares="xy",
        y="hit rate of distinct experts",
    )


def time_per_token(cells: Sequence[CellPoint]) -> Chart | None:
    return _by_memory(
        cells,
        "tpot_ms",
        id="time-per-token",
        title="Time per token",
        shares="x",
        y="ms per generated token",
    )


def _by_memory(cells: Sequence[CellPoint], column: str, **said: str) -> Chart | None:
    points = []
    for cell in cells:
        held, value = 1 - number(cell.row, "memory_savings"), number(cell.row, column)
        low, high = (number(cell.row, f"{column}_{end}") for end in ("low", "high"))
        over = str(cell.row.get("interval_over", "requests"))
        points.append(
            Point(cell.name, held, value, cell.run, cell.seed, cell.cheats, low, high, over)
        )
    note = "Every point is a cell of stage evaluate. The memory is that of caches, staging and predictor."
    return chart_of(
        {"": points}, x="expert memory on the device, share of all experts", note=note, **said
    )


def pareto(cells: Sequence[CellPoint]) -> Chart | None:
    points = [
        Point(
            cell.name, number(cell.row, "memory_savings"), number(cell.row, "slowdown"),
            cell.run, cell.seed, cell.cheats,
        )
        for cell in cells
    ]  # fmt: skip
    return chart_of(
        {"": points}, id="pareto", title="Memory saved against slowdown",
        x="expert memory saved, share of all experts", y="slowdown against all experts resident",
        note="The line joins the cells that no other beats on both, those that cheat left out.",
        dots=True, front=True, shares="x",
    )  # fmt: skip


def required_recall(runs: Sequence[Run]) -> Chart | None:
    tables = {i: frame for i, run in enumerate(runs) if (frame := _needed(run)) is not None}
    suffix, by = suffixes([(i, runs[i]) for i in tables]), defaultdict[str, list[Point]](list)
    several = _several_horizons(tables.values())
    for i, frame in tables.items():
        for row in frame.to_dict("records"):
            ahead = f", {row.get('horizon')} ahead" if several else ""
            name = f"{row['policy']}, cache {row['capacity']}{ahead}{suffix(i, row)}"
            seed, factor = seed_of(runs[i]), number(row, "bandwidth_factor", 1.0)
            point = Point(name, number(row, "recall"), number(row, "tpot_ms"), i, seed)
            told = number(row, "no_prefetch_tpot_ms")
            without = Point(f"{name}, no guesses", point.x, told, i, seed, beside=name)
            by[f"{factor:g} times the link's bandwidth"] += [point, without]
    first = f"{1:g} times the link's bandwidth"
    ordered = {name: by[name] for name in sorted(by, key=lambda name: (name != first, name))}
    return chart_of(
        ordered, id="required-recall", title="How good guesses must be", x="recall of drawn guesses",
        y="ms per generated token",
        note="Copying ahead pays where the line is below the one without guesses of the same cache. The guesses are "
        "drawn with the answer at hand: no predictor made them.", shares="x",
    )  # fmt: skip


def _needed(run: Run) -> pd.DataFrame | None:
    frame = run.table("required_recall")
    has_all = frame is not None and {"recall", "tpot_ms", "policy", "capacity"} <= set(frame)
    return frame if has_all else None
