"""Evicts whoever a predictor gives the lowest probability of use.

Of a layer, what counts is the latest guess that is known: for the layers ahead, the one about their next event; for
others the one about their last event, of whose experts those that were not used then rank by how likely they were.
`share` below 1 remembers earlier guesses as well: the worth moves by so much towards the latest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.errors import ConfigError
from prefetch.sim.policies.mrs import start, state_size, told
from prefetch.sim.policies.worth import filled, used, victim
from prefetch.sim.policy import Rules, StateRules


@dataclass(frozen=True)
class PredictedUse:
    share: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("guesses",)
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = StateRules(state_size, start, filled, used, victim, told)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"policy=predicted_use: share={self.share} must be above 0 and at most 1"
            )

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.share,)
