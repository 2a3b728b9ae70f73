"""What a table of cells says in numbers and words: the headline, the warnings, the summary that a person reads.

It runs nothing: every number is in the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.sim.memory import spoken
from prefetch.sim.tables.cell import CANNOT_RUN

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench

CHOSEN, ALONE, OPTIMUM, CURVE = "chosen", "no prefetch", "optimum", "curve"
SLOWDOWNS = (0.05, 0.25, 0.5, 1.0)
HEADLINE = (
    "hit_rate", "late_hit_rate", "stall_fraction", "tpot_ms", "tpot_bound_ms", "memory_savings", "bytes_per_token",
    "wasted_prefetch_bytes_per_token", "link_utilisation", "gap_closed", "capacity_token_cycles", "slowdown",
    "ttft_ms", "tokens_per_s",
)  # fmt: skip
SHOWN = (
    "hit_rate", "late_hit_rate", "tpot_ms", "slowdown", "memory_savings", "link_utilisation", "stall_fraction",
)  # fmt: skip
NOTHING, FEW_NAMES = "-", 3
MUCH_LARGER = 1.1  # times the experts
SATURATED = 0.9  # of the time that the link is busy


def gap_closed(table: pd.DataFrame) -> pd.Series:
    """Of the gap in hit rate between LRU and what no policy exceeds at the same capacity."""
    by = table.drop_duplicates(["capacity", "way"]).set_index(["capacity", "way"])
    closed = []
    for row in table.to_dict("records"):
        low = by.hit_rate.get((row["capacity"], "lru"), np.nan)
        high = by.hit_rate_bound.get((row["capacity"], OPTIMUM), np.nan)
        closed.append((row["hit_rate"] - low) / (high - low) if high > low else np.nan)
    return pd.Series(closed, table.index)


def chosen_row(bench: Bench, table: pd.DataFrame) -> pd.Series:
    """The cell that the root names; of a grid that does not hold it, the first."""
    cells = table[table.way == CHOSEN]
    for name, value in bench.root.items():
        cells = cells[cells[name] == value] if (cells[name] == value).any() else cells
    return cells.iloc[0]


def headline(table: pd.DataFrame, chosen: pd.Series, needed: pd.DataFrame) -> dict[str, float]:
    metrics = {name: float(chosen[name]) for name in HEADLINE}
    static_ms = _beside(table, chosen)["static split by layer"]
    metrics["speedup_over_static_split"] = static_ms / metrics["tpot_ms"]
    metrics["break_even_recall"] = break_even_of(needed)
    curve = table[table.way == CURVE]
    for most in SLOWDOWNS:
        fitting = curve[curve.slowdown <= 1 + most].memory_savings
        least = 0.0 if curve.slowdown.notna().any() else math.nan
        metrics[f"memory_savings_at_{most:.0%}".replace("%", "pct")] = (
            float(fitting.max()) if len(fitting) else least
        )
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def break_even_of(needed: pd.DataFrame) -> float:
    """On the link as it is; NaN where no recall suffices, or nobody asked."""
    if needed.empty:
        return math.nan
    return float(needed[needed.bandwidth_factor == 1].break_even_recall.iloc[0])


def _beside(table: pd.DataFrame, chosen: pd.Series) -> dict[str, float]:
    """Milliseconds per token of the ways beside a cell: at its capacity, without guesses also with its policy."""
    same = table[table.capacity == chosen["capacity"]]
    ways = {str(row.way): float(row.tpot_ms) for row in same[same.way != CHOSEN].itertuples()}
    return ways | {ALONE: float(_alone(table, chosen)["tpot_ms"])}


def _alone(table: pd.DataFrame, chosen: pd.Series) -> pd.Series:
    """Without guesses, at the capacity of a cell and with its policy."""
    same = table[(table.capacity == chosen["capacity"]) & (table.policy == chosen["policy"])]
    return same[(same.predictor == "none") & same.way.isin([CHOSEN, ALONE])].iloc[0]


def warnings(bench: Bench, table: pd.DataFrame, chosen: pd.Series) -> Iterator[str]:
    """Where a result would mislead."""
    same, tpot_ms = _beside(table, chosen), float(chosen["tpot_ms"])
    if chosen["capacity_token_cycles"] < 1:
        so = (
            "a global LRU hits next to nothing there"
            if bench.simulator.scope == "global"
            else "in some layers what a token needs goes through it in parts"
        )
        yield f"the cache holds {chosen['capacity_token_cycles']:.2f} of what one token touches: {so}"
    if chosen["link_utilisation"] > SATURATED:
        delay = "would delay" if chosen["predictor"] == "none" else "delay"
        yield (
            f"the link is busy {chosen['link_utilisation']:.0%} of the time: copies made ahead {delay} what is needed"
        )
    yield from _prefetch_pays_not(table, chosen)
    yield from _larger(table, chosen)
    if same["host compute"] < tpot_ms:
        yield (
            f"computing misses on the host is faster: {_ms(same['host compute'])} ms against {_ms(tpot_ms)} ms"
        )
    if chosen["overshoot_bytes"] > 0 and bench.cfg.memory is not None:
        yield (
            f"room is made only after use: {spoken(int(chosen['overshoot_bytes']))} more than memory="
            f"{bench.cfg.memory} are held at times"
        )
    yield from _refusals(table)
    if bench.work.is_teacher_forced:
        yield "prompts are replayed token by token, as if they had been generated (teacher-forced)"
    if bench.reader.provenance.kind == "synthetic":
        yield "the routing is synthetic: no number here is about a model"


def _prefetch_pays_not(table: pd.DataFrame, chosen: pd.Series) -> Iterator[str]:
    """Of a device's times nothing is said that is no more than its runs were apart."""
    alone, with_it = _alone(table, chosen), _ran_in(chosen)
    if chosen["predictor"] == "none":
        return
    without = _ran_in(alone)
    against = f"{_spoken(chosen)} against {_spoken(alone)} per token"
    if with_it is None or without is None:
        if alone["tpot_ms"] < chosen["tpot_ms"]:
            yield f"prefetch is slower than none: {against}"
    elif with_it[0] <= without[1] and without[0] <= with_it[1]:
        yield f"prefetch and none: no difference beyond the spread of their runs: {against}"
    elif alone["tpot_ms"] < chosen["tpot_ms"]:
        is_one = min(chosen["runs"], alone["runs"]) < 2
        unknown = (
            "; one run each, whose spread nobody knows: simulator.rounds=3 tells" if is_one else ""
        )
        yield f"prefetch is slower than none: {against}{unknown}"


