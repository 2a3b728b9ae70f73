"""Evicts anybody, each as likely as the other: the floor that a policy has to be above.

Draws are those of Park and Miller (1988) with the multiplier of 1993, and begin at the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

DRAW, N_KNOWN = 0, 1  # the last draw; slots that were ever filled, always the first ones
MODULUS, MULTIPLIER, TRIES = 2**31 - 1, 48271, 16


def state_size(n_slots: int, n_entries: int) -> int:
    return 2


def start(state: State, capacity: int, seed: float = 0) -> None:
    state[DRAW] = 1 + int(seed) * 7919 % (
        MODULUS - 1
    )  # neighbouring seeds begin far from each other


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    state[N_KNOWN] = max(state[N_KNOWN], slot + 1)


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    pass


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    for _ in range(TRIES):  # few are busy, mostly
        state[DRAW] = state[DRAW] * MULTIPLIER % MODULUS
        if state[N_KNOWN] and busy_N[state[DRAW] % state[N_KNOWN]] == 0:
            return state[DRAW] % state[N_KNOWN]
    n_movable = 0
    for slot in range(state[N_KNOWN]):
        n_movable += busy_N[slot] == 0
    if n_movable:
        nth = state[DRAW] % n_movable
        for slot in range(state[N_KNOWN]):
            nth -= busy_N[slot] == 0
            if nth < 0:
                return slot
    return STAYS


@dataclass(frozen=True)
class Random:
    seed: int = 0
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**53:
            raise ConfigError(f"seed={self.seed}: must be at least 0 and below 2^53")

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.seed,)
