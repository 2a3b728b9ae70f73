"""Exact hits of an LRU cache and of an optimal one, at every capacity, from one pass over the events of each layer.

It knows no trace, no clock and no bytes: experts are integers; every event has a class that its counts are kept under.
An event is one token at one layer: the set of its K experts, needed at the same time. All of them are looked up in what
stands before the event; then they move up in row order, later = more recent. This holds for capacities >= K.
T events, L layers, K choices, E experts, C classes, D distances: hits at a capacity are the counts of all distances
below it, and the last distance, E, stands for "never before".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.sim.limits import eight
from prefetch.sim.limits.recency import LANES, LINE, UNROLLED, Recency, append, on_lines, replay_lru

NEVER = np.int32(2**31 - 1)  # the next use of an expert that no later event needs
MOST_EVENTS = int(NEVER)


class LruStacks:
    """How deep in its layer's recency stack every event finds its members (Mattson et al. 1970)."""

    def __init__(self, n_layers: int, n_experts: int, top_k: int, n_classes: int = 2) -> None:
        ranks = np.arange(-(-n_experts // LINE) * LINE)
        ranks = ranks.astype(np.uint8 if len(ranks) <= 256 else np.uint16)
        # Room for one event more: an expert named twice is noticed when the event is over.
        log = (n_layers, n_experts + top_k)
        self.n_experts = n_experts
        self.hist_LCD = np.zeros((n_layers, n_classes, n_experts + 1), np.int64)
        self._state = Recency(
            self.hist_LCD,
            on_lines(np.tile(ranks, (n_layers, 1))),
            np.zeros((n_layers, 1), np.int64),
            np.zeros(log, np.uint16),
            np.zeros(log, np.uint8),
            np.zeros(log, np.int32),
        )

    def replay(
        self, layer: int, ids_TK: NDArray[Any], class_T: NDArray[np.uint8], nobody: int
    ) -> None:
        """The next events of a layer; ids equal to `nobody` name no expert. Layers share nothing."""
        self._replay(ids_TK[:, None], (layer, layer + 1, layer), class_T, nobody)

    def replay_layers(
        self, layers: range, ids_TLK: NDArray[Any], class_T: NDArray[np.uint8], nobody: int
    ) -> None:
        """The same for some layers, from rows that have all of them: nothing need be put in the order of layers."""
        self._replay(ids_TLK, (layers.start, layers.stop, 0), class_T, nobody)

    def _replay(
        self,
        ids_TLK: NDArray[Any],
        layers: tuple[int, int, int],
        class_T: NDArray[np.uint8],
        nobody: int,
    ) -> None:
        """Layers from the first to before the second; that of the first column of ids is the third."""
        top_k = ids_TLK.shape[2]
        of_K = (0,) * top_k if top_k in UNROLLED else ()
        ids_TLK = np.ascontiguousarray(ids_TLK)
        lane_I = np.zeros(LANES, self._state.rank_E.dtype)
        bad = replay_lru(ids_TLK, of_K, layers, class_T, nobody, self._state, lane_I)
        if bad >= 0:
            ids_LK = ids_TLK[bad, layers[0] - layers[2] : layers[1] - layers[2]]
            raise next(
                _not_distinct(row_K)
                for row_K in ids_LK
                if len(named := row_K[row_K != nobody]) != len(np.unique(named))
            )

    def merge(self, later: LruStacks) -> None:
        """`later` replayed what follows here, beginning with empty stacks: its first uses are looked up in these."""
        for layer in range(len(self.hist_LCD)):
            append(self._layer(layer), later._layer(layer), self.n_experts)

    def _layer(self, layer: int) -> Recency:
        return Recency(*(array[layer] for array in self._state))


class _Priority(NamedTuple):
    """One layer's stack, as the next uses of the experts in it.

    Who they are does not matter: the members of an event are those whose next use is now.
    """

    hist_CD: NDArray[np.int64]
    next_D: NDArray[np.int32]
    n_seen: NDArray[np.int64]


class OptimalStacks:
    """The same for the cache with the most hits: it evicts whoever is needed last (Belady 1966).

    Every member of an event is admitted. For one expert per event this is Mattson's priority stack; for K of them the
    content at capacity C is the event and the C - K others that are needed first, which again contains that at C - 1.
    """

    def __init__(self, coming_LE: NDArray[np.int32], n_classes: int = 2) -> None:
        """`coming_LE`: the first event that needs each expert, or NEVER."""
        n_layers, n_experts = coming_LE.shape
        self.hist_LCD = np.zeros((n_layers, n_classes, n_experts + 1), np.int64)
        self._coming_LE = coming_LE.copy()
        self._next_LD = np.full((n_layers, n_experts), NEVER, np.int32)
        self._n_seen_L = np.zeros((n_layers, 1), np.int64)

    def replay(
        self,
        layer: int,
        ids_TK: NDArray[Any],
        class_T: NDArray[np.uint8],
        nobody: int,
        *,
        first_event: int,
        coming_E: NDArray[np.int32],
    ) -> None:
        """The next events of a layer, numbered from `first_event`; `coming_E`: who is needed when after them."""
        next_TK = np.empty(ids_TK.shape, np.int32)
        self._look_ahead(layer, ids_TK, nobody, first_event, coming_E, next_TK)
        stack = _Priority(self.hist_LCD[layer], self._next_LD[layer], self._n_seen_L[layer])
        _replay_optimal(ids_TK, class_T, nobody, first_event, next_TK, stack)

    def replay_eight(
        self,
        first: int,
        ids_LTK: NDArray[Any],
        class_T: NDArray[np.uint8],
        nobody: int,
        *,
        first_event: int,
        coming_LE: NDArray[np.int32],
    ) -> None:
        """The same for up to eight layers from `first` on, in less than half the time: see `fit_eight`."""
        n_layers, n_tokens, top_k = ids_LTK.shape
        layers, n_experts = np.arange(first, first + n_layers), self._next_LD.shape[1]
        next_TKW = np.full((n_tokens, top_k, eight.LAYERS), NEVER, np.int32)
        for w, layer in enumerate(layers):
            out_TK, coming_E = next_TKW[:, :, w], coming_LE[layer]
            self._look_ahead(layer, ids_LTK[w], nobody, first_event, coming_E, out_TK)
        next_TKW[:, :, n_layers:] = next_TKW[:, :, :1]  # a register holds eight
        of_W = np.append(layers, np.full(eight.LAYERS - n_layers, first))
        n_places = -(-n_experts // 8) * 8
        next_DW = np.full((n_places, eight.LAYERS), NEVER, np.int32)
        next_DW[:n_experts] = self._next_LD[of_W].T
        hist_CDW = np.zeros((self.hist_LCD.shape[1], n_places + 1, eight.LAYERS), np.int32)
        eight.replay_eight(next_TKW, class_T, first_event, hist_CDW, next_DW)
        hits_LCD = hist_CDW[:, [*range(n_experts), n_places], :n_layers].transpose(2, 0, 1)
        self.hist_LCD[layers] += hits_LCD
        self._next_LD[layers] = next_DW[:n_experts, :n_layers].T
        self._n_seen_L[layers, 0] += hits_LCD[..., -1].sum(axis=1)

    def _look_ahead(
        self,
        layer: int,
        ids_TK: NDArray[Any],
        nobody: int,
        first_event: int,
        coming_E: NDArray[np.int32],
        next_TK: NDArray[np.int32],
    ) -> None:
        before_E = coming_E.copy()
        bad = _look_ahead(ids_TK, nobody, first_event, before_E, next_TK)
        if bad >= 0:
            raise _not_distinct(ids_TK[bad])
        if not np.array_equal(before_E, self._coming_LE[layer]):
            raise ValueError("these are not the events that the first pass has seen")
        self._coming_LE[layer] = coming_E


def fit_eight(ids_LTK: NDArray[Any], nobody: int) -> bool:
    """Can these events be replayed eight layers at a time: few members, and all of them there?"""
    return ids_LTK.shape[2] <= eight.MOST_MEMBERS and not (ids_LTK == nobody).any()


def first_uses(ids_TK: NDArray[Any], n_experts: int, nobody: int) -> NDArray[np.int32]:
    """The first of these events that needs each expert, numbered from 0, or NEVER."""
    first_E = np.full(n_experts, NEVER, np.int32)
    _mark_first_uses(ids_TK, nobody, first_E)
    return first_E


@njit(cache=True, nogil=True)
def _mark_first_uses(ids_TK, nobody, first_E):  # type: ignore[no-untyped-def]
    for t in range(ids_TK.shape[0] - 1, -1, -1):
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody:
                first_E[ids_TK[t, k]] = t


@njit(cache=True, nogil=True)
def _look_ahead(ids_TK, nobody, first_event, coming_E, next_TK):  # type: ignore[no-untyped-def]
    """Backward: when every member is needed again. The event that names an expert twice, or -1."""
    for t in range(ids_TK.shape[0] - 1, -1, -1):
        event = np.int32(first_event + t)
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody:
                next_TK[t, k] = coming_E[ids_TK[t, k]]
                if next_TK[t, k] == event:
                    return t
                coming_E[ids_TK[t, k]] = event
    return -1


@njit(cache=True, nogil=True)
def _replay_optimal(ids_TK, class_T, nobody, first_event, next_TK, stack):  # type: ignore[no-untyped-def]
    waiting_K = np.empty(ids_TK.shape[1], np.int32)
    member_K = np.empty(ids_TK.shape[1], np.int32)
    for t in range(ids_TK.shape[0]):
        size = 0
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody:
                member_K[size] = next_TK[t, k]
                size += 1
        _percolate(np.int32(first_event + t), class_T[t], member_K, size, waiting_K, stack)


@njit(cache=True, nogil=True)
def _percolate(event, row_class, member_K, size, waiting_K, stack):  # type: ignore[no-untyped-def]
    """The members take the first places; those displaced go down, and at each place the one needed first stays.

    A place is free where the event finds a member. Below the last of them nothing changes.
    """
    hist_CD, next_D, n_seen = stack.hist_CD, stack.next_D, stack.n_seen[0]
    found, waiting = 0, 0
    for d in range(min(size, n_seen)):
        if next_D[d] == event:
            hist_CD[row_class, d] += 1
            found += 1
        else:
            waiting = _wait(waiting_K, waiting, next_D[d])
    for d in range(size):
        next_D[d] = member_K[d]
    d = size
    while found < size and d < n_seen:
        due, soonest = next_D[d], waiting_K[waiting - 1]
        if due == event:
            hist_CD[row_class, d] += 1
            found += 1
            next_D[d] = soonest
            waiting -= 1
        elif due > soonest:
            next_D[d] = soonest
            waiting = _wait(waiting_K, waiting - 1, due)
        d += 1
    hist_CD[row_class, -1] += size - found
    for i in range(waiting):
        next_D[d + i] = waiting_K[waiting - 1 - i]
    if found < size:  # else the line of memory that other layers share is not written
        stack.n_seen[0] = max(n_seen, d + waiting)


@njit(cache=True, nogil=True)
def _wait(waiting_K, waiting, due):  # type: ignore[no-untyped-def]
    """Joins the queue, whose last is needed first."""
    at = waiting
    while at > 0 and waiting_K[at - 1] < due:
        waiting_K[at] = waiting_K[at - 1]
        at -= 1
    waiting_K[at] = due
    return waiting + 1


def _not_distinct(row_K: NDArray[Any]) -> FormatError:
    return FormatError(f"expected the experts of an event to be distinct, got {row_K.tolist()}")
