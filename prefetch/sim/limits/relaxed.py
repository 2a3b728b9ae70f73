"""The fewest units that any policy loads, where the optimum of whole experts is not known.

Two things are relaxed. An expert may be kept in part: then whoever is needed last of all leaves, whatever its size, as
in Belady (1966) for pages of one unit. And what the steps that are left out (prompts) bring costs nothing: after them
everybody is there who is wanted. It knows no clock. V events, L layers, E experts, G caches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.engines.start import groups_of, taken_of
from prefetch.sim.workload import NEVER, Workload, next_uses

LAST = int(NEVER)


class Fewest(NamedTuple):
    units_G: NDArray[np.int64]  # that are loaded into every cache
    missed: int  # accesses that do not find all of their expert


def fewest(
    work: Workload,
    room_G: Sequence[int],
    size_L: Sequence[int],
    warm: NDArray[np.int64],
    is_free_S: NDArray[np.bool_],
) -> Fewest:
    """`warm`: entries that are there from the start, as far as there is room."""
    n_layers, n_experts = work.card.n_layers, work.card.n_experts
    group_L, sizes_L = groups_of(n_layers, len(room_G)), np.array(size_L, np.int64)
    held_LE, units_G, missed = np.zeros((n_layers, n_experts), np.int64), [], 0
    for entry in taken_of(warm, group_L, sizes_L, room_G, n_experts):
        held_LE.flat[entry] = sizes_L[entry // n_experts]
    next_A, first_LE = next_uses(work)
    for group, room in enumerate(room_G):
        events = (work.ids_A, work.start_V, next_A, is_free_S)
        is_own_L, coming_LE = group_L == group, first_LE.copy()
        units, own = _fewest(*events, coming_LE, held_LE, sizes_L, is_own_L, room)
        units_G.append(units)
        missed += own
    return Fewest(np.array(units_G, np.int64), missed)


@njit(cache=True, nogil=True)
def _fewest(ids_A, start_V, next_A, is_free_S, coming_LE, held_LE, size_L, is_own_L, room):  # type: ignore[no-untyped-def]
    (n_layers, n_experts), units, missed, was_free = coming_LE.shape, 0, 0, False
    heap = [(np.int64(0), np.int64(0))]
    heap.clear()
    held = _gather(heap, coming_LE, held_LE, is_own_L)
    for event in range(len(start_V) - 1):
        layer = event % n_layers
        if not is_own_L[layer]:
            continue
        if not is_free_S[event // n_layers] and was_free:
            for own in range(n_layers):
                if is_own_L[own]:
                    held_LE[own] = size_L[own]
            heap.clear()
            held = _gather(heap, coming_LE, held_LE, is_own_L)
            held = _shrink(heap, coming_LE, held_LE, held, room)
        was_free = is_free_S[event // n_layers]
        for a in range(start_V[event], start_V[event + 1]):
            expert, coming, size = ids_A[a], next_A[a], size_L[layer]
            coming_LE[layer, expert] = coming
            if was_free:
                continue
            missing = size - held_LE[layer, expert]
            units, missed, held = units + missing, missed + (missing > 0), held + missing
            held_LE[layer, expert] = size
            heapq.heappush(heap, (-coming, np.int64(layer * n_experts + expert)))
        if not was_free:
            held = _shrink(heap, coming_LE, held_LE, held, room)
    return units, missed


@njit(cache=True)
def _gather(heap, coming_LE, held_LE, is_own_L):  # type: ignore[no-untyped-def]
    """Whoever is there, by their next use; how much it is together."""
    held = np.int64(0)
    for layer in range(len(held_LE)):
        for expert in range(held_LE.shape[1]):
            if is_own_L[layer] and held_LE[layer, expert] > 0:
                held += held_LE[layer, expert]
                entry = np.int64(layer * held_LE.shape[1] + expert)
                heapq.heappush(heap, (-coming_LE[layer, expert], entry))
    return held


@njit(cache=True)
def _shrink(heap, coming_LE, held_LE, held, room):  # type: ignore[no-untyped-def]
    """Until there is no more than the room; the last to leave may leave in part."""
    n_experts = held_LE.shape[1]
    while held > room:
        coming, entry = heapq.heappop(heap)
        layer, expert = entry // n_experts, entry % n_experts
        if coming_LE[layer, expert] != -coming:
            continue  # it was used since
        cut = min(held_LE[layer, expert], held - room)
        held_LE[layer, expert] -= cut
        held -= cut
        if held_LE[layer, expert] > 0:
            heapq.heappush(heap, (coming, entry))
    return held
