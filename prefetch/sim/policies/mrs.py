"""Evicts whoever had the lowest router scores lately, chosen or not: what almost was chosen may be soon.

HybriMoE's minus recent score (Zhong et al. 2025, 2504.05897): at every event of a layer, an expert's worth becomes
`share` of its score in this event, 0 unless it is among the best `top`, and 1 - `share` of what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.policies.worth import HEAD, SHARE, TABLES, filled, move_towards, used, victim
from prefetch.sim.policy import Rules, State, StateRules


def state_size(n_slots: int, n_entries: int) -> int:
    return HEAD + 2 * n_slots + n_entries


def start(state: State, capacity: int, share: float = 0.5) -> None:
    state[TABLES], state[SHARE] = 1, round(share * 1_000_000)


def told(
    state: State, n_slots: int, step: int, layer: int, row_E: NDArray[np.int32], is_first: bool
) -> None:
    move_towards(state, n_slots, layer, row_E)


@dataclass(frozen=True)
class Mrs:
    share: float = 0.5  # of an event's score in the worth: its authors' choice
    top: int | None = None  # scores of an event that count; None = 2 k, as in their code at k = 6
    needs: ClassVar[tuple[str, ...]] = ("scores",)
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim, told)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or (self.top is not None and self.top < 1):
            raise ConfigError(
                f"policy=mrs: share={self.share} must be above 0 and at most 1, top={self.top} at least 1"
            )

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.share,)
