"""The charts of a report, each only where its data exists. It draws nothing and knows no plotting library."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.report.cell_charts import (
    cells_of,
    hit_rate,
    pareto,
    required_recall,
    time_per_token,
)
from analysis.report.labels import MEASURED, SIMULATED, clock
from analysis.report.runs import Run
from analysis.report.score_charts import by_horizon, by_layer
from analysis.report.series import Chart

OF_TIME = ("time-per-token", "pareto", "required-recall")


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All that these runs have data for."""
    cells = cells_of(runs)
    made = [
        hit_rate(cells),
        time_per_token(cells),
        pareto(cells),
        by_layer(runs),
        by_horizon(runs),
        required_recall(runs),
    ]
    return [chart for chart in made if chart is not None]


def times_are(runs: Sequence[Run], chart: Chart) -> str:
    """What a chart of times must say: simulated, measured, or both."""
    if chart.id not in OF_TIME:
        return ""
    shown = {i for series in chart.variants.values() for one in series for i in one.runs}
    clocks = {clock(runs[i]) or SIMULATED for i in shown}
    return clocks.pop() if len(clocks) == 1 else f"{SIMULATED} or {MEASURED}"
