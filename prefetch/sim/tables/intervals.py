"""What the intervals of a table are over: requests, or, where steps serve several at once, blocks of steps.

It knows no policy. Requests are drawn (see `scoring`). Requests that share steps are alike, and drawing them finds
intervals that hold the truth half as often as they say; so there means of blocks count, with Student's t (Schmeiser
1982), each as long as two requests run. S steps, Q requests or blocks, R rows of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from prefetch.scoring import bootstrap
from prefetch.sim.workload import Workload

FEWEST_BLOCKS = 10
LEVEL = 0.95
REQUESTS_LONG = 2


@dataclass(frozen=True, eq=False)
class Units:
    """Of every step the unit it belongs to. Without units there is no interval, and the name says why."""

    place_S: NDArray[np.int64]
    name: str
    are_blocks: bool = False


def units_of(work: Workload, request_T: NDArray[np.int32]) -> Units:
    """`request_T`: of every row of the trace that is replayed."""
    request_R, rows_S = request_T[work.rows_R], np.diff(work.row_start_S)
    step_R = np.repeat(np.arange(work.n_steps), rows_S)
    if not (work.request_S < 0).any():
        return Units(np.unique(work.request_S, return_inverse=True)[1].astype(np.int64), "requests")
    _, first_Q = np.unique(request_R, return_index=True)
    _, last_Q = np.unique(request_R[::-1], return_index=True)
    lasts_Q = step_R[len(step_R) - 1 - last_Q] - step_R[first_Q] + 1
    length = int(np.ceil(REQUESTS_LONG * (lasts_Q**2).sum() / lasts_Q.sum()))  # as a token sees it
    n_blocks = work.n_steps // length
    if n_blocks < FEWEST_BLOCKS:
        name = (
            f"none: steps serve several requests, and there are {n_blocks} blocks of {length} steps"
        )
        return Units(np.zeros(0, np.int64), f"{name}, fewer than {FEWEST_BLOCKS}")
    place_S = np.arange(work.n_steps) * n_blocks // work.n_steps
    return Units(place_S, f"{n_blocks} blocks of {length} steps or more", are_blocks=True)


def interval(
    units: Units, values_S: NDArray[Any], of_S: NDArray[Any], seed: int
) -> tuple[float, float]:
    """Of a ratio of sums; NaN where there are not two units."""
    if not len(units.place_S):
        return np.nan, np.nan
    of_Q, values_Q = (np.bincount(units.place_S, each_S) for each_S in (of_S, values_S))
    values_Q, of_Q = values_Q[of_Q > 0], of_Q[of_Q > 0]
    if len(of_Q) < 2:
        return np.nan, np.nan
    return _of_blocks(values_Q, of_Q) if units.are_blocks else bootstrap(values_Q, of_Q, seed=seed)


def _of_blocks(values_Q: NDArray[Any], of_Q: NDArray[Any]) -> tuple[float, float]:
    n, ratio = len(of_Q), values_Q.sum() / of_Q.sum()
    spread = np.sqrt(((values_Q - ratio * of_Q) ** 2).sum() * n / (n - 1)) / of_Q.sum()
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2) * spread)
    return float(ratio - reach), float(ratio + reach)
