"""Charts of predictors' scores: recall by layer, and by how far ahead a guess is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from analysis.report.comparing import seed_of
from analysis.report.labels import CHEATS
from analysis.report.runs import Run
from analysis.report.series import Chart, Point, chart_of, number, suffixes

HEADLINE_HORIZON = 4


def _scores(runs: Sequence[Run], table: str, columns: set[str]) -> Iterator[tuple[int, str, Any]]:
    """Rows about new text: run, name of the series, row."""
    having = []
    for i, run in enumerate(runs):
        frame = run.table(table)
        if frame is not None and columns <= set(frame):
            having.append(
                (i, run, frame[frame["rows"] == "new_text"] if "rows" in frame else frame)
            )
    suffix = suffixes([(i, run) for i, run, _ in having])
    for i, _, frame in having:
        for row in frame.to_dict("records"):
            yield i, str(row["predictor"]) + suffix(i, row), row


def by_layer(runs: Sequence[Run]) -> Chart | None:
    cheating = _cheating(runs)
    by: dict[str, list[Point]] = defaultdict(list)
    columns = {"predictor", "horizon", "layer", "recall_at_k"}
    for i, name, row in _scores(runs, "by_layer", columns):
        cheats = str(row["predictor"]) in cheating
        point = Point(
            name, number(row, "layer"), number(row, "recall_at_k"), i, seed_of(runs[i]), cheats
        )
        by[_ahead(number(row, "horizon"))].append(point)
    first = _ahead(HEADLINE_HORIZON)
    ordered = {name: by[name] for name in sorted(by, key=lambda name: (name != first, name))}
    return chart_of(
        ordered, id="recall-by-layer", title="Recall by layer", x="target layer", y="recall at k",
        note="Share of the true experts among as many guesses, on requests that nothing was fitted on.", shares="y",
    )  # fmt: skip


def by_horizon(runs: Sequence[Run]) -> Chart | None:
    points = []
    for i, name, row in _scores(runs, "predictors", {"predictor", "horizon", "recall_at_k"}):
        low, high = number(row, "low"), number(row, "high")
        cheats, seed = row.get("mark") == CHEATS, seed_of(runs[i])
        value = number(row, "recall_at_k")
        points.append(
            Point(name, number(row, "horizon"), value, i, seed, cheats, low, high, "requests")
        )
    return chart_of(
        {"": points}, id="recall-by-horizon", title="Recall by horizon", x="layers ahead that a guess is made",
        y="recall at k", note="Mean over target layers from the horizon on.", shares="y",
    )  # fmt: skip


def _cheating(runs: Sequence[Run]) -> set[str]:
    """Predictors that any run's table marks."""
    found: set[str] = set()
    for run in runs:
        frame = run.table("predictors")
        if frame is not None and {"mark", "predictor"} <= set(frame):
            found |= set(frame[frame.mark == CHEATS].predictor.astype(str))
    return found


def _ahead(horizon: float) -> str:
    return f"{horizon:g} layer{'s' if horizon != 1 else ''} ahead"
