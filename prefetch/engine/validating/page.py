"""The page of a validation: every sentence from its table. It runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from prefetch.engine.validating.compare import APART, NAIVE, TARGETS

if TYPE_CHECKING:
    from prefetch.engine.validating.cases import Case

STEADY = 0.05  # of its time: runs of a cell that are further apart cannot judge a prediction
WORDS = {
    "median_abs_error": "median error of a token's time",
    "worst_abs_error": "largest error of a cell",
    "worst_stall_error": "largest error of a cell's time waited for copies",
    "pairs_in_order": f"pairs more than {APART:.0%} apart in the right order",
}
NAIVES = {
    "roofline": "every expert resident, at the same measured costs",
    "constants": "hits and misses times constants",
}


def page(table: pd.DataFrame, metrics: Mapping[str, float], cases: list[Case]) -> str:
    clock, is_gpu = cases[0].clock, cases[0].clock.device.type == "cuda"
    cards = ", ".join(table.model_card.unique())
    lines = [
        f"# Simulated against measured: {clock.machine}",
        "",
        f"{len(table)} cells, {steps_of(cases)} steps each, drawn weights of {cards}. The "
        "simulator was given what single copies, experts and decisions take here, each timed alone; its predictions "
        "were written to predictions.csv before the engine ran.",
        "",
        "## Decisions",
        "",
        *_decisions(table, metrics),
        "",
        "## Times",
        "",
        *([] if is_gpu else [NOT_JUDGED, ""]),
        *_times(metrics, cases[0].hardware, is_judged=is_gpu),
        "",
        "## Cells",
        "",
        "| model card | batch | policy | cache | guesses ahead | predicted ms | measured ms | error | hits | spread |",
        "|" + "---|" * 10,
        *_rows(table),
        "",
    ]
    return "\n".join(lines)


def steps_of(cases: list[Case]) -> str:
    return ", ".join(str(n) for n in sorted({case.work.n_steps for case in cases}))


NOT_JUDGED = (
    "On a CPU times are reported and not judged: the thread that copies shares cores and memory with the one that "
    "computes."
)


def _decisions(table: pd.DataFrame, metrics: Mapping[str, float]) -> Iterator[str]:
    for what in ("hits", "bytes"):
        name = f"{what}_equal"
        wrong = int((~table[name]).sum())
        yield f"* {what}: " + (
            "equal in every cell, access by access."
            if metrics[name] and what == "hits"
            else "equal in every cell."
            if metrics[name]
            else f"**different in {wrong} of {len(table)} cells**."
        )
    ahead = table[table.horizon > 0]
    if len(ahead):
        most = float(ahead.free_hit_difference.abs().max())
        yield (
            f"* With guesses the decisions were taken again for the order in which copies began and landed on the "
            f"device; each copy was the one that was next. Running free, the simulator's hit "
            f"rate is at most {most:.3f} from the device's."
        )


def _times(metrics: Mapping[str, float], hardware: str, *, is_judged: bool) -> Iterator[str]:
    yield "| | here | " + ("must be | |" if is_judged else "must be on a GPU |")
    yield "|---|---|---|" + ("---|" if is_judged else "")
    for name, target in TARGETS.items():
        value = metrics.get(name, math.nan)
        is_least = name == "pairs_in_order"
        holds = value >= target if is_least else value < target
        bound = f"{'at least' if is_least else 'under'} {target:.0%}"
        found = "-" if math.isnan(value) else f"{value:.1%}"
        verdict = (
            ("holds" if holds else "**does not hold**") if found != "-" else "nothing to judge"
        )
        yield f"| {WORDS[name]} | {found} | {bound} |" + (f" {verdict} |" if is_judged else "")
    for name in NAIVE:
        naive = metrics[f"{name}_median_abs_error"]
        yield (
            f"| median error of a naive predictor: {NAIVES[name]} | {naive:.1%} | at least twice ours |"
            + (
                f" {'holds' if naive >= 2 * metrics['median_abs_error'] else '**does not hold**'} |"
                if is_judged
                else ""
            )
        )
    yield ""
    if "file_median_abs_error" in metrics:
        error = metrics["file_median_abs_error"]
        yield f"Told the measured hardware file and nothing else, the simulator is {error:.1%} off in the median."
    yield hardware
    if (spread := metrics["engine_spread"]) > STEADY:
        yield ""
        yield (
            f"**The machine was not quiet**: runs of one and the same cell were {spread:.1%} apart (median), so that "
            "no error of that size says anything of the simulator. Run it when nothing else does."
        )
    if "rank_correlation" in metrics:
        yield ""
        yield (
            f"Rank correlation of the policies (Kendall's tau, all else equal): {metrics['rank_correlation']:.2f}. The "
            f"engine's own spread between runs of a cell: {metrics['engine_spread']:.1%} (median)."
        )


def _rows(table: pd.DataFrame) -> Iterator[str]:
    for row in table.to_dict("records"):
        ahead = row["horizon"] or "none"
        yield (
            f"| {row['model_card']} | {row['batch']} | {row['policy']} | {row['capacity']} | {ahead} | "
            f"{row['predicted_ms']:.3f} | {row['measured_ms']:.3f} | {row['error']:+.1%} | "
            f"{row['measured_hit_rate']:.3f} | {row['engine_spread']:.1%} |"
        )
