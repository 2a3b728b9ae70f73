"""Evicts whoever has the smallest share of its layer's tokens in this sequence, of equal ones in the later layer.

The priority of MoE-Infinity's paper (Xue et al. 2024, 2401.14361): (tokens of the sequence that chose the expert /
tokens that chose any expert of its layer, and a little) * (1 - layer / layers), because copies for the first layers
cannot be made ahead in time. Its code (at d617801) evicts whoever was visited least while in the cache, over all
sequences: that is `lfu_persistent`, nearly. A sequence begins with a step that has no request of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.policies.worth import (
    HEAD,
    TABLES,
    filled,
    n_entries_of,
    table_of,
    used,
    victim,
)
from prefetch.sim.policy import Rules, State, StateRules

WORTH, TOKENS = 0, 1  # tables
ONE, A_LITTLE = 10**10, 1  # of a share; experts without a token rank by their layer


def state_size(n_slots: int, n_entries: int) -> int:
    return HEAD + 2 * n_slots + 2 * n_entries


def start(state: State, capacity: int) -> None:
    state[TABLES] = 2


def told(
    state: State, n_slots: int, step: int, layer: int, row_E: NDArray[np.int32], is_first: bool
) -> None:
    n_experts, n_entries = len(row_E), n_entries_of(state, n_slots)
    n_layers = n_entries // n_experts  # of this cache
    if is_first:
        tables = table_of(state, n_slots, WORTH, 0, n_experts)
        for entry in range(n_entries):
            state[tables + entry] = A_LITTLE * (n_layers - entry // n_experts)
            state[tables + n_entries + entry] = 0
    tokens, worth = (
        table_of(state, n_slots, TOKENS, layer, n_experts),
        table_of(state, n_slots, WORTH, layer, n_experts),
    )
    n_tokens = np.int64(0)
    for expert in range(n_experts):
        state[tokens + expert] += row_E[expert]
        n_tokens += state[tokens + expert]
    decay = n_layers - layer % n_layers
    for expert in range(n_experts):
        share = state[tokens + expert] * decay * ONE // max(np.int64(1), n_tokens)
        state[worth + expert] = share + A_LITTLE * decay


@dataclass(frozen=True)
class MoeInfinity:
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim, told)
