"""What must stand beside a number: simulated, cheats. It knows the words that tables and settings use for that."""

from __future__ import annotations

import re

from analysis.report.runs import Run

SIMULATED, MEASURED = "simulated", "measured"
CHEATS = "cheats"
SIMULATES = ("evaluate", "advise")  # stages whose times come from the simulator
OF_TIME = re.compile(
    r"(tpot|ttft|tokens_per_s|slowdown|speedup|stall|utilisation|break_even|late_|gap_closed|pays$|_ms\b|_ms_|pct$)"
)
CHOSEN = "chosen"


def clock(run: Run) -> str | None:
    """Where a run's times come from; None = it has none of a model's."""
    if run.stage not in SIMULATES:
        return None
    return SIMULATED if run.settings.get("simulator.clock", SIMULATED) == SIMULATED else MEASURED


def clock_of(run: Run, metric: str) -> str | None:
    return clock(run) if OF_TIME.search(metric) else None


def mark(run: Run) -> str:
    """The mark of what the run was about: the cell, or the predictor, that its metrics are of."""
    cells, guessers = run.table("results"), run.table("predictors")
    if cells is not None and {"way", "mark"} <= set(cells):
        rows = cells[cells.way == CHOSEN]
        for group in ("policy", "predictor"):
            if group in rows and (rows[group] == run.choices.get(group)).any():
                rows = rows[rows[group] == run.choices.get(group)]
    elif guessers is not None and {"predictor", "mark"} <= set(guessers):
        rows = guessers[guessers.predictor == run.choices.get("predictor")]
    else:
        return ""
    return CHEATS if len(rows) and str(rows.mark.iloc[0]) == CHEATS else ""
