"""The ways to run a model whose experts do not all fit: which there are at a memory, and their cells.

It runs nothing. Names of ways are those that settings of engines are written from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prefetch.errors import ConfigError
from prefetch.sim.memory import OfMemory
from prefetch.sim.policies.lru import Lru
from prefetch.sim.settings.placement import ALL, BOTH, CACHE, HOST
from prefetch.sim.tables import grid
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell, Refused
from prefetch.sim.tables.grid import CURVE, SPLIT

AHEAD = "cache and prefetch"
KINDS = (ALL, SPLIT, HOST, BOTH, CACHE, AHEAD)  # `best` of the metrics is a place in it
ON_HOST = (SPLIT, HOST)  # whose experts on the GPU need no place in the host's memory
STAYS = "static"  # the policy of those that no copy enters


@dataclass(frozen=True)
class Way:
    kind: str
    policy: str = STAYS
    predictor: str = "none"
    horizon: int = 0


def alone(policies: Sequence[str]) -> Iterator[Way]:
    """Without guesses."""
    yield from (Way(ALL), Way(SPLIT), Way(HOST), Way(BOTH, "lru"))
    yield from (Way(CACHE, policy) for policy in policies)


def ahead(policy: str, predictors: Sequence[str], horizons: Sequence[int]) -> Iterator[Way]:
    for predictor in predictors:
        for horizon in horizons:
            yield Way(AHEAD, policy, predictor, horizon)


def cell_of(bench: Bench, way: Way, memory: OfMemory) -> Cell | Refused:
    """What cannot be at this memory says why."""
    if way.kind == ALL:
        return _everything(bench, memory)
    if way.kind in grid.TODAY:
        return grid.of_today(bench, way.kind, memory)
    horizon = way.horizon or bench.horizons[0]
    return grid.of_grid(bench, way.kind, way.policy, way.predictor, memory, horizon)


def _everything(bench: Bench, memory: OfMemory) -> Cell | Refused:
    """No expert is ever elsewhere."""
    names = grid.names_of(bench, ALL, STAYS, memory, misses="wait")
    n_all = bench.card.n_layers * bench.card.n_experts

    def made() -> Cell:
        budget = bench.budget(memory)
        if budget.experts < n_all:
            raise ConfigError(f"{budget.experts} of {n_all} experts fit")
        machine, warm = bench.machine("wait"), np.arange(n_all)
        return Cell(names=names, policy=Lru(), budget=budget, machine=machine, warm=warm)

    return grid.tried(names, made)


def rungs(bench: Bench) -> list[OfMemory]:
    """Memories at which a curve is drawn, and below which a way may stay: shares of all experts, all, the whole GPU."""
    whole = [bench.share(share).whole_model_bytes for share in (*CURVE, 1.0)]
    most = bench.hardware.device.memory_bytes
    return [OfMemory(n) for n in [*whole, *[most] * (max(whole) > most)] if n <= most]


def host_bytes(bench: Bench, way: Way, on_gpu: int) -> int:
    """Of host memory for experts: of caches all of them, since who leaves the GPU is not copied back."""
    all_bytes = bench.card.n_experts * sum(bench.card.expert_bytes_L or ())
    if way.kind == ALL:
        return 0
    return all_bytes - on_gpu if way.kind in ON_HOST else all_bytes
