"""How good guesses must be before copying ahead pays: the answer with errors, at several speeds of the link.

It knows no predictor. Every true expert is kept with chance `recall`, else a wrong one stands in its place: as many
guesses as there are true experts, all of one score. V events, W guesses per event, E experts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.hardware import Hardware, Lane
from prefetch.sim.tables.cell import NS_PER_MS, Cell
from prefetch.sim.tables.grid import alone
from prefetch.sim.tables.sweep import Job, Kept, run_all
from prefetch.sim.workload import Workload

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench

log = logging.getLogger(__name__)
RECALLS = tuple(tenth / 10 for tenth in range(11))
FACTORS = (0.5, 1.0, 2.0)  # of the link's bandwidth
MOST_STEPS = 2000
SURE = 1_000_000  # a score of 1, in millionths
BLOCK = 4096  # events whose draws are held at once


def required_recall(bench: Bench, chosen: dict[str, Any], kept: Kept) -> pd.DataFrame:
    """A row per bandwidth and recall. `chosen`: policy, capacity and horizon, as the table names them."""
    work = bench.work
    noise = Noise(work, bench.cfg.seed)
    horizon = int(chosen["horizon"]) or bench.horizons[0]
    jobs, names = list[Job](), list[dict[str, Any]]()
    for factor in FACTORS:
        cell = _cell(bench, chosen, factor)
        for recall in (None, *RECALLS):
            guesses = cell.guesses if recall is None else noise.guesses(recall, horizon)
            landing = 0 if recall is None else bench.landing
            machine = cell.machine._replace(landing=landing)
            one = dataclasses.replace(cell, guesses=guesses, machine=machine)
            jobs.append(Job(tpot_of(one, work), ("required recall", one, work)))
            names.append({"bandwidth_factor": factor, "recall": recall})
    how: dict[str, Any] = {"workers": bench.cfg.evaluate.workers, "cluster": bench.cluster}
    rows = run_all(jobs, kept, title="required recall", **how)
    told = {"policy": chosen["policy"], "capacity": chosen["capacity"], "horizon": horizon}
    told |= {"steps": work.n_steps, "requests": len(np.unique(bench.trace.request_T))}
    return _table([name | row for name, row in zip(names, rows, strict=True)], told)


def _cell(bench: Bench, chosen: dict[str, Any], factor: float) -> Cell:
    """The chosen cell without copies ahead, on a link of another speed. What its policy is told, it pays for."""
    cell = alone(bench, str(chosen["policy"]), str(chosen["capacity"]))
    machine = bench.machine(bench.simulator.misses, hardware=with_link(bench.hardware, factor))
    return dataclasses.replace(cell, machine=machine._replace(predict_ns=cell.machine.predict_ns))


def with_link(hardware: Hardware, factor: float) -> Hardware:
    """The same machine, with copies at so many times the bandwidth; latency and the host's costs stay."""

    def times(lane: Lane) -> Lane:
        rates = tuple((size, max(1, round(rate * factor))) for size, rate in lane.bytes_per_s)
        return dataclasses.replace(lane, bytes_per_s=rates)

    link = hardware.link
    link = dataclasses.replace(link, pinned=times(link.pinned), pageable=times(link.pageable))
    return dataclasses.replace(hardware, link=link)


def tpot_of(cell: Cell, work: Workload) -> Any:
    """A job's work: milliseconds per generated token."""

    def run() -> dict[str, Any]:
        took_ns = int(cell.run(work).time_S[work.is_decode_S].sum())
        return {"tpot_ms": took_ns / max(1, int(work.decode_S.sum())) / NS_PER_MS}

    return run


