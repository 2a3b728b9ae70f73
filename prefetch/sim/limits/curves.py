"""Between which hit rates every policy lies: LRU and the optimum at many capacities, without a clock.

LRU comes from one pass over each layer's stack where that is exact: a cache per layer, experts of one size, and room
for the largest event. Everything else is replayed. E experts, L layers, D distances, V events, A accesses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.sim.engines.machine import MISSES, WAIT
from prefetch.sim.engines.pool import ATOMIC, HIT
from prefetch.sim.engines.run import replay
from prefetch.sim.limits.stacks import LruStacks
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.excerpt import work_of
from prefetch.sim.tables.grid import sized
from prefetch.sim.tables.rows import counted_S
from prefetch.sim.tables.sweep import Job, Kept, run_all
from prefetch.sim.workload import Workload, counts_of

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench

MOST_SIZES = 32
NOBODY = np.iinfo(np.uint16).max
STEPS = 1 << 12  # whose events are looked at together


def hit_rate_curves(bench: Bench, kept: Kept) -> pd.DataFrame:
    """A row per capacity: experts, their share of all, hit rates. Empty where misses do not fill a cache at once."""
    if MISSES.index(bench.simulator.misses) != WAIT:
        return pd.DataFrame()
    work, n_experts = bench.work, bench.card.n_experts
    sizes = np.unique(np.linspace(1, n_experts, min(n_experts, MOST_SIZES)).astype(int)).tolist()
    lru, best = ([sized(bench, name, size) for size in sizes] for name in ("lru", "belady"))
    known = lru_by_stacks(work) if all(map(_is_plain, lru, sizes)) else {}
    replayed = [i for i, size in enumerate(sizes) if size not in known]
    jobs = [_job(work, cell) for cell in (*best, *(lru[i] for i in replayed))]
    how: dict[str, Any] = {"workers": bench.cfg.evaluate.workers, "cluster": bench.cluster}
    rates = [row["hit_rate"] for row in run_all(jobs, kept, title="hit rates", **how)]
    known |= dict(zip((sizes[i] for i in replayed), rates[len(sizes) :], strict=True))
    return pd.DataFrame(
        {
            "capacity_experts": [cell.budget.experts for cell in lru],
            "share": [size / n_experts for size in sizes],
            "lru": [known[size] for size in sizes],
            "optimum": rates[: len(sizes)],
        }
    )


def _is_plain(cell: Cell, size: int) -> bool:
    """One cache per layer, all of this size, empty at the start."""
    is_equal = cell.budget.room_G == (size,) * len(cell.budget.size_L)
    return is_equal and cell.semantics == ATOMIC and not len(cell.warm) + len(cell.pinned)


def _job(work: Workload, cell: Cell) -> Job:
    """Without a clock; what it costs in time does not count."""
    rooms, sizes = cell.budget.room_G, cell.budget.size_L
    start: dict[str, Any] = {"told": cell.told, "warm": cell.warm, "pinned": cell.pinned}
    is_counted_S, first_S = counted_S(work), work.start_V[:: work.card.n_layers]
    accesses = np.diff(first_S)[is_counted_S].sum()

    def run() -> dict[str, Any]:
        outcome_A = replay(work, cell.policy, rooms, sizes, cell.semantics, **start)
        hits = counts_of(outcome_A, HIT, first_S)[is_counted_S].sum()
        return {"hit_rate": float(hits / accesses)}

    return Job(run, ("hit rate", work, cell.policy, rooms, sizes, cell.semantics, start))


def lru_by_stacks(work: Workload) -> dict[int, float]:
    """Hit rates of one LRU cache per layer at every capacity from the size of the largest event on."""
    n_layers, n_experts = work.card.n_layers, work.card.n_experts
    largest = int(np.diff(work.start_V).max(initial=1))
    is_counted_S = counted_S(work)
    stacks = LruStacks(n_layers, n_experts, largest)
    for first in range(0, work.n_steps, STEPS):
        part = work_of(work, first, min(first + STEPS, work.n_steps))
        ids_TLK = _events_in_rows(part, largest)
        class_T = is_counted_S[first : first + STEPS].astype(np.uint8)
        stacks.replay_layers(range(n_layers), ids_TLK, class_T, int(NOBODY))
    hist_D = stacks.hist_LCD[:, 1].sum(axis=0)
    hits_D, accesses = np.append(0, hist_D[:-1].cumsum()), max(1, int(hist_D.sum()))
    return {size: float(hits_D[size] / accesses) for size in range(largest, n_experts + 1)}


def _events_in_rows(work: Workload, largest: int) -> NDArray[np.uint16]:
    """[S, L, K] the experts of every event, then nobody."""
    size_V = np.diff(work.start_V)
    ids_VK = np.full((len(size_V), largest), NOBODY, np.uint16)
    event_A = np.repeat(np.arange(len(size_V)), size_V)
    ids_VK[event_A, np.arange(work.n_accesses) - work.start_V[event_A]] = work.ids_A
    return ids_VK.reshape(work.n_steps, work.card.n_layers, largest)
