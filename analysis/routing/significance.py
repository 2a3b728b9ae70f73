"""What is beyond chance: standard scores, and false discovery rates over many of them. It knows no table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def z_values(
    count: NDArray[Any], expected: NDArray[Any], variance: NDArray[Any]
) -> NDArray[np.float64]:
    """0 where the margins leave no choice."""
    free = variance > 1e-9
    return np.divide(count - expected, np.sqrt(variance), out=np.zeros(expected.shape), where=free)


def q_values(p_LN: NDArray[Any]) -> NDArray[np.float64]:
    """False discovery rates within every row (Benjamini and Hochberg 1995); NaN was not tested and stays NaN."""
    order_LN = np.argsort(p_LN, axis=1, kind="stable")  # NaN last
    sorted_LN = np.take_along_axis(p_LN, order_LN, 1)
    tests_L = (~np.isnan(p_LN)).sum(axis=1, keepdims=True)
    rates_LN = sorted_LN * tests_L / np.arange(1, p_LN.shape[1] + 1)
    least_LN = np.fmin.accumulate(rates_LN[:, ::-1], axis=1)[:, ::-1]
    q_LN = np.empty(p_LN.shape)
    np.put_along_axis(q_LN, order_LN, np.minimum(least_LN, 1), 1)
    return np.where(np.isnan(p_LN), np.nan, q_LN)
