"""What the cells of a table know before they run: rows for their policies, a split of the cache, and who is there.

Whatever is fitted is fitted on the requests that are not replayed. It knows no capacity and no machine.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray
from omegaconf import ListConfig

from prefetch.config import SimulatorConfig
from prefetch.errors import ConfigError
from prefetch.sim import splits
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import NOTHING_TOLD, Told
from prefetch.sim.engines.start import NOBODY
from prefetch.sim.foresight import guesses_of, keys_of
from prefetch.sim.memory import Budget, Split
from prefetch.sim.policy import ROWS, Policy
from prefetch.sim.tables.others import (
    Others,
    misses_of,
    most_used,
    most_used_of_each,
    replayed_rows,
    uses_of,
)
from prefetch.sim.told import told_of
from prefetch.sim.workload import Workload
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import RoutingTrace

STARTS, SPLITS = ("cold", "warm"), ("equal", "fitted", "fitted_optimum")
RECORDED = {"scores": ("scores", "score_ids"), "weights": ("weights",)}  # columns of a trace


def check_prior(told: SimulatorConfig) -> None:
    if told.start not in STARTS or told.pinned < 0:
        raise ConfigError(
            f"simulator.start={told.start}, simulator.pinned={told.pinned}: expected one of {', '.join(STARTS)}, "
            "and a number of experts, at least 0"
        )
    is_list = isinstance(told.split, (list, tuple, ListConfig))
    if not is_list and told.split not in SPLITS:
        raise ConfigError(
            f"simulator.split={told.split}: expected one of {', '.join(SPLITS)}, or experts of each layer ([8,12])"
        )
    if told.split != "equal" and told.scope != "per_layer":
        raise ConfigError(
            f"simulator.split={told.split}: with simulator.scope={told.scope} there is one cache for all layers; "
            "pass simulator.scope=per_layer"
        )


class Prior:
    """`trace`: what is replayed; `others`: all other rows of the file."""

    def __init__(
        self,
        simulator: SimulatorConfig,
        reader: TraceReader,
        trace: RoutingTrace,
        others: Others,
        work: Workload,
    ) -> None:
        self.simulator, self.reader, self.trace, self.others = simulator, reader, trace, others
        self.work, self.uses_LE = work, uses_of(others)
        self._rows: dict[tuple[Policy, int, str, int], Told] = {}
        self._misses: dict[str, NDArray[np.int64]] = {}

    def about(self, trace: RoutingTrace, work: Workload) -> Prior:
        """The same of other rows that are replayed; what was fitted stays."""
        other = copy.copy(self)
        other.trace, other.work, other._rows = trace, work, {}
        return other

    def has_seen(self, policy: Policy) -> bool:
        """Was something of this cell fitted on what it replays?"""
        told = self.simulator
        is_fitted = told.pinned > 0 or told.start == "warm" or "counts" in policy.needs
        return told.requests == "all" and (is_fitted or str(told.split).startswith("fitted"))

    def split(self, *, of_any_size: bool = False) -> Split | None:
        """How layers share a cache. Numbers that were given are of one size; of another, layers share equally."""
        told = self.simulator.split
        if not isinstance(told, str):
            slots_L, n_experts = list(told), self.trace.card.n_experts
            if of_any_size:
                return None
            return lambda rooms, sizes: splits.given(slots_L, rooms, sizes, n_experts)
        if told == "equal":
            return None
        by = "optimum" if told == "fitted_optimum" else "lru"
        if by not in self._misses:
            self._misses[by] = misses_of(self.others, by)
        return lambda rooms, sizes: splits.fitted(self._misses[by], rooms, sizes)

    def warm(self, policy: Policy) -> NDArray[np.int64]:
        """The optimum begins with those that are pinned for the others, and may let them go."""
        is_warm = self.simulator.start == "warm" or "counts" in policy.needs
        if not is_warm and self.simulator.pinned and "future" in policy.needs:
            return most_used_of_each(self.uses_LE, self.simulator.pinned)
        return most_used(self.uses_LE) if is_warm else NOBODY

    def pinned(self, policy: Policy, within: Budget | None = None) -> NDArray[np.int64]:
        """Of `within` never more than it holds. The optimum has none: it keeps whom it wants."""
        n, n_layers = self.simulator.pinned, self.trace.card.n_layers
        if within is not None:
            n = min(n, min(within.slots_G) // (n_layers // len(within.slots_G)))
        return most_used_of_each(self.uses_LE, n) if n and "future" not in policy.needs else NOBODY

    def told(
        self, policy: Policy, n_caches: int, foretold: PredictionsReader | None, horizon: int
    ) -> Told:
        """The rows that a policy asks for, made once: cells share them."""
        need = next((need for need in policy.needs if need in ROWS), None)
        if need is None:
            return NOTHING_TOLD
        named = str(foretold.folder) if need == "guesses" and foretold is not None else ""
        key = (policy, n_caches, named, horizon if named else 0)
        if key not in self._rows:
            guesses, score = None, "probability"
            if need == "guesses" and foretold is not None:
                guesses, score = self._all_guesses(foretold, horizon), foretold.card.score
            trace = self._recorded(*RECORDED.get(need, ()))
            self._rows[key] = told_of(policy, trace, self.work, n_caches, guesses, score)
        return self._rows[key]

    def _all_guesses(self, foretold: PredictionsReader, horizon: int) -> Guesses:
        width = foretold.card.width
        return guesses_of(foretold, self.trace, self.work, horizon=horizon, width=width)

    def _recorded(self, *names: str) -> RoutingTrace:
        """The rows that are replayed, with these columns where the trace has them."""
        there = [name for name in names if name in self.reader.columns]
        if not there:
            return self.trace
        keys = np.sort(keys_of(self.trace.request_T, self.trace.position_T))
        return replayed_rows(self.reader, keys, *there)
