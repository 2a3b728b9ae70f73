"""One cell of a table: a workload, a cache with a policy, a machine, guesses or none; and what its row says of itself.

It knows no table, and no number that comes of it: see `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, MissingData, PrefetchError
from prefetch.sim.engines.machine import Guesses, Machine
from prefetch.sim.engines.pool import ATOMIC, NOTHING_TOLD, Told
from prefetch.sim.engines.run import Timed, timed_replay
from prefetch.sim.engines.start import NOBODY, groups_of, taken_of
from prefetch.sim.engines.streaming import streamed_replay
from prefetch.sim.memory import Budget
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload

NS_PER_MS = 1e6
REFUSALS = (ConfigError, FormatError, MissingData)  # of this cell; others may run
CHEATS, CANNOT_RUN = "cheats", "cannot run: "  # marks


@dataclass(frozen=True, eq=False)
class Cell:
    """What is run, and what its row says of itself."""

    names: dict[str, Any]  # way, policy, predictor, capacity, ...
    policy: Policy
    budget: Budget
    machine: Machine
    guesses: Guesses | None = None
    semantics: int = ATOMIC
    told: Told = NOTHING_TOLD  # rows that the policy asks for
    warm: NDArray[np.int64] = field(default_factory=lambda: NOBODY)  # entries at the start
    pinned: NDArray[np.int64] = field(default_factory=lambda: NOBODY)  # ... that stay
    streams: bool = False  # prompts run by whole layers

    @property
    def wished(self) -> NDArray[np.int64]:
        """Entries that are there from the start, as far as there is room."""
        return np.concatenate([self.pinned, self.warm])

    @property
    def start_words(self) -> str:
        """Who is in the caches at first."""
        filled = ["pinned experts"] * (len(self.pinned) > 0)
        filled += ["the most used experts"] * (len(self.warm) > 0)
        return f"a start with {' and '.join(filled)}" if filled else "an empty cache"

    def started(self, n_experts: int) -> list[int]:
        """Entries that are there from the start."""
        budget = self.budget
        group_L = groups_of(len(budget.size_L), len(budget.room_G))
        return taken_of(self.wished, group_L, budget.size_L, budget.room_G, n_experts)

    def run(self, work: Workload) -> Timed:
        if self.streams:
            return streamed_replay(
                work,
                self.policy,
                self.budget.room_G,
                self.budget.size_L,
                self.machine,
                self.semantics,
                warm=self.warm,
                pinned=self.pinned,
            )
        return timed_replay(
            work,
            self.policy,
            self.budget.room_G,
            self.budget.size_L,
            self.machine,
            self.guesses,
            self.semantics,
            told=self.told,
            warm=self.warm,
            pinned=self.pinned,
        )


@dataclass(frozen=True)
class Refused:
    """A cell that cannot be made: its row says why, and has no numbers."""

    names: dict[str, Any]
    reason: PrefetchError


def refused_row(names: dict[str, Any], reason: Exception) -> dict[str, Any]:
    return {**names, "mark": f"{CANNOT_RUN}{reason}"}
