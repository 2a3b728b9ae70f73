"""How good guesses are, from a predictions folder and the trace that it is about: counts first, rates from them.

Whoever made the guesses (ours, a notebook, another tool), they are scored here, in the same way. Rows of a template
and near copies are kept apart. T tokens, H horizons, L layers, K choices, P width, E experts, R requests, U units
that an interval draws (a request, or all turns of a conversation), X = new text | template | near copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.predict.scored.held_out import HeldOut
from prefetch.trace.predictions import Predictions, PredictionsReader
from prefetch.trace.routing import RoutingTrace, no_expert

CACHE_SHARE = 4  # the stated cache holds one of so many experts of every layer
BINS = 20  # of the reliability curve
READ_ROWS = 1 << 13  # of guesses that are held at once
NEW, TEMPLATE, COPIES = range(3)  # X
# Columns of `layer_HXLM`, of which `unit_HYULM` has the first three; hits are within k and within 2k guesses.
CHOICES, HITS_K, HITS_2K, EVENTS, EXACT, GUESSED_K, FIRST_MISS = range(7)
MISSES, MISSES_K, MISSES_2K, LOADS_K, LOADS_2K = range(7, 12)
COLUMNS, UNIT_COLUMNS = 12, 3


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over the rows that are tested; two can be added, two rates cannot."""

    horizons: tuple[int, ...]
    top_k: int
    n_experts: int
    width: int  # guesses that there could be: of a narrower list nothing is known about more
    split: str  # requests | time | whole
    row_XR: NDArray[np.int64]  # rows of every request that were scored
    layer_HXLM: NDArray[np.int64]
    unit_HYULM: NDArray[np.int32]  # Y = new text | all rows
    rank_HXLP: NDArray[np.int64]  # true choices that stood at this rank
    bin_HBC: NDArray[np.float64]  # of the reliability curve: guesses, sum of scores, right ones
    domain_U: tuple[str, ...] = ()


def count(guesses: PredictionsReader, tested: HeldOut, *, is_foreign: bool = False) -> Counts:
    """Scores the guesses about the rows that are tested. The cache that misses are counted on starts empty and stays
    warm. Lists of foreign guesses may be shorter than the file is wide: their width is that of the longest one."""
    part = tested.part
    card, about = part.card, guesses.card
    if (about.n_experts, about.n_layers) != (card.n_experts, card.n_layers):
        raise FormatError(
            f"{guesses.folder}: guesses about {about.n_layers} layers of {about.n_experts} experts, the trace has "
            f"{card.n_layers} of {card.n_experts}"
        )
    n_horizons = len(about.horizons)
    shape = (n_horizons, 3, card.n_layers)
    units = (n_horizons, 2, tested.n_units, card.n_layers, UNIT_COLUMNS)
    counts = Counts(
        horizons=about.horizons,
        top_k=card.top_k,
        n_experts=card.n_experts,
        width=about.width,
        split=tested.split,
        row_XR=np.zeros((3, len(part.requests)), np.int64),
        layer_HXLM=np.zeros((*shape, COLUMNS), np.int64),
        unit_HYULM=np.zeros(units, np.int32),
        rank_HXLP=np.zeros((*shape, about.width), np.int64),
        bin_HBC=np.zeros((n_horizons, BINS, 3)),
        domain_U=tested.domain_U,
    )
    capacity = card.n_experts // CACHE_SHARE
    stamp_LE = np.full(
        (card.n_layers, card.n_experts), -1, np.int64
    )  # of the last use; -1 = not resident
    clock = np.ones(1, np.int64)
    is_probability, longest = about.score == "probability", 0
    rows = _Aligned(guesses)
    for block, counted_T in part.blocks():
        mine = rows.take(block, counted_T)
        request_T = np.searchsorted(part.requests, block.request_T)
        row_T = np.where(tested.is_copy_R[request_T], COPIES, NEW)
        row_T[tested.shared.rows(block)] = TEMPLATE
        row_T[~counted_T] = -1
        np.add.at(counts.row_XR, (row_T[counted_T], request_T[counted_T]), 1)
        nobody = no_expert(card.n_experts)
        if is_foreign:
            longest = max(longest, int((mine[0] != nobody).sum(axis=3).max(initial=0)))
        _count(
            block.ids_TLK, mine[0], mine[1].astype(np.float32), row_T, tested.unit_R[request_T], nobody,
            np.array(about.horizons), capacity, stamp_LE, clock, is_probability,
            counts.layer_HXLM, counts.unit_HYULM, counts.rank_HXLP, counts.bin_HBC,
        )  # fmt: skip
    rows.end()
    return dataclasses.replace(counts, width=longest) if longest else counts


