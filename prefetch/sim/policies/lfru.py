"""Evicts whoever has the fewest uses since it was loaded per time since the last of them: uses / (now - last + 1).

As in vLLM's proposal of an expert cache (pull request 37190). Ratios are compared exactly, as products of whole numbers
(below 2^63 for traces of up to 4 * 10^9 accesses). Whoever was copied ahead and not yet used has none, and goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

NOW, SLOTS = 0, 1  # the latest moment known; then, for every slot
USES, LAST, WIDE = 0, 1, 2


def state_size(n_slots: int, n_entries: int) -> int:
    return SLOTS + WIDE * n_slots


def start(state: State, capacity: int) -> None:
    pass


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    at = SLOTS + WIDE * slot
    state[at + USES], state[at + LAST], state[NOW] = 0, seen.now, seen.now


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    at = SLOTS + WIDE * slot
    state[at + USES] += 1
    state[at + LAST], state[NOW] = seen.now, seen.now


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    now, lowest = max(state[NOW], seen.now), STAYS
    fewest, age = np.int64(0), np.int64(1)
    for slot in range(n_slots):
        if busy_N[slot] == 0:
            at = SLOTS + WIDE * slot
            uses, since = state[at + USES], now - state[at + LAST] + 1
            if lowest == STAYS or uses * age < fewest * since:
                lowest, fewest, age = slot, uses, since
    return lowest


@dataclass(frozen=True)
class Lfru:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)
