"""The same routing and guesses by protocols that the field has published, beside ours: what each of them flatters.

None of these is a simulation of a machine: they stand here to be compared, and no other number uses them.

* instant arrival: our caches, but a guessed expert is there as soon as it is guessed.
* guesses beside the cache: an expert that was guessed counts as a hit, and takes nobody's place.
* one after the other: MoE-Beyond's published simulator (arXiv 2508.17137). One LRU over all layers, filled at random,
  that serves the experts of a token one after the other; guesses are put in just before their layer needs them, for
  nothing; the first ten tokens of a request are not counted.
* popularity of what is tested: the most used experts of the very tokens that are scored stay in the cache.

V events, A accesses, W guesses, L layers, E experts, C those that a layer's cache holds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.progress import Progress
from prefetch.sim.engines.machine import Guesses, Machine
from prefetch.sim.engines.pool import EMPTY, HIT
from prefetch.sim.hardware import Hardware, Lane
from prefetch.sim.tables.cell import CHEATS, REFUSALS, Cell
from prefetch.sim.tables.grid import CHOSEN, cell_of
from prefetch.sim.tables.others import most_used_of_each, uses_of

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench
    from prefetch.sim.workload import Workload

log = logging.getLogger(__name__)
OURS, INSTANT, BESIDE = "event by event, on the link", "instant arrival", "guesses beside the cache"
ONE_BY_ONE = "one after the other"
TRAINED, TESTED = "popularity of other requests", "popularity of what is tested"
HONEST = {TESTED: TRAINED}  # every other protocol is compared with ours
NOT_COUNTED = 10  # first tokens of a request
AT_ONCE = 10**15  # bytes per second


def protocols(bench: Bench) -> pd.DataFrame:
    """A row per capacity, predictor and protocol, with the hit rate of the row that it should be compared with."""
    names = ["none", *(name for name in bench.predictors if name != "none")]
    todo = [(capacity, name) for capacity in bench.capacities for name in names]
    rows = list[dict[str, Any]]()
    with Progress("published protocols", len(todo), "cells") as progress:
        for capacity, name in todo:
            try:
                rows += _rows(bench, capacity, name)
            except REFUSALS as reason:  # as a row of the table of cells says; others may run
                log.warning("no published protocols of %s at cache %s: %s", name, capacity, reason)
            progress.advance()
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    by = table.set_index(["capacity", "predictor", "protocol"]).hit_rate
    honest = [HONEST.get(name, TRAINED if name == TRAINED else OURS) for name in table.protocol]
    table["honest_hit_rate"] = [
        by[key] for key in zip(table.capacity, table.predictor, honest, strict=True)
    ]
    table["flattered_points"] = 100 * (table.hit_rate - table.honest_hit_rate)
    return table


def _rows(bench: Bench, capacity: Any, name: str) -> Iterator[dict[str, Any]]:
    alone, cell = (
        cell_of(bench, CHOSEN, "lru", one, capacity, bench.horizons[0]) for one in ("none", name)
    )
    about = {"capacity": str(capacity), "experts": cell.budget.experts, "predictor": name}
    found = dict(_hit_rates(bench, cell, alone))
    if name == "none":
        found |= dict(_static(bench, cell))
    for protocol, hit_rate in found.items():
        mark = CHEATS if protocol == TESTED else cell.names["mark"]
        yield {**about, "protocol": protocol, "mark": mark, "hit_rate": hit_rate}


def _hit_rates(bench: Bench, cell: Cell, alone: Cell) -> Iterator[tuple[str, float]]:
    """Of one cache and one predictor. `alone`: the same cache without guesses."""
    work = bench.work
    is_decode_A = of_steps(work, work.is_decode_S)
    yield OURS, _share(cell.run(work).outcome_A == HIT, is_decode_A)
    if cell.guesses is not None:
        instant = dataclasses.replace(cell, machine=_at_once(bench, cell))
        yield INSTANT, _share(instant.run(work).outcome_A == HIT, is_decode_A)
        is_there_A = alone.run(work).outcome_A == HIT
        yield BESIDE, _share(is_there_A | guessed(work, cell.guesses), is_decode_A)
    hits_A = one_by_one(work, cell.guesses, cell.budget.experts, bench.cfg.seed)
    is_late_A = of_steps(work, after_first(work, bench.trace.position_T, NOT_COUNTED))
    yield ONE_BY_ONE, _share(hits_A, is_decode_A & is_late_A)


def _static(bench: Bench, cell: Cell) -> Iterator[tuple[str, float]]:
    """The most used experts of every layer stay; nothing is ever copied."""
    each = cell.budget.experts // bench.work.card.n_layers
    is_decode_A = of_steps(bench.work, bench.work.is_decode_S)
    for protocol, uses_LE in ((TRAINED, bench.prior.uses_LE), (TESTED, uses_of(bench.trace))):
        yield protocol, _share(stays(bench.work, uses_LE, each), is_decode_A)


def _share(hits_A: NDArray[np.bool_], counted_A: NDArray[np.bool_]) -> float:
    return float(hits_A[counted_A].mean()) if counted_A.any() else float("nan")


def _at_once(bench: Bench, cell: Cell) -> Machine:
    """A link on which no copy takes time; what a guess costs is not asked either."""

    def fast(lane: Lane) -> Lane:
        return dataclasses.replace(lane, host_ns_per_copy=0, bytes_per_s=((0, AT_ONCE),))

    link = bench.hardware.link
    link = dataclasses.replace(
        link, latency_ns=0, pinned=fast(link.pinned), pageable=fast(link.pageable)
    )
    hardware: Hardware = dataclasses.replace(bench.hardware, link=link)
    machine: Machine = bench.machine(bench.simulator.misses, hardware=hardware)
    return machine._replace(landing=cell.machine.landing)


def of_steps(work: Workload, is_S: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[A] what is true of the step of every access."""
    size_V = np.diff(work.start_V)
    is_A: NDArray[np.bool_] = np.repeat(np.repeat(is_S, work.card.n_layers), size_V)
    return is_A


