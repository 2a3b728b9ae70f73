"""Nobody ever leaves: the experts most used by other requests are there from the start, all others pass through.

What static placement does (KTransformers by global frequency, Fiddler by layer): copies of the others are used once and
not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules


def state_size(n_slots: int, n_entries: int) -> int:
    return 1


def start(state: State, capacity: int) -> None:
    pass


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    pass


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    pass


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    return STAYS


@dataclass(frozen=True)
class Static:
    needs: ClassVar[tuple[str, ...]] = ("counts",)
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
