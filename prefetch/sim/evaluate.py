"""Stage `evaluate`: what guesses are worth: policies x predictors x capacities x horizons on one workload.

Every table also shows, at the same capacity: no prefetch, the optimum, perfect guesses, and what people use today.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.progress import Progress
from prefetch.sim.bench import CHOSEN, OPTIMUM, Bench

log = logging.getLogger(__name__)
SLOWDOWNS = (0.05, 0.25, 0.5, 1.0)


def run(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """A tidy row per cell, the warnings, and the headline numbers of the cell that was chosen at the root."""
    bench = Bench(cfg, store)
    cells = list(bench.cells())
    rows = []
    with Progress("evaluating", len(cells), "cells") as progress:
        for cell in cells:
            rows.append(bench.row(cell))
            progress.advance(1)
    table = pd.DataFrame(rows)
    table["gap_closed"] = _gap_closed(table)
    outputs.table("results", table)
    chosen = _chosen(bench, table)
    metrics = _headline(table, chosen)
    outputs.metrics(metrics)
    warnings = list(_warnings(bench, table, chosen))
    (outputs.folder / "summary.md").write_text(_summary(bench, table, warnings))
    _print(bench, table)
    for text in warnings:
        log.warning(text)
    return metrics


def _gap_closed(table: pd.DataFrame) -> pd.Series:
    """Of the gap in hit rate between LRU and the optimum at the same capacity."""
    by = table.drop_duplicates(["capacity", "way"]).set_index(["capacity", "way"]).hit_rate
    closed = []
    for row in table.to_dict("records"):
        low, high = (by.get((row["capacity"], way), np.nan) for way in ("lru", OPTIMUM))
        closed.append((row["hit_rate"] - low) / (high - low) if high > low else np.nan)
    return pd.Series(closed, table.index)


def _chosen(bench: Bench, table: pd.DataFrame) -> pd.Series:
    """The cell that the root names; of a grid that does not hold it, the first."""
    cells = table[table.way == CHOSEN]
    for name, value in bench.root.items():
        cells = cells[cells[name] == value] if (cells[name] == value).any() else cells
    return cells.iloc[0]


def _beside(table: pd.DataFrame, chosen: pd.Series) -> dict[str, float]:
    """Milliseconds per token of the ways beside a cell: at its capacity, without guesses also with its policy."""
    same = table[table.capacity == chosen["capacity"]]
    alone = same[(same.predictor == "none") & (same.policy == chosen["policy"])]
    alone = alone[alone.way.isin([CHOSEN, "no prefetch"])]
    ways = {str(row.way): float(row.tpot_ms) for row in same[same.way != CHOSEN].itertuples()}
    return ways | {"no prefetch": float(alone.tpot_ms.iloc[0])}


def _headline(table: pd.DataFrame, chosen: pd.Series) -> dict[str, float]:
    names = (
        "hit_rate", "late_hit_rate", "stall_fraction", "tpot_ms", "tpot_bound_ms", "memory_savings", "bytes_per_token",
        "wasted_prefetch_bytes_per_token", "link_utilisation", "gap_closed", "capacity_token_cycles", "slowdown",
        "ttft_ms", "tokens_per_s",
    )  # fmt: skip
    metrics = {name: float(chosen[name]) for name in names}
    static_ms = _beside(table, chosen)["static split by layer"]
    metrics["speedup_over_static_split"] = static_ms / metrics["tpot_ms"]
    curve = table[table.way == "curve"]
    for most in SLOWDOWNS:
        fitting = curve[curve.slowdown <= 1 + most].memory_savings
        metrics[f"memory_savings_at_{most:.0%}".replace("%", "pct")] = (
            float(fitting.max()) if len(fitting) else 0.0
        )
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _warnings(bench: Bench, table: pd.DataFrame, chosen: pd.Series) -> Iterator[str]:
    same = _beside(table, chosen)
    if chosen["capacity_token_cycles"] < 1:
        yield (
            f"the cache holds {chosen['capacity_token_cycles']:.2f} of what one token touches: "
            "a global LRU never hits there"
        )
    if chosen["link_utilisation"] > 0.9:
        yield f"the link is busy {chosen['link_utilisation']:.0%} of the time: copies made ahead delay what is needed"
    if same["no prefetch"] < chosen["tpot_ms"]:
        yield f"prefetch is slower than none: {chosen['tpot_ms']:.2f} ms against {same['no prefetch']:.2f} ms per token"
    if same["host compute"] < chosen["tpot_ms"]:
        yield (
            f"computing misses on the host is faster: {same['host compute']:.2f} ms against {chosen['tpot_ms']:.2f} ms"
        )
    if bench.work.is_teacher_forced:
        yield "the trace holds prompts only: they are replayed token by token, as if generated (teacher-forced)"
    if bench.reader.provenance.kind == "synthetic":
        yield "the routing is synthetic: no number here is about a model"


def _summary(bench: Bench, table: pd.DataFrame, warnings: list[str]) -> str:
    lines = [
        f"# {bench.reader.card.name} on {bench.hardware.name} (simulated, {bench.hardware.kind})",
        "",
    ]
    lines += [
        _said(bench),
        "",
        "| way | policy | predictor | capacity | hits | late | ms per token | bound |",
        "|" + "---|" * 8,
    ]
    for row in table[table.way != "curve"].to_dict("records"):
        bound = "no bound" if math.isnan(row["tpot_bound_ms"]) else f"{row['tpot_bound_ms']:.2f}"
        marked = f"{row['predictor']} ({row['mark']})" if row["mark"] else row["predictor"]
        lines.append(
            f"| {row['way']} | {row['policy']} | {marked} | {row['capacity']} | {row['hit_rate']:.3f} | "
            f"{row['late_hit_rate']:.3f} | {row['tpot_ms']:.2f} | {bound} |"
        )
    return "\n".join([*lines, "", *(f"* {text}" for text in warnings), ""])


def _said(bench: Bench) -> str:
    work = bench.work
    return (
        f"{work.n_steps} steps, {int(work.decode_S.sum())} generated tokens, semantics {bench.simulator.semantics}, "
        f"batch {bench.simulator.batch}; sizes of {bench.card.name} ({bench.card.expert_precision}); "
        f"all resident {bench.full_ns / 1e6:.2f} ms per token"
    )


SHOWN = (
    "hit_rate",
    "late_hit_rate",
    "tpot_ms",
    "slowdown",
    "memory_savings",
    "link_utilisation",
    "stall_fraction",
)


def _print(bench: Bench, table: pd.DataFrame) -> None:
    title = f"{bench.reader.card.name} on {bench.hardware.name}, simulated ({bench.hardware.kind}); {_said(bench)}"
    shown = Table(title=Text(title), title_justify="left")
    for name in ("way", "policy", "predictor", "capacity", *SHOWN):
        shown.add_column(name)
    for row in table[table.way != "curve"].to_dict("records"):
        marked = f"{row['predictor']} ({row['mark']})" if row["mark"] else str(row["predictor"])
        cells = [str(row["way"]), str(row["policy"]), marked, str(row["capacity"])]
        shown.add_row(*map(Text, cells), *(f"{row[name]:.3f}" for name in SHOWN))
    Console(width=max(160, Console().width)).print(shown)