def after_first(work: Workload, position_T: NDArray[Any], n: int) -> NDArray[np.bool_]:
    """[S] does every row of the step stand behind the first `n` of its request?"""
    earliest_S = np.minimum.reduceat(position_T[work.rows_R], work.row_start_S[:-1])
    is_late_S: NDArray[np.bool_] = earliest_S >= n
    return is_late_S


def guessed(work: Workload, guesses: Guesses) -> NDArray[np.bool_]:
    """[A] was it among the guesses about its event?"""
    event_A = np.repeat(np.arange(len(work.start_V) - 1), np.diff(work.start_V))
    found_A = np.zeros(work.n_accesses, np.bool_)
    for ids_V in guesses.ids_VW.T:
        found_A |= ids_V[event_A] == work.ids_A
    return found_A


def stays(work: Workload, uses_LE: NDArray[np.int64], each: int) -> NDArray[np.bool_]:
    """[A] is it one of the `each` most used experts of its layer?"""
    n_layers, n_experts = uses_LE.shape
    stays_LE = np.zeros(n_layers * n_experts, np.bool_)
    stays_LE[most_used_of_each(uses_LE, each)] = True
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % n_layers, np.diff(work.start_V))
    is_A: NDArray[np.bool_] = stays_LE[layer_A * n_experts + work.ids_A]
    return is_A


def one_by_one(work: Workload, guesses: Guesses | None, slots: int, seed: int) -> NDArray[np.bool_]:
    """[A] hits of one LRU over all layers, the first of them drawn; what is guessed is put in as an event begins."""
    n_layers, n_experts = work.card.n_layers, work.card.n_experts
    drawn = np.random.default_rng(seed).permutation(n_layers * n_experts)[:slots]
    lru, hit_A = OrderedDict.fromkeys(drawn.tolist()), np.zeros(work.n_accesses, np.bool_)
    starts, ids = work.start_V.tolist(), work.ids_A.tolist()
    for event in range(len(starts) - 1 if slots else 0):
        first = event % n_layers * n_experts
        if guesses is not None:
            for expert in guesses.ids_VW[event].tolist():
                if expert != EMPTY:
                    _touch(lru, first + expert, slots)
        for access in range(starts[event], starts[event + 1]):
            hit_A[access] = _touch(lru, first + ids[access], slots)
    return hit_A


def _touch(lru: OrderedDict[int, None], entry: int, slots: int) -> bool:
    """It is there afterwards, the most recent; was it before?"""
    was_there = entry in lru
    if not was_there and len(lru) >= slots:
        lru.popitem(last=False)
    lru[entry] = None
    lru.move_to_end(entry)
    return was_there


def in_words(table: pd.DataFrame) -> str:
    """For the summary: the same guesses by every protocol, and by how much it flatters."""
    if table.empty:
        return ""
    if table.hit_rate.isna().all():
        return "\n## By published protocols\n\nThey count generated tokens, of which none was replayed.\n"
    lines = [
        "",
        "## By published protocols",
        "",
        "Hit rates of LRU with the same guesses; `docs/simulator.md` says what each protocol leaves out. None but the "
        "first asks whether copies arrive.",
        "",
        "| cache | predictor | protocol | hits | compared with | points |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        mark = f" ({row['mark']})" if row["mark"] else ""
        lines.append(
            f"| {row['capacity']} | {row['predictor']}{mark} | {row['protocol']} | {row['hit_rate']:.3f} | "
            f"{row['honest_hit_rate']:.3f} | {row['flattered_points']:+.1f} |"
        )
    return "\n".join([*lines, ""])


def show(table: pd.DataFrame) -> None:
    """On the console: a row per cache and predictor, a column per protocol."""
    if table.empty or table.hit_rate.isna().all():
        return
    is_cheat = table["mark"].eq(CHEATS) & table.protocol.ne(TESTED)
    named = table.assign(
        predictor=table.predictor + is_cheat.map({True: f" ({CHEATS})", False: ""})
    )
    wide = named.pivot_table(
        index=["capacity", "predictor"], columns="protocol", values="hit_rate", sort=False
    )
    shown = Table(
        title=Text("Hit rates by published protocols, same guesses"), title_justify="left"
    )
    for name in ("cache", "predictor", *wide.columns):
        shown.add_column(str(name))
    for names, rates in zip(wide.index.tolist(), wide.to_numpy(), strict=True):
        cells = ["-" if np.isnan(rate) else f"{rate:.3f}" for rate in rates]
        shown.add_row(*(Text(str(name)) for name in names), *cells)
    Console(width=max(160, Console().width)).print(shown)
