"""Loads in windows of consecutive tokens: how they vary, and what a capacity would drop.

It knows counts only. L layers, E experts, K choices, F capacity factors, S stretches of rows in one window.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, for_layers, layer_columns
from analysis.routing.sums import add_to, added, ratio

WINDOW_TOKENS = 1024
FACTORS_F = np.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0])
MOST_DROPPED = 0.01


class WindowSums(NamedTuple):
    """Over windows that are over; the first six, of full ones only: those in which every row ran the layer."""

    full_L: NDArray[np.int64]  # how many
    counts_LE: NDArray[np.int64]
    squares_LE: NDArray[np.int64]
    worst_LE: NDArray[np.float64]  # largest load over the mean
    violation_L: NDArray[np.float64]
    carry_L: NDArray[np.float64]  # what its additions rounded away
    choices_L: NDArray[np.int64]
    dropped_LF: NDArray[np.int64]
    slots_LF: NDArray[np.int64]


class Windows:
    """Loads in windows of consecutive rows of the whole trace, reduced as soon as a window is over.

    The first and the last window of what was seen stay open: the rows before and behind may belong to them.
    """

    def __init__(self, plan: Plan, tokens: int = WINDOW_TOKENS) -> None:
        if tokens < 1:
            raise ValueError(f"a window holds at least 1 token, got {tokens}")
        shape = (plan.card.n_layers, plan.card.n_experts)
        by_factor = (plan.card.n_layers, len(FACTORS_F))
        self.plan, self.tokens = plan, tokens
        self.sums = WindowSums(
            np.zeros(shape[0], np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape),
            np.zeros(shape[0]),
            np.zeros(shape[0]),
            np.zeros(shape[0], np.int64),
            np.zeros(by_factor, np.int64),
            np.zeros(by_factor, np.int64),
        )
        # window -> counts [L, E] and, behind them, rows that have an expert
        self.open: dict[int, NDArray[np.int64]] = {}

    def add(self, batch: Batch) -> None:
        window_T = batch.row_T // self.tokens
        bounds_S = np.flatnonzero(np.diff(window_T, prepend=-1, append=-1))
        card = self.plan.card
        edges = np.zeros((2, card.n_layers, card.n_experts + 1), np.int64)
        sums = tuple(self.sums)  # a class of ours would be looked up by its name in numba's cache

        def count(layer: int) -> None:
            ids_TK = batch.ids_LTK[layer]
            _count_windows(
                ids_TK, bounds_S, batch.nobody, layer, edges, self.tokens, card.top_k, sums
            )

        for_layers(count, card.n_layers)
        self._join({int(window_T[0]): edges[0]})
        self._join({int(window_T[-1]): edges[1]})  # zeros where it is the first one
        self._close()

    def merge(self, later: Windows) -> None:
        for name, mine, other in zip(WindowSums._fields, self.sums, later.sums, strict=True):
            if name == "violation_L":
                mine[:], lost_L = added(mine, other)
                self.sums.carry_L[:] += lost_L
            else:
                mine[:] = np.maximum(mine, other) if name == "worst_LE" else mine + other
        self._join(later.open)
        self._close()

    def _join(self, more: dict[int, NDArray[np.int64]]) -> None:
        for window, counts in more.items():
            self.open[window] = self.open[window] + counts if window in self.open else counts

    def _close(self) -> None:
        for window in sorted(self.open)[1:-1]:
            self._reduce(self.open.pop(window), self.sums)

    def _reduce(self, counts_LE: NDArray[np.int64], sums: WindowSums) -> None:
        for layer in range(len(counts_LE)):
            _reduce(counts_LE[layer], layer, self.tokens, self.plan.card.top_k, tuple(sums))

    def total(self) -> WindowSums:
        """With the open windows."""
        sums = copy.deepcopy(self.sums)
        for counts_LE in self.open.values():
            self._reduce(counts_LE, sums)
        return sums._replace(violation_L=sums.violation_L + sums.carry_L)


@njit(cache=True, nogil=True)
def _count_windows(ids_TK, bounds_S, nobody, layer, edges, tokens, top_k, sums):  # type: ignore[no-untyped-def]
    """The first and the last stretch go to `edges`, those between are whole windows."""
    rows_at = edges.shape[2] - 1
    inner_E = np.zeros(edges.shape[2], np.int64)
    last = len(bounds_S) - 2
    for s in range(last + 1):
        counts_E = inner_E
        if s == 0:
            counts_E = edges[0, layer]
        elif s == last:
            counts_E = edges[1, layer]
        for t in range(bounds_S[s], bounds_S[s + 1]):
            is_used = False
            for k in range(ids_TK.shape[1]):
                if ids_TK[t, k] != nobody:
                    counts_E[ids_TK[t, k]] += 1
                    is_used = True
            counts_E[rows_at] += is_used
        if 0 < s < last:
            _reduce(inner_E, layer, tokens, top_k, sums)
            inner_E[:] = 0


@njit(cache=True, nogil=True)
def _reduce(counts_E, layer, tokens, top_k, sums):  # type: ignore[no-untyped-def]
    full_L, counts_LE, squares_LE, worst_LE, violation_L, carry_L = sums[:6]
    choices_L, dropped_LF, slots_LF = sums[6:]
    n_experts, rows = len(counts_E) - 1, counts_E[-1]
    choices = counts_E[:-1].sum()
    if choices == 0:
        return
    choices_L[layer] += choices
    for f in range(len(FACTORS_F)):
        room = int(np.ceil(FACTORS_F[f] * rows * top_k / n_experts))
        slots_LF[layer, f] += n_experts * room
        for expert in range(n_experts):
            dropped_LF[layer, f] += max(0, counts_E[expert] - room)
    if rows == tokens:
        full_L[layer] += 1
        add_to(violation_L, carry_L, layer, counts_E[:-1].max() * n_experts / choices - 1)
        for expert in range(n_experts):
            count = counts_E[expert]
            counts_LE[layer, expert] += count
            squares_LE[layer, expert] += count * count
            worst_LE[layer, expert] = max(worst_LE[layer, expert], count * n_experts / choices)


def fano(sums: WindowSums) -> NDArray[np.float64]:
    """Variance over mean of an expert's load in full windows, [L, E].

    Of independent tokens 1 - k x share on average, k x share being the chance that a token takes the expert; of n
    windows it varies by sqrt(2 / (n - 1)) of that, so the largest of many experts means little where n is small.
    """
    n_L1, total_LE = sums.full_L[:, None].astype(float), sums.counts_LE.astype(float)
    variance_LE = ratio(sums.squares_LE - ratio(total_LE**2, n_L1), n_L1 - 1)
    return ratio(np.maximum(0, variance_LE) * n_L1, total_LE)


def dropped_share(sums: WindowSums) -> NDArray[np.float64]:
    return ratio(sums.dropped_LF, sums.choices_L[:, None])


def capacity_curve(windows: Windows) -> pd.DataFrame:
    """What if experts had a capacity of ceil(factor x rows x k / E) in every window? Dropless engines drop nothing.

    padding_share: of the slots, those that nothing fills.
    """
    sums = windows.total()
    layer, f = np.indices(sums.dropped_LF.shape).reshape(2, -1)
    filled_LF = sums.choices_L[:, None] - sums.dropped_LF
    columns = {
        **layer_columns(windows.plan.card, layer),
        "capacity_factor": FACTORS_F[f],
        "dropped_share": dropped_share(sums)[layer, f],
        "padding_share": 1 - ratio(filled_LF, sums.slots_LF)[layer, f],
    }
    return pd.DataFrame(columns)[sums.choices_L[layer] > 0].reset_index(drop=True)
