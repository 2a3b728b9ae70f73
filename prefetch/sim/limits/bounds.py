"""What no policy and no predictor can be under, for fixed routing and transfers only.

Fewest loads: Belady with bypass at capacity plus staging, or a relaxation of it. Time: neither less than computing
everything, nor than those loads on a link that is never idle, whose copies have no latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.engines.machine import WAIT, Machine
from prefetch.sim.engines.pool import MISS, OVERSHOOT
from prefetch.sim.engines.run import replay
from prefetch.sim.engines.start import groups_of
from prefetch.sim.limits.relaxed import Fewest, fewest
from prefetch.sim.policies.belady import Belady
from prefetch.sim.tables.cell import Cell
from prefetch.sim.workload import Workload, counts_of

NONE = "no bound: "


@dataclass(frozen=True)
class Bound:
    """Nanoseconds per generated token, and the share of hits without guesses; NaN where there is none."""

    tpot_ns: float
    hit_rate: float
    name: str  # how it was found, or why there is none


def compute_S(work: Workload, machine: Machine) -> NDArray[np.int64]:
    """Of every step, with every expert resident: what stands before the experts, and the experts in turn."""
    took_S = np.zeros(work.n_steps, np.int64)
    costs = machine.before_S, machine.weight_ns_L, machine.token_ns_L
    _compute(work.start_V, work.tokens_A, *costs, took_S)
    return took_S


@njit(cache=True, nogil=True)
def _compute(start_V, tokens_A, before_S, weight_ns_L, token_ns_L, took_S):  # type: ignore[no-untyped-def]
    n_layers = len(weight_ns_L)
    for v in range(len(start_V) - 1):
        step, layer = v // n_layers, v % n_layers
        if start_V[v + 1] > start_V[v]:
            took_S[step] += before_S[step]
        for a in range(start_V[v], start_V[v + 1]):
            took_S[step] += max(weight_ns_L[layer], token_ns_L[layer] * np.int64(tokens_A[a]))


def layers_of(work: Workload) -> NDArray[np.int64]:
    """The layer of every access."""
    layer_A: NDArray[np.int64] = np.repeat(
        np.arange(len(work.start_V) - 1) % work.card.n_layers, np.diff(work.start_V)
    )
    return layer_A


def bound_of(cell: Cell, work: Workload, latency_ns: int) -> Bound:
    """Of the cells with these caches, this start and this way of missing, whatever their policy."""
    tokens, rooms = int(work.decode_S.sum()), cell.budget.room_G
    if reason := _without(cell, work):
        return Bound(np.nan, np.nan, f"{NONE}{reason}")
    hit_rate, is_even = np.nan, _is_even(cell)
    if is_even:  # whoever loads the fewest units has the most hits
        counted = int(np.diff(work.start_V[:: work.card.n_layers])[work.is_decode_S].sum())
        hit_rate = 1 - _fewest(cell, work, rooms).missed / max(1, counted)
    if cell.machine.miss_way != WAIT or cell.streams:
        why = "layers are streamed" if cell.streams else "misses are not only copied"
        return Bound(np.nan, hit_rate, f"{NONE}{why}")
    is_exact = is_even and bool(work.is_decode_S.all())
    name = "optimum" if is_exact else "relaxation"
    return Bound(least_ns(cell, work, latency_ns) / tokens, hit_rate, name)


def least_ns(cell: Cell, work: Workload, latency_ns: int) -> int:
    """Of all steps that generate; where prompts come between, what those have brought costs nothing."""
    machine, budget, size_L = cell.machine, cell.budget, np.array(cell.budget.size_L)
    group_L = groups_of(len(size_L), len(budget.room_G))
    beside = machine.staging + machine.landing
    rooms = [
        room + beside * int(size_L[group_L == group].max())
        for group, room in enumerate(budget.room_G)
    ]
    costs = list(zip((machine.whole_ns_L - latency_ns).tolist(), size_L.tolist(), strict=True))
    cheapest = [  # nanoseconds of so many units
        min((costs[layer] for layer in np.flatnonzero(group_L == g)), key=lambda c: c[0] / c[1])
        for g in range(len(rooms))
    ]
    units_G = _fewest(cell, work, rooms).units_G.tolist()
    copying = sum(n * ns // size for n, (ns, size) in zip(units_G, cheapest, strict=True))
    return max(int(compute_S(work, machine)[work.is_decode_S].sum()), copying)


def _without(cell: Cell, work: Workload) -> str:
    """Why there is no bound at all."""
    if not work.is_decode_S.any():
        return "no token is generated"
    largest = int(np.diff(work.start_V).max(initial=0))
    if cell.semantics == OVERSHOOT and largest > min(cell.budget.slots_G):
        return "an event larger than its cache stays whole until the next"
    return ""


def _is_even(cell: Cell) -> bool:
    """Are the experts of each cache of one size?"""
    budget = cell.budget
    return len(budget.room_G) == len(budget.size_L) or len(set(budget.size_L)) == 1


def _fewest(cell: Cell, work: Workload, rooms: Sequence[int]) -> Fewest:
    """By the compiled optimum where that is exact; else by the relaxation."""
    size_L, warm = cell.budget.size_L, cell.wished
    if not _is_even(cell) or not work.is_decode_S.all():
        return fewest(work, rooms, size_L, warm, ~work.is_decode_S)
    outcome_A = replay(work, Belady(), rooms, size_L, warm=warm)
    misses_L = counts_of(outcome_A, MISS, work.start_V).reshape(-1, len(size_L)).sum(axis=0)
    units_G, group_L = np.zeros(len(rooms), np.int64), groups_of(len(size_L), len(rooms))
    np.add.at(units_G, group_L, misses_L * np.array(size_L, np.int64))
    return Fewest(units_G, int(misses_L.sum()))
