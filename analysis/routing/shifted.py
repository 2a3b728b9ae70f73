"""The second control of what one layer tells of the next: rows of one request paired with those of another.

It knows no predictor and no table.
T tokens, L layers, K choices, E experts, R requests, P phases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.routing.batch import Batch, for_layers
from analysis.routing.pairs import SKIP, count_margins, count_pairs, information
from prefetch.trace.routing import PHASES


class Shifted:
    """The second control of horizon 1: a layer's rows paired with those that the next request made a layer later.

    Row i of a request meets row i + half of the next one (of as many rows as that has, and around), prompt rows with
    prompt rows; the last request meets the first. So each side keeps its order: runs of like tokens, topics of
    requests, text that returns. Nothing links the two sides but what neighbouring requests share. The estimate from
    these pairs is what runs, and few requests, feign; that from permuted rows is what independent tokens would.
    """

    def __init__(self, n_pairs: int, n_experts: int, counts: np.dtype[Any]) -> None:
        self.joint_PLEE = np.zeros((len(PHASES), n_pairs, n_experts, n_experts), counts)
        self.here_PLE = np.zeros((len(PHASES), n_pairs, n_experts), np.int64)
        self.there_PLE = np.zeros_like(self.here_PLE)
        self.tokens_PL = np.zeros((len(PHASES), n_pairs), np.int64)
        self.nobody = 0
        # [L, T, K] choices of the first request and of the last
        self.first_P: list[NDArray[Any] | None] = [None] * len(PHASES)
        self.last_P: list[NDArray[Any] | None] = [None] * len(PHASES)

    @staticmethod
    def n_bytes(n_pairs: int, n_experts: int, counts: np.dtype[Any]) -> int:
        return counts.itemsize * len(PHASES) * n_pairs * n_experts**2

    def add(self, batch: Batch, class_T: NDArray[np.uint8]) -> None:
        self.nobody = batch.nobody
        for phase in range(len(PHASES) if self.joint_PLEE.size else 0):
            rows = np.flatnonzero((class_T != SKIP) & (batch.block.phase_T == phase))
            if rows.size:
                new_R = np.diff(batch.block.request_T[rows], prepend=-1) != 0
                new_R[0] = True
                self._add(phase, batch.ids_LTK, rows, np.append(np.flatnonzero(new_R), len(rows)))

    def _add(self, phase: int, ids_LTK: NDArray[Any], rows: Any, edges: NDArray[np.int64]) -> None:
        """Requests that follow on the last one: it meets the first of them, and each the one after it."""
        self._meet(phase, ids_LTK[:, rows[: edges[1]]])
        here, there = rows[: edges[-2]], rows[partners(edges)]
        self._count(self._sums(), phase, ids_LTK, ids_LTK, here, there)
        self.last_P[phase] = ids_LTK[:, rows[edges[-2] :]]

    def _meet(self, phase: int, first_LTK: NDArray[Any]) -> None:
        last_LTK = self.last_P[phase]
        if last_LTK is None:
            self.first_P[phase] = first_LTK
        else:
            self._join(self._sums(), phase, last_LTK, first_LTK)

    def _join(self, sums: _Sums, phase: int, here_LTK: Any, there_LTK: Any) -> None:
        n_here, n_there = here_LTK.shape[1], there_LTK.shape[1]
        there = partners(np.array([0, n_here, n_here + n_there])) - n_here
        self._count(sums, phase, here_LTK, there_LTK, np.arange(n_here), there)

    def _count(
        self, sums: _Sums, phase: int, here_LTK: Any, there_LTK: Any, here: Any, there: Any
    ) -> None:
        joint_LEE, here_LE, there_LE, tokens_L = (array[phase] for array in sums)
        zero_T = np.zeros(len(here), np.uint8)

        def count(layer: int) -> None:
            one, two = here_LTK[layer][here], there_LTK[layer + 1][there]
            at = np.s_[layer : layer + 1]
            count_pairs(one, two, zero_T, self.nobody, joint_LEE[at])
            count_margins(one, two, zero_T, self.nobody, here_LE[at], there_LE[at], tokens_L[at])

        for_layers(count, len(tokens_L))

    def merge(self, later: Shifted) -> None:
        for mine, other in zip(self._sums(), later._sums(), strict=True):
            mine += other
        self.nobody = max(self.nobody, later.nobody)
        for phase, first_LTK in enumerate(later.first_P):
            if first_LTK is not None:
                self._meet(phase, first_LTK)
                self.last_P[phase] = later.last_P[phase]

    def _sums(self) -> _Sums:
        return self.joint_PLEE, self.here_PLE, self.there_PLE, self.tokens_PL

    def bits(self, phase: str) -> NDArray[np.float64]:
        """The estimate of every pair of layers; NaN where no token went."""
        joint_LEE, here_LE, there_LE = self.closed(phase)
        told = for_layers(
            lambda layer: information(joint_LEE[layer], here_LE[layer], there_LE[layer]),
            len(joint_LEE),
        )
        return np.array([row["mutual_information_bits"] for row in told])

    def closed(self, phase: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Pairs, and how many rows have each expert on either side, once the last request has met the first."""
        wanted = [p for p, name in enumerate(PHASES) if phase in ("all", name)]
        joint_PLEE, here_PLE, there_PLE, tokens_PL = (array[wanted] for array in self._sums())
        sums = joint_PLEE, here_PLE, there_PLE, tokens_PL
        for place, p in enumerate(wanted):
            last_LTK, first_LTK = self.last_P[p], self.first_P[p]
            if last_LTK is not None and first_LTK is not None:
                self._join(sums, place, last_LTK, first_LTK)
        return joint_PLEE.sum(axis=0), here_PLE.sum(axis=0), there_PLE.sum(axis=0)


_Sums = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def partners(edges_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every row but those of the last request, its row of the next: from the middle on, and around.

    Request r has the rows from `edges_R[r]` up to `edges_R[r + 1]`.
    """
    rows_R = np.diff(edges_R)
    next_T = np.repeat(rows_R[1:], rows_R[:-1])
    place_T = np.arange(edges_R[-2]) - np.repeat(edges_R[:-2], rows_R[:-1])
    found_T: NDArray[np.int64] = np.repeat(edges_R[1:-1], rows_R[:-1]) + (
        (place_T + next_T // 2) % np.maximum(next_T, 1)
    )
    return found_T
