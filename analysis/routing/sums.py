"""Sums of fractions that no batching changes. It knows no table. G groups, L layers, N values, T tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Sums:
    """[G, L, N] totals that no batching changes: what an addition rounds away is carried along (Knuth's TwoSum).

    NaN is left out and not counted.
    """

    def __init__(self, *shape: int) -> None:
        self.count = np.zeros(shape, np.int64)
        self.total = np.zeros(shape)
        self.carry = np.zeros(shape)

    def add(self, layer: int, values_TN: NDArray[np.float64], group_T: NDArray[Any]) -> None:
        sums = self.count[:, layer], self.total[:, layer], self.carry[:, layer]
        _add_rows(values_TN, group_T, *sums)

    def merge(self, later: Sums) -> None:
        self.total, lost = added(self.total, later.total)
        self.carry += later.carry + lost
        self.count += later.count

    def counts(self, groups: slice) -> NDArray[np.int64]:
        return self.count[groups].sum(axis=0)

    def sums(self, groups: slice) -> NDArray[np.float64]:
        """[L, N] rounded once, so that it does not matter in which parts they were added."""
        total, carry = np.zeros(self.total.shape[1:]), self.carry[groups].sum(axis=0)
        for total_LN in self.total[groups]:
            total, lost = added(total, total_LN)
            carry += lost
        return total + carry

    def means(self, groups: slice) -> NDArray[np.float64]:
        """[L, N]; NaN where nothing was counted."""
        return ratio(self.sums(groups), self.counts(groups))


def added(one: NDArray[Any], two: NDArray[Any]) -> tuple[Any, Any]:
    """The sum, and what it rounds away (Knuth's TwoSum)."""
    total = one + two
    part = total - one
    return total, (one - (total - part)) + (two - part)


def ratio(above: Any, below: Any) -> NDArray[np.float64]:
    """NaN where there is nothing below."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def share_of(counts_LE: NDArray[Any]) -> NDArray[np.float64]:
    return ratio(counts_LE, counts_LE.sum(axis=1, keepdims=True))


@njit(cache=True, nogil=True)
def add_to(total_N, carry_N, n, x):  # type: ignore[no-untyped-def]
    total = total_N[n] + x
    part = total - total_N[n]
    carry_N[n] += (total_N[n] - (total - part)) + (x - part)
    total_N[n] = total


@njit(cache=True, nogil=True)
def _add_rows(values_TN, group_T, count_GN, total_GN, carry_GN):  # type: ignore[no-untyped-def]
    for t in range(values_TN.shape[0]):
        group = group_T[t]
        for n in range(values_TN.shape[1]):
            if not np.isnan(values_TN[t, n]):
                count_GN[group, n] += 1
                add_to(total_GN[group], carry_GN[group], n, values_TN[t, n])