class _Aligned:
    """Reads guesses in step with the trace's rows, and refuses those that are about other rows."""

    def __init__(self, guesses: PredictionsReader) -> None:
        self._folder, self._blocks = guesses.folder, guesses.batches(max_rows=READ_ROWS)
        self._block: Predictions | None = None
        self._done = 0  # rows of that block
        self._row, self._end = 0, guesses.n_tokens
        self._nobody = no_expert(guesses.card.n_experts)

    def take(
        self, block: RoutingTrace, asked_T: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """About the rows that are asked; of the others, which come before them, nobody is guessed."""
        ids_AHLP, scores_AHLP = self._asked(block.request_T[asked_T], block.position_T[asked_T])
        if asked_T.all():
            return ids_AHLP, scores_AHLP
        shape = (block.n_tokens, *ids_AHLP.shape[1:])
        ids_THLP = np.full(shape, no_expert(block.card.n_experts), ids_AHLP.dtype)
        scores_THLP = np.zeros(shape, scores_AHLP.dtype)
        ids_THLP[asked_T], scores_THLP[asked_T] = ids_AHLP, scores_AHLP
        return ids_THLP, scores_THLP

    def _asked(
        self, request_T: NDArray[np.int32], position_T: NDArray[np.int32]
    ) -> tuple[NDArray[Any], NDArray[np.float16]]:
        pieces = list(self._next(len(request_T)))
        found = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        differs = (found[0] != request_T) | (found[1] != position_T)
        if differs.any():
            t = int(np.flatnonzero(differs)[0])
            raise FormatError(
                f"{self._folder}: row {self._row + t} is about request {found[0][t]}, position {found[1][t]}; "
                f"the trace's row is request {request_T[t]}, position {position_T[t]}"
            )
        twice = _named_twice(found[2], self._nobody)
        if twice >= 0:
            raise FormatError(f"{self._folder}: row {self._row + twice} guesses one expert twice")
        self._row += len(request_T)
        return found[2], found[3]

    def _next(self, wanted: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Requests, positions, ids and scores of the next rows."""
        while wanted:
            if self._block is None or self._done == len(self._block.request_T):
                self._block, self._done = next(self._blocks, None), 0
            if self._block is None:
                raise FormatError(f"{self._folder}: ends at row {self._end}; the trace goes on")
            rows = slice(self._done, min(self._done + wanted, len(self._block.request_T)))
            yield tuple(getattr(self._block, name)[rows] for name in _ROWS)
            wanted, self._done = wanted - (rows.stop - rows.start), rows.stop

    def end(self) -> None:
        is_over = self._block is None or self._done == len(self._block.request_T)
        if not is_over or next(self._blocks, None) is not None:
            raise FormatError(
                f"{self._folder}: has rows after row {self._row}, where the trace's requests end"
            )


_ROWS = ("request_T", "position_T", "ids_THLP", "scores_THLP")


@njit(cache=True, nogil=True)
def _named_twice(ids_THLP, nobody):  # type: ignore[no-untyped-def]
    """The first row that names an expert twice for one layer, or -1."""
    n_tokens, width = ids_THLP.shape[0], ids_THLP.shape[3]
    lists = ids_THLP.reshape(-1, width)
    per_row = len(lists) // max(1, n_tokens)
    for i in range(len(lists)):
        for p in range(1, width):
            for q in range(p):
                if lists[i, p] != nobody and lists[i, p] == lists[i, q]:
                    return i // per_row
    return -1


@njit(cache=True, nogil=True)
def _count(  # type: ignore[no-untyped-def]  # noqa: C901  # one loop over events is what this is
    ids_TLK, guess_THLP, score_THLP, row_T, unit_T, nobody, horizons, capacity, stamp_LE, clock,
    is_probability, layer_HXLM, unit_HYULM, rank_HXLP, bin_HBC,
):  # fmt: skip
    """Event by event: guesses are compared with what was resident before it, then the event moves the cache."""
    n_layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    one = np.zeros(COLUMNS, np.int64)
    for t in range(ids_TLK.shape[0]):
        for layer in range(n_layers):
            ids, stamp_E = ids_TLK[t, layer], stamp_LE[layer]
            needed = 0
            for k in range(top_k):
                needed += ids[k] != nobody
            if needed == 0:
                continue
            for h in range(len(horizons)):
                if row_T[t] < 0:
                    break
                one[:] = 0
                one[EVENTS], one[CHOICES] = 1, needed
                for k in range(top_k):
                    if ids[k] != nobody and stamp_E[ids[k]] < 0:
                        one[MISSES] += 1
                rank_P = rank_HXLP[h, row_T[t], layer]
                is_binned = is_probability and row_T[t] == NEW and layer >= horizons[h]
                _one(ids, guess_THLP[t, h, layer], score_THLP[t, h, layer], nobody, stamp_E, top_k,
                     is_binned, one, rank_P, bin_HBC[h])  # fmt: skip
                one[EXACT] = one[HITS_K] == needed
                for m in range(COLUMNS):
                    layer_HXLM[h, row_T[t], layer, m] += one[m]
                for m in range(UNIT_COLUMNS):
                    unit_HYULM[h, 1, unit_T[t], layer, m] += one[m]
                    if row_T[t] == NEW:
                        unit_HYULM[h, 0, unit_T[t], layer, m] += one[m]
            if needed <= capacity:
                _use(ids, nobody, stamp_E, capacity, clock)


@njit(cache=True, nogil=True)
def _one(ids, guess_P, score_P, nobody, stamp_E, top_k, is_binned, one, rank_P, bin_BC):  # type: ignore[no-untyped-def]  # fmt: skip
    first_miss, given = 0, 0
    for p in range(len(guess_P)):
        expert = guess_P[p]
        if expert == nobody:
            break
        given += 1
        is_right = False
        for k in range(len(ids)):
            is_right |= ids[k] == expert
        if is_right:
            rank_P[p] += 1
        elif first_miss == 0:
            first_miss = p + 1
        if p >= 2 * top_k:
            continue
        if is_binned:
            score = min(max(score_P[p], 0.0), 1.0)
            place = min(int(score * len(bin_BC)), len(bin_BC) - 1)
            bin_BC[place, 0] += 1
            bin_BC[place, 1] += score
            bin_BC[place, 2] += is_right
        is_load = stamp_E[expert] < 0
        one[HITS_2K] += is_right
        one[LOADS_2K] += is_load
        one[MISSES_2K] += is_right and is_load
        if p < top_k:
            one[GUESSED_K] += 1
            one[HITS_K] += is_right
            one[LOADS_K] += is_load
            one[MISSES_K] += is_right and is_load
    one[FIRST_MISS] = (
        first_miss if first_miss > 0 else given + 1
    )  # where a list ends, silence is a miss


@njit(cache=True, nogil=True)
def _use(ids, nobody, stamp_E, capacity, clock):  # type: ignore[no-untyped-def]
    """LRU: the event's experts are the most recent, later ones more so; who is least recent leaves."""
    for k in range(len(ids)):
        if ids[k] != nobody:
            stamp_E[ids[k]] = clock[0]
            clock[0] += 1
    resident = 0
    for expert in range(len(stamp_E)):
        resident += stamp_E[expert] >= 0
    while resident > capacity:
        oldest = -1
        for expert in range(len(stamp_E)):
            if stamp_E[expert] >= 0 and (oldest < 0 or stamp_E[expert] < stamp_E[oldest]):
                oldest = expert
        stamp_E[oldest] = -1
        resident -= 1
