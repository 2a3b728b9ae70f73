"""One layer's recency stack as ranks, and the loop over its events: what `stacks.LruStacks` is made of.

It knows no trace, no clock and no bytes; see `stacks` for what an event is. T events, L layers, K choices, E experts,
C classes, D distances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.sim.policy import UNCOUNTED

LANES = 8  # members moved in one sweep over the ranks: each takes a vector register
UNROLLED = (4, 6, 8)  # choices of an event; each takes a second to compile, once per machine
LINE = 64  # bytes; sweeps over whole lines need no remainder


class Recency(NamedTuple):
    """One layer's stack, as every expert's rank in it: an access is a comparison and an addition over all ranks.

    The experts of rank below `n_seen` have been used. They are also listed in the order of their first use, so that a
    part of a trace can be put behind what it did not see.
    """

    hist_CD: NDArray[np.int64]
    rank_E: NDArray[Any]
    n_seen: NDArray[np.int64]  # one number, in an array because it changes
    first_E: NDArray[np.uint16]
    class_E: NDArray[np.uint8]
    before_E: NDArray[np.int32]  # how many had been used before that event


def on_lines(ranks: NDArray[Any]) -> NDArray[Any]:
    """A copy whose rows are whole lines of memory: no vector lies across two, and no two threads write to one."""
    room = np.empty(ranks.nbytes + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    copy = room[begin : begin + ranks.nbytes].view(ranks.dtype).reshape(ranks.shape)
    copy[:] = ranks
    return copy


@njit(cache=True, nogil=True, **UNCOUNTED)
def replay_lru(ids_TLK, of_K, layers, class_T, nobody, stacks, lane_I):  # type: ignore[no-untyped-def]
    """The first row in which an event names an expert twice, or -1.

    `of_K` has one number per choice, or none: how many there are is known when this is compiled, and loops over them
    are unrolled. With that, flat arrays and unsigned indices (others are checked for their sign) it is twice as fast.
    """
    top_k = len(of_K) if len(of_K) else ids_TLK.shape[2]
    ids_A, rank_X, hist_X = (
        ids_TLK.reshape(-1),
        stacks.rank_E.reshape(-1),
        stacks.hist_CD.reshape(-1),
    )
    n_classes, n_distances = stacks.hist_CD.shape[1:]
    n_seen, width = stacks.n_seen, stacks.rank_E.shape[1]
    for t in range(ids_TLK.shape[0]):
        for layer in range(layers[0], layers[1]):
            begin = np.uint64((t * ids_TLK.shape[1] + layer - layers[2]) * top_k)
            base, known = np.uint64(layer * width), np.uint64(n_seen[layer, 0])
            of_row = np.uint64((layer * n_classes + class_T[t]) * n_distances)
            for k in range(top_k):
                expert = ids_A[begin + np.uint64(k)]
                if expert == nobody:
                    continue
                rank = np.uint64(rank_X[base + np.uint64(expert)])
                if rank < known:
                    hist_X[of_row + rank] += 1
                else:
                    hist_X[of_row + np.uint64(n_distances - 1)] += 1
                    _log(stacks, layer, expert, class_T[t], known)
            for first in range(0, top_k, LANES):
                _move_to_front(
                    ids_A,
                    begin + np.uint64(first),
                    top_k - first,
                    nobody,
                    rank_X,
                    base,
                    width,
                    lane_I,
                )
            if not _is_in_front(ids_A, begin, top_k, nobody, rank_X, base):
                return t
    return -1


@njit(**UNCOUNTED)
def _log(stacks, layer, expert, row_class, before):  # type: ignore[no-untyped-def]
    at = stacks.n_seen[layer, 0]
    stacks.first_E[layer, at], stacks.class_E[layer, at] = expert, row_class
    stacks.before_E[layer, at] = before
    stacks.n_seen[layer, 0] += 1


@njit(inline="always")
def _move_to_front(ids_A, begin, n_left, nobody, rank_X, base, width, lane_I):  # type: ignore[no-untyped-def]
    """In one sweep: everyone moves down by the number of members that stood below."""
    of = lane_I.dtype.type  # a byte stays a byte: the sweep is as few vectors as it can be
    for i in range(LANES):
        lane_I[i] = of(0)
        if i < n_left:
            expert = ids_A[begin + np.uint64(i)]
            if expert != nobody:
                lane_I[i] = rank_X[base + np.uint64(expert)]
    a, b, c, d = lane_I[0], lane_I[1], lane_I[2], lane_I[3]
    e, f, g, h = lane_I[4], lane_I[5], lane_I[6], lane_I[7]
    for i in range(width):
        x = base + np.uint64(i)
        rank = rank_X[x]
        low = of(of(rank < a) + of(rank < b) + of(rank < c) + of(rank < d))
        high = of(of(rank < e) + of(rank < f) + of(rank < g) + of(rank < h))
        rank_X[x] = of(rank + of(low + high))
    front = 0
    for k in range(min(n_left, LANES) - 1, -1, -1):
        expert = ids_A[begin + np.uint64(k)]
        if expert != nobody:
            rank_X[base + np.uint64(expert)] = front
            front += 1


@njit(inline="always")
def _is_in_front(ids_A, begin, top_k, nobody, rank_X, base):  # type: ignore[no-untyped-def]
    """Are the members now first, in their order? They are not where one is named twice."""
    front, is_right = 0, True
    for k in range(top_k - 1, -1, -1):
        expert = ids_A[begin + np.uint64(k)]
        if expert != nobody:
            is_right &= rank_X[base + np.uint64(expert)] == front
            front += 1
    return is_right


@njit(cache=True, nogil=True)
def append(stack, later, n_experts):  # type: ignore[no-untyped-def]
    """The parallel reuse distances of PARDA (Niu et al. 2012), where members of one event do not see each other."""
    never_before, known = stack.hist_CD.shape[1] - 1, stack.n_seen[0]
    stack.hist_CD[:] += later.hist_CD
    new_before = np.zeros(
        later.n_seen[0] + 1, np.int64
    )  # of the first i experts of `later`, those new here
    for i in range(later.n_seen[0]):
        expert, row_class, before = later.first_E[i], later.class_E[i], later.before_E[i]
        rank = stack.rank_E[expert]
        new_before[i + 1] = new_before[i] + (rank >= known)
        if rank >= known:
            at = stack.n_seen[0]
            stack.first_E[at], stack.class_E[at] = expert, row_class
            stack.before_E[at] = known + new_before[before]
            stack.n_seen[0] += 1
            continue
        distance = rank + before
        for j in range(before):
            distance -= stack.rank_E[later.first_E[j]] < rank
        stack.hist_CD[row_class, never_before] -= 1
        stack.hist_CD[row_class, distance] += 1
    put_in_front(stack.rank_E, later.rank_E, later.n_seen[0], n_experts)


@njit(cache=True, nogil=True)
def put_in_front(rank_E, later_E, n_later, n_experts):  # type: ignore[no-untyped-def]
    """Whoever was used later, in that order, then the others in theirs."""
    in_order_E = np.empty(n_experts, np.int64)
    for expert in range(n_experts):
        in_order_E[rank_E[expert]] = expert
    place = n_later
    for expert in in_order_E:
        if later_E[expert] < n_later:
            rank_E[expert] = later_E[expert]
        else:
            rank_E[expert] = place
            place += 1
