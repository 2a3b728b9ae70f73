"""How far neighbouring requests of a domain choose alike, position by position: where they hold the same text.

It knows no split and no predictor. T tokens, L layers, K choices, R requests, D domains, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LEAST_AGREEMENT = 0.9  # of the choices of neighbouring requests, at one position
LEAST_PAIRS = 2  # fewer pairs of requests agree by chance
LAYERS = 8  # so many, evenly spread, tell a shared text from chance


@dataclass(frozen=True, eq=False)
class _Head:
    """The rows of a request that stand at a position within reach; some layers of them."""

    position_T: NDArray[np.int64]
    ids_TLK: NDArray[Any]


class Agreement:
    """Sums over neighbours of a domain, at every position from one of a request's ends."""

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._total: dict[int, NDArray[np.int64]] = {}  # [3, P] shared choices, choices, pairs
        self._first: dict[int, _Head] = {}  # of the domain's first request
        self._last: dict[int, _Head] = {}

    def meet(self, ids_TLK: Any, position_T: Any, edges_R: Any, domain_R: Any, nobody: int) -> None:
        """The next requests: each is compared with the one before it in its domain.

        Rows at positions below 0 stand at none.
        """
        layers_L = np.unique(np.linspace(0, ids_TLK.shape[1] - 1, LAYERS).astype(int))
        for domain in np.unique(domain_R).tolist():
            of_domain = np.flatnonzero(domain_R == domain)
            heads = [
                self._head(ids_TLK, position_T, slice(*edges_R[r : r + 2]), layers_L)
                for r in (of_domain[0], of_domain[-1])
            ]
            self._join(domain, heads[0], nobody)
            starts_R, stops_R = edges_R[of_domain], edges_R[of_domain + 1]
            places = position_T.astype(np.int64), starts_R, stops_R, layers_L
            _compare_all(ids_TLK, *places, nobody, self._sums(domain))
            self._last[domain] = heads[1]

    def _head(self, ids_TLK: Any, position_T: Any, rows: slice, layers_L: Any) -> _Head:
        near = np.flatnonzero((position_T[rows] >= 0) & (position_T[rows] < self._reach))
        near = near + rows.start
        return _Head(position_T[near].astype(np.int64), ids_TLK[np.ix_(near, layers_L)])

    def _join(self, domain: int, head: _Head, nobody: int) -> None:
        """The domain's last request so far, and its next."""
        last = self._last.get(domain)
        if last is None:
            self._first[domain] = head
            return
        both = np.concatenate([last.position_T, head.position_T])
        edges = np.array([0, len(last.position_T), len(both)])
        ids_TLK = np.concatenate([last.ids_TLK, head.ids_TLK])
        layers_L = np.arange(ids_TLK.shape[1])
        _compare_all(ids_TLK, both, edges[:-1], edges[1:], layers_L, nobody, self._sums(domain))

    def _sums(self, domain: int) -> NDArray[np.int64]:
        return self._total.setdefault(domain, np.zeros((3, self._reach), np.int64))

    def merge(self, later: Agreement, nobody: int) -> None:
        for domain, head in later._first.items():
            self._join(domain, head, nobody)
            self._last[domain] = later._last[domain]
        for domain, total_3P in later._total.items():
            self._sums(domain)[:] += total_3P

    def shared(self, domain_R: list[int], n_domains: int) -> NDArray[np.bool_]:
        """[domain, position]: do neighbouring requests agree there, and do most of them reach so far?

        Where they agree at every position there is no template but a router that hardly varies.
        """
        is_shared_DP = np.zeros((n_domains + 1, self._reach), bool)
        for domain, (shared_P, of_P, pairs_P) in self._total.items():
            most = domain_R.count(domain) - 1
            enough_P = (pairs_P >= LEAST_PAIRS) & (2 * pairs_P >= most)
            agree_P = enough_P & (shared_P >= LEAST_AGREEMENT * np.maximum(of_P, 1))
            is_shared_DP[domain] = agree_P & (agree_P != enough_P).any()
        return is_shared_DP


@njit(cache=True, nogil=True)
def _compare_all(ids_TLK, position_T, starts_R, stops_R, layers_L, nobody, total_3P):  # type: ignore[no-untyped-def]
    """Every request with the one before it."""
    row_P = np.full(total_3P.shape[1], -1)
    for r in range(1, len(starts_R)):
        for t in range(starts_R[r - 1], stops_R[r - 1]):
            if 0 <= position_T[t] < len(row_P):
                row_P[position_T[t]] = t
        for t in range(starts_R[r], stops_R[r]):
            place = position_T[t]
            if 0 <= place < len(row_P) and row_P[place] >= 0:
                shared, of = _shared(ids_TLK[t], ids_TLK[row_P[place]], layers_L, nobody)
                total_3P[0, place] += shared
                total_3P[1, place] += of
                total_3P[2, place] += 1
        for t in range(starts_R[r - 1], stops_R[r - 1]):
            if 0 <= position_T[t] < len(row_P):
                row_P[position_T[t]] = -1


@njit(cache=True, nogil=True)
def _shared(one_LK, other_LK, layers_L, nobody):  # type: ignore[no-untyped-def]
    """How many choices of one the other has, and how many there are."""
    shared, of = 0, 0
    for layer in layers_L:
        for expert in one_LK[layer]:
            if expert != nobody:
                of += 1
                for also in other_LK[layer]:
                    shared += also == expert
    return shared, of