def _larger(table: pd.DataFrame, chosen: pd.Series) -> Iterator[str]:
    """At equal memory whoever guesses nothing holds more: in a column of equal capacities nobody would see it."""
    rows = table[runs(table) & (table.capacity == chosen["capacity"]) & (table.way != CURVE)]
    most = rows.capacity_experts.max()
    if most > MUCH_LARGER * chosen["capacity_experts"]:
        names = ", ".join(rows[rows.capacity_experts == most].way)
        yield (
            f"{chosen['predictor']} takes memory too: {names} have it for experts, {most:.0f} in all, "
            f"the chosen cache holds {chosen['capacity_experts']:.0f}"
        )


def _ran_in(row: pd.Series) -> tuple[float, float] | None:
    """Milliseconds per token of a device's fastest and slowest run; None of simulated times."""
    if math.isnan(row.get("runs", math.nan)):
        return None
    return float(row["tpot_ms_least_run"]), float(row["tpot_ms_most_run"])


def _spoken(row: pd.Series) -> str:
    ran_in = _ran_in(row)
    spread = "" if ran_in is None or row["runs"] < 2 else f" [{_ms(ran_in[0])}..{_ms(ran_in[1])}]"
    return f"{_ms(row['tpot_ms'])}{spread} ms"


def _ms(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _digits(ms: float) -> int:
    """Of a small model every time is below a millisecond, and two digits tell none from another."""
    return 4 if ms < 1 else 2


def _refusals(table: pd.DataFrame) -> Iterator[str]:
    """Rows that have no numbers, by the reason."""
    refused = table[~runs(table)]
    for mark, rows in refused.groupby("mark", sort=False):
        named = [f"{r.way} {r.policy} {r.predictor} {r.capacity}" for r in rows.itertuples()]
        rest = f" and {len(named) - FEW_NAMES} more" if len(named) > FEW_NAMES else ""
        yield f"{', '.join(named[:FEW_NAMES])}{rest} {mark}"


def runs(table: pd.DataFrame) -> pd.Series:
    """Which rows have numbers."""
    return ~table["mark"].str.startswith(CANNOT_RUN)


def summary(bench: Bench, table: pd.DataFrame, needed: pd.DataFrame, told: list[str]) -> str:
    lines = [
        f"# {bench.reader.card.name} on {bench.where} ({bench.times})",
        "",
        said(bench),
        "",
        "| way | policy | predictor | capacity | hits | late | ms per token | bound |",
        "|" + "---|" * 8,
    ]
    for row in table[table.way != CURVE].to_dict("records"):
        bound = _number(row["tpot_bound_ms"], _digits(row["tpot_bound_ms"]))
        bound = "no bound" if bound == NOTHING and row["bound"] else bound
        hits, late = (_number(row[name]) for name in ("hit_rate", "late_hit_rate"))
        lines.append(
            f"| {row['way']} | {row['policy']} | {_marked(row)} | {row['capacity']} | {hits} | {late} | "
            f"{_number(row['tpot_ms'], _digits(row['tpot_ms']))} | {bound} |"
        )
    lines += ["", *_recall_words(needed)]
    return "\n".join([*lines, *(f"* {text}" for text in told), ""])


def _recall_words(needed: pd.DataFrame) -> list[str]:
    """How good guesses must be, at every bandwidth that was tried."""
    if needed.empty:
        return []
    one, words = needed.iloc[0], list[str]()
    for factor, rows in needed.groupby("bandwidth_factor"):
        least, ms = rows.break_even_recall.iloc[0], rows.sort_values("recall").tpot_ms.iloc[-1]
        link = "this link" if factor == 1 else f"{factor:g} times its bandwidth"
        pays = f"from a recall of {least:.2f} on" if np.isfinite(least) else _best_words(rows)
        words.append(
            f"{link}: {pays} ({_ms(rows.no_prefetch_tpot_ms.iloc[0])} ms without, {_ms(ms)} ms with true ones)"
        )
    steps = "" if one.steps == one.of_steps else f", the first {one.steps} of {one.of_steps} steps"
    return [
        f"**Break-even recall** (guesses {one.horizon} layers ahead, policy {one.policy}, cache {one.capacity}"
        f"{steps}): copying ahead pays with {'; '.join(words)}.",
        "",
    ]


def _best_words(rows: pd.DataFrame) -> str:
    """Where true guesses do not pay: more guesses can be worse than fewer."""
    best = rows.sort_values("tpot_ms").iloc[0]
    if best.tpot_ms < best.no_prefetch_tpot_ms:
        return f"not from any recall on, though at {best.recall:.1f} ({_ms(best.tpot_ms)} ms)"
    return "at no recall"


def source(bench: Bench) -> str:
    """What a figure says of where it comes from."""
    return (
        f"{bench.reader.card.name} ({bench.reader.provenance.kind} routing), sizes of {bench.card.name}, on "
        f"{bench.where}: {bench.times}"
    )


def said(bench: Bench) -> str:
    work, full_ms = bench.work, bench.full_ns / 1e6
    resident = "not measured" if math.isnan(full_ms) else f"{_ms(full_ms)} ms per token"
    return (
        f"{work.n_steps} steps, {int(work.decode_S.sum())} generated tokens, semantics {bench.simulator.semantics}, "
        f"batch {bench.simulator.batch}; sizes of {bench.card.name} ({bench.card.expert_precision}); "
        f"all resident {resident}"
    )


def show(bench: Bench, table: pd.DataFrame) -> None:
    title = f"{bench.reader.card.name} on {bench.where}, {bench.times}; {said(bench)}"
    shown = Table(title=Text(title), title_justify="left")
    for name in ("way", "policy", "predictor", "capacity", *SHOWN):
        shown.add_column(name)
    for row in table[table.way != CURVE].to_dict("records"):
        cells = [str(row["way"]), str(row["policy"]), _marked(row), str(row["capacity"])]
        shown.add_row(*map(Text, cells), *(_number(row[name]) for name in SHOWN))
    Console(width=max(160, Console().width)).print(shown)


def _number(value: float, places: int = 3) -> str:
    return NOTHING if math.isnan(value) else f"{value:.{places}f}"


def _marked(row: Any) -> str:
    """The predictor, by whose guesses the policy evicts where those are others, and the mark in a word or two."""
    by = row["evicts_by"].partition(",")[0]
    notes = [f"evicts by {by}"] * (by not in ("", row["predictor"]))
    mark = str(row["mark"])
    notes += [CANNOT_RUN.strip(": ") if mark.startswith(CANNOT_RUN) else mark] * (mark != "")
    return f"{row['predictor']} ({', '.join(notes)})" if notes else str(row["predictor"])
