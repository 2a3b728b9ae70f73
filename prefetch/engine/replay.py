"""A workload through the engine: the simulator's table cell, run by a backend instead of a simulated clock.

It knows no weights: what a launch computes is the backend's affair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefetch.engine.backend import COMPUTE, Backend
from prefetch.engine.engine import IN_FLIGHT, Engine
from prefetch.errors import ConfigError
from prefetch.progress import Progress
from prefetch.sim.engines.machine import WAIT, no_guesses
from prefetch.sim.engines.pool import OVERSHOOT, SEQUENTIAL
from prefetch.sim.engines.recorded import Record
from prefetch.sim.engines.run import Timed
from prefetch.sim.tables.cell import Cell
from prefetch.sim.workload import NEVER, Workload


@dataclass(frozen=True, eq=False)
class Ran:
    """What a run was, and everything that it takes to check it."""

    timed: Timed
    record: Record
    copied_bytes: int  # by the backend, one copy after the other


def told_of(cell: Cell, work: Workload) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `Ahead` takes of a cell."""
    budget, guesses = cell.budget, cell.guesses or no_guesses()
    told = (work, cell.policy, budget.room_G, budget.size_L, cell.machine, guesses, cell.semantics)
    return told, {"told": cell.told, "warm": cell.warm.tolist(), "pinned": cell.pinned.tolist()}


def n_slots(cell: Cell, n_experts: int) -> int:
    """Places of a pool that holds all caches of a cell and what lies beside them."""
    n_layers, slots_G = len(cell.machine.bytes_L), cell.budget.slots_G
    n_entries = n_layers * n_experts // len(slots_G)  # that may be in each cache
    beside = cell.machine.staging + cell.machine.landing
    return sum(min(n_entries, slots) for slots in slots_G) + beside


def need_runnable(cell: Cell) -> None:
    """What exists on the simulated clock alone is refused by name."""
    machine, where = cell.machine, "the engine copies what is missing"
    if cell.streams or machine.miss_way != WAIT:
        way = "prompts by whole layers" if cell.streams else "misses computed on the host"
        raise ConfigError(f"{way}: {where}; this row exists with simulator.clock=simulated alone")
    if machine.disk.room_bytes < NEVER:
        raise ConfigError(f"simulator.host_cache: {where} from host memory, which must hold all")
    if cell.semantics in (OVERSHOOT, SEQUENTIAL):
        raise ConfigError(
            "simulator.semantics: a pool of slots cannot hold more than it has; use atomic"
        )
    if len({int(n) for n in machine.bytes_L}) > 1:
        raise ConfigError("experts of different sizes by layer: the pool's slots are of one size")


def run(
    cell: Cell,
    work: Workload,
    make: Callable[[int], Backend],
    *,
    title: str = "running",
    in_flight: int = IN_FLIGHT,
) -> Ran:
    """`make`: the backend with a pool of so many slots, which is closed here."""
    need_runnable(cell)
    slots = n_slots(cell, work.card.n_experts)
    backend = make(slots)
    try:
        told, start = told_of(cell, work)
        return drive(Engine(backend, slots, *told, in_flight=in_flight, **start), work, title)
    finally:
        backend.close()


def drive(engine: Engine, work: Workload, title: str = "running") -> Ran:
    """All steps of a workload. What the start has copied counts for nothing."""
    backend = engine.backend
    before = Counter({**backend.waited_ns, "link_ns": backend.link_ns})
    time_S = _steps(engine, work, title)
    since = Counter({**backend.waited_ns, "link_ns": backend.link_ns})
    since.subtract(before)
    return Ran(_timed(engine, work, time_S, since), engine.record, engine.copied_bytes)


def _steps(engine: Engine, work: Workload, title: str) -> np.ndarray[Any, Any]:
    time_S, n_layers = np.zeros(work.n_steps, np.int64), work.card.n_layers
    with Progress(title, work.n_steps, "steps") as progress:
        for step in range(work.n_steps):
            began = engine.backend.now_ns()
            engine.begin(step * n_layers)
            for event in range(step * n_layers, (step + 1) * n_layers):
                _event(engine, work, step, event)
            engine.wait_for(engine.backend.record(COMPUTE))
            time_S[step] = engine.backend.now_ns() - began
            progress.advance(1)
    return time_S


def _event(engine: Engine, work: Workload, step: int, event: int) -> None:
    accesses = range(int(work.start_V[event]), int(work.start_V[event + 1]))
    if not accesses:
        engine.nothing_needed(event)
        return
    tokens = work.tokens_A[accesses.start : accesses.stop].tolist()
    engine.backend.before(step, event % work.card.n_layers)
    if engine.is_resident:
        engine.resident_event(event, accesses, tokens)
        return
    engine.wait_for(engine.backend.record(COMPUTE))
    engine.event(event, accesses, tokens)


def _timed(
    engine: Engine, work: Workload, time_S: np.ndarray[Any, Any], since: Mapping[str, int]
) -> Timed:
    outcome_A = np.array([engine.outcome[a] for a in range(work.n_accesses)], np.uint8)
    took_ns = int(time_S.sum())
    counts = {**engine.counts, **since, "now_ns": took_ns}
    waited = sum(ns for name, ns in since.items() if name != "link_ns")
    counts["compute_ns"] = max(0, took_ns - waited)  # and whatever the host takes
    resident = sum(len(cache.slot) for cache in engine.caches.caches)
    return Timed(time_S, outcome_A, {name: int(n) for name, n in counts.items()}, resident)