def _table(rows: list[dict[str, Any]], told: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    without = table[table.recall.isna()].set_index("bandwidth_factor").tpot_ms
    table = table[table.recall.notna()].reset_index(drop=True)
    table["no_prefetch_tpot_ms"] = table.bandwidth_factor.map(without)
    for factor, part in table.groupby("bandwidth_factor"):
        least = break_even(part.recall.tolist(), part.tpot_ms.tolist(), float(without[factor]))
        table.loc[part.index, "break_even_recall"] = least
    return table.assign(recall=table.recall.astype(float), **told)


def break_even(recalls: Sequence[float], tpot_ms: Sequence[float], without_ms: float) -> float:
    """The recall from which on guesses are not slower than none; NaN where true ones are not faster.

    Between two recalls the times lie on a straight line.
    """
    lost = [ms - without_ms for ms in tpot_ms]
    if lost[-1] >= 0:
        return float("nan")
    losing = [i for i, ms in enumerate(lost) if ms > 0]
    if not losing:
        return recalls[0]
    i = losing[-1]
    return recalls[i] + (recalls[i + 1] - recalls[i]) * lost[i] / (lost[i] - lost[i + 1])


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance says of every event, whatever the recall: so that a higher one only adds true experts."""

    true_VW: NDArray[np.int32]  # EMPTY beyond the last, and where nothing is guessed
    wrong_VW: NDArray[np.int32]  # EMPTY where no wrong one is left
    chance_VW: NDArray[np.float64]


class Noise:
    """Guesses of any recall about one workload. Steps with prompts are not guessed, as with predictors."""

    def __init__(self, work: Workload, seed: int) -> None:
        true_VW = true_experts(work, np.repeat(work.prefill_S == 0, work.card.n_layers))
        rng = np.random.default_rng(seed)
        chance_VW = rng.random(true_VW.shape)
        parts = [
            _wrong(true_VW[at : at + BLOCK], work.card.n_experts, rng)
            for at in range(0, len(true_VW), BLOCK)
        ]
        wrong_VW = np.concatenate(parts) if parts else true_VW
        self.draws = Draws(true_VW, wrong_VW, chance_VW)

    def guesses(self, recall: float, ahead: int) -> Guesses:
        draws = self.draws
        ids_VW = np.where(draws.chance_VW < recall, draws.true_VW, draws.wrong_VW)
        ids_VW[draws.true_VW == EMPTY] = EMPTY
        order = np.argsort(ids_VW == EMPTY, axis=1, kind="stable")  # nobody stands last
        ids_VW = np.ascontiguousarray(np.take_along_axis(ids_VW, order, axis=1))
        return Guesses(ids_VW, np.full(ids_VW.shape, SURE, np.int64), ahead)


def true_experts(work: Workload, is_asked_V: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[V, W] whom the events that are asked about need, in their order; W is the most that any of them does."""
    size_V = np.diff(work.start_V)
    width = int(size_V[is_asked_V].max(initial=1))
    true_VW = np.full((len(size_V), width), EMPTY, np.int32)
    event_A = np.repeat(np.arange(len(size_V)), size_V)
    place_A = np.arange(work.n_accesses) - work.start_V[event_A]
    is_asked_A = is_asked_V[event_A]
    true_VW[event_A[is_asked_A], place_A[is_asked_A]] = work.ids_A[is_asked_A]
    return true_VW


def _wrong(
    true_VW: NDArray[np.int32], n_experts: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """As many different experts that the event does not need, at random; EMPTY once there are no more."""
    draw_VE = rng.random((len(true_VW), n_experts + 1), dtype=np.float32)
    np.put_along_axis(draw_VE, np.where(true_VW == EMPTY, n_experts, true_VW), 2.0, axis=1)
    draw_VE[:, n_experts] = 2.0  # stands for nobody
    width = min(true_VW.shape[1], n_experts)
    first_VW = np.argsort(draw_VE, axis=1, kind="stable")[:, :width]
    is_wrong_VW = np.take_along_axis(draw_VE, first_VW, axis=1) < 2.0
    return np.where(is_wrong_VW, first_VW, EMPTY).astype(np.int32)
