"""Evicts by a weighted sum of four: used lately, used often, used at high precision often, and whose layer is next.

The terms of HOBBIT's cache (Tang et al. 2024, 2411.01433), each a share: of the steps of this sequence, the last that
used the expert, those that used it, and those that used it at high precision (it does so where the router's weights
before it in the token's order sum to at most `unimportant`; the rest it computes from low-precision copies, which are
lossy and not simulated: the term alone is); and of the layers, those that come after it in a cycle from here. Records
are of all experts, here or not, and end with the sequence: it begins with a step without a request of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.policies.worth import HEAD, TABLES, filled, n_entries_of, table_of, used
from prefetch.sim.policy import STAYS, Rules, Seen, State, StateRules

LRU, LFU, LHU, FLD, HIGH_FROM, BEGAN, STEPS, LAYER, N_EXPERTS = range(1, HEAD)
LAST, USES, HIGH = range(3)  # tables: the sequence's step that used it last, from 1; steps
MILLION = 1_000_000


def state_size(n_slots: int, n_entries: int) -> int:
    return HEAD + 2 * n_slots + 3 * n_entries


def start(
    state: State,
    capacity: int,
    lru: float = 0.25,
    lfu: float = 0.25,
    lhu: float = 0.25,
    fld: float = 0.25,
    unimportant: float = 0.6,
) -> None:
    for place, weight in ((LRU, lru), (LFU, lfu), (LHU, lhu), (FLD, fld)):
        state[place] = round(weight * MILLION)
    state[TABLES], state[N_EXPERTS], state[STEPS] = 3, 1, 1
    state[HIGH_FROM] = round((1 - unimportant) * MILLION)


def told(
    state: State, n_slots: int, step: int, layer: int, row_E: NDArray[np.int32], is_first: bool
) -> None:
    state[N_EXPERTS], state[LAYER] = len(row_E), layer
    if is_first:
        state[HEAD + 2 * n_slots :] = 0
        state[BEGAN] = step
    state[STEPS] = step - state[BEGAN] + 1
    last = table_of(state, n_slots, LAST, layer, len(row_E))
    uses = table_of(state, n_slots, USES, layer, len(row_E))
    high = table_of(state, n_slots, HIGH, layer, len(row_E))
    for expert in range(len(row_E)):
        if row_E[expert] > 0:
            state[last + expert] = state[STEPS]
            state[uses + expert] += 1
            state[high + expert] += row_E[expert] >= state[HIGH_FROM]


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    """Shares of steps and of layers have two denominators: sums are compared times both, in whole numbers."""
    n_entries, tables = n_entries_of(state, n_slots), HEAD + 2 * n_slots
    n_layers = n_entries // state[N_EXPERTS]
    lowest, least, oldest = STAYS, np.int64(0), np.int64(0)
    for slot in range(n_slots):
        if busy_N[slot] == 0:
            entry = state[HEAD + slot] % n_entries
            value = state[LRU] * state[tables + entry]
            value += state[LFU] * state[tables + n_entries + entry]
            value += state[LHU] * state[tables + 2 * n_entries + entry]
            away = (entry // state[N_EXPERTS] - state[LAYER]) % n_layers
            value = value * n_layers + state[FLD] * (n_layers - away) * state[STEPS]
            since = state[HEAD + n_slots + slot]
            if lowest == STAYS or value < least or (value == least and since < oldest):
                lowest, least, oldest = slot, value, since
    return lowest


@dataclass(frozen=True)
class Hobbit:
    lru: float = 0.25  # its authors fit the four to a platform
    lfu: float = 0.25
    lhu: float = 0.25  # 0 where a trace has no weights
    fld: float = 0.25
    unimportant: float = 0.6
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim, told)

    def __post_init__(self) -> None:
        weights = (self.lru, self.lfu, self.lhu, self.fld)
        if not all(0 <= value <= 1 for value in (*weights, self.unimportant)) or not any(weights):
            raise ConfigError(
                f"policy=hobbit: lru={self.lru} lfu={self.lfu} lhu={self.lhu} fld={self.fld} "
                f"unimportant={self.unimportant}: each must be from 0 to 1, one weight above 0"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("weights",) if self.lhu > 0 else ("tokens",)

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.lru, self.lfu, self.lhu, self.fld, self.unimportant)
