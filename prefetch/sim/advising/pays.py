"""Does copying ahead pay: how much a predictor wins on this link, on which links it would, and how good it must be.

It knows no way but caches that fill, with guesses and without. Times are of the same excerpt, in milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from prefetch.sim.advising.ways import Way, cell_of
from prefetch.sim.engines.pool import MISS
from prefetch.sim.memory import OfMemory
from prefetch.sim.settings.placement import CACHE
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell, Refused
from prefetch.sim.tables.needed import required_recall, tpot_of, with_link
from prefetch.sim.tables.sweep import Job, Kept, run_all

FACTORS = tuple(2.0**power for power in range(-4, 7))  # of the link's bandwidth
MATTERS = 0.01  # of the time per token: what is won or lost below it is nothing


@dataclass(frozen=True)
class Pays:
    """NaN where there is no such number: no recall, or no link, suffices."""

    way: Way  # the fastest that copies ahead
    ms: float
    without_ms: float  # the same policy without guesses
    perfect_ms: float  # with true guesses
    break_even_recall: float
    break_even_gb_s: float
    link_gb_s: float
    recall: float  # of what the cache without guesses misses
    copy_us: float  # of one expert
    layer_us: float  # of a layer with all experts there
    by_link: dict[float, tuple[float, float]]  # factor: without guesses, with them

    @property
    def gain(self) -> float:
        """Share of the time without guesses."""
        return 1 - self.ms / self.without_ms

    @property
    def horizon_needed(self) -> int:
        """Layers whose computation is as long as one copy."""
        return math.ceil(self.copy_us / self.layer_us)


def pays(bench: Bench, way: Way, memory: OfMemory, kept: Kept) -> Pays | None:
    """`way` copies ahead. None where the cell cannot run."""
    cell, alone = cell_of(bench, way, memory), cell_of(bench, Way(CACHE, way.policy), memory)
    if isinstance(cell, Refused) or isinstance(alone, Refused):
        return None
    chosen = {"policy": way.policy, "capacity": str(memory), "horizon": way.horizon}
    needed = required_recall(bench, chosen, kept)
    here = needed[needed.bandwidth_factor == 1]
    by_link = _by_link(bench, cell, alone, kept)
    link = bench.hardware.link
    lane = link.pinned if bench.simulator.is_pinned else link.pageable
    gb_s = lane.bytes_per_s[-1][1] / 1e9
    copy_ns = link.copy_ns(
        max(bench.card.expert_bytes_L or ()), is_pinned=bench.simulator.is_pinned
    )
    return Pays(
        way=way,
        ms=by_link[1.0][1],
        without_ms=by_link[1.0][0],
        perfect_ms=float(here[here.recall == 1].tpot_ms.iloc[0]),
        break_even_recall=float(here.break_even_recall.iloc[0]),
        break_even_gb_s=gb_s * slowest_that_pays(by_link),
        link_gb_s=gb_s,
        recall=miss_recall(bench, cell, alone),
        copy_us=copy_ns / 1e3,
        layer_us=bench.full_ns * tokens_of_a_step(bench) / 1e3 / bench.card.n_layers,
        by_link=by_link,
    )


def _by_link(bench: Bench, cell: Cell, alone: Cell, kept: Kept) -> dict[float, tuple[float, float]]:
    """The same guesses on slower and faster links."""
    jobs = list[Job]()
    for factor in FACTORS:
        hardware = with_link(bench.hardware, factor)
        machine = bench.machine(bench.simulator.misses, hardware=hardware)
        for one in (alone, cell):
            own = machine._replace(predict_ns=one.machine.predict_ns, landing=one.machine.landing)
            made = dataclasses.replace(one, machine=own)
            jobs.append(Job(tpot_of(made, bench.work), ("link", made, bench.work)))
    rows = run_all(jobs, kept, workers=bench.cfg.evaluate.workers, title="other links")
    ms = [float(row["tpot_ms"]) for row in rows]
    return dict(zip(FACTORS, zip(ms[::2], ms[1::2], strict=True), strict=True))


def slowest_that_pays(by_link: dict[float, tuple[float, float]]) -> float:
    """As a factor of the link's bandwidth: from it on guesses win, until copies are too fast to matter.

    Between two links gains lie on a straight line over the logarithm of the bandwidth.
    """
    factors = sorted(by_link)
    gains = [1 - by_link[factor][1] / by_link[factor][0] for factor in factors]
    first = next((i for i, gain in enumerate(gains) if gain > MATTERS), None)
    if first is None:
        return math.nan
    if first == 0:
        return factors[0]
    low, high = math.log(factors[first - 1]), math.log(factors[first])
    share = (MATTERS - gains[first - 1]) / (gains[first] - gains[first - 1])
    return math.exp(low + (high - low) * share)


def miss_recall(bench: Bench, cell: Cell, alone: Cell) -> float:
    """Of what the cache without guesses misses, as far as anybody guesses about it, the share that is guessed.

    That is what copies ahead can win. Guesses that are drawn find as much of it as of anything else.
    """
    if cell.guesses is None:
        return math.nan
    work, ids_VW = bench.work, cell.guesses.ids_VW
    is_miss_A = alone.run(work).outcome_A == MISS
    event_A = np.repeat(np.arange(len(ids_VW)), np.diff(work.start_V))[is_miss_A]
    is_asked_A = (ids_VW[event_A] >= 0).any(axis=1)
    is_guessed_A = (ids_VW[event_A] == work.ids_A[is_miss_A, None]).any(axis=1)
    return float(is_guessed_A.sum() / is_asked_A.sum()) if is_asked_A.any() else math.nan


def tokens_of_a_step(bench: Bench) -> float:
    work = bench.work
    return float(work.decode_S[work.is_decode_S].mean()) if work.is_decode_S.any() else 1.0
