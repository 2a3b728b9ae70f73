"""`simulator.clock=device`: a cell of a table is run by the engine instead of on a simulated clock.

It knows no table. Weights are drawn, sizes are the model card's, routing is the trace's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefetch.engine.backend import Backend
from prefetch.engine.cpu import CpuBackend
from prefetch.engine.cuda import CudaBackend, need_device
from prefetch.engine.kernel_body import ReplayBody
from prefetch.engine.profiling.device import facts, place_of
from prefetch.engine.replay import Ran, need_runnable, run
from prefetch.engine.weights import Drawn
from prefetch.manifest import sha256_of
from prefetch.sim.engines.run import Timed
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.excerpt import cell_of as cut_cell
from prefetch.sim.tables.excerpt import work_of as cut_work
from prefetch.sim.workload import Workload
from prefetch.trace.card import ModelCard

log = logging.getLogger(__name__)
WARM_STEPS = 20


def _engine() -> str:
    """The code that a measured time is of, as it was imported."""
    here = Path(__file__).parent
    paths = sorted([*here.rglob("*.py"), *(here.parent / "kernels").rglob("*.py")])
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()[:16]


ENGINE_KEY = _engine()


class DeviceClock:
    """Made once for a table: cells share the host's blocks. One cell runs at a time."""

    def __init__(
        self,
        card: ModelCard,
        ids_TLK: NDArray[Any],
        *,
        device: str,
        lookup_bytes: int,
        seed: int,
        rounds: int = 1,
    ) -> None:
        self.device, self.card, self.seed = need_device(device), card, seed
        self.ids_TLK, self.rounds = ids_TLK, rounds
        read = (card.dense_bytes or 0) + (card.shared_bytes or 0) - lookup_bytes
        self.beside_bytes = read // card.n_layers
        self.weights = Drawn(card, self.device, seed)

    @property
    def machine(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        n_threads = torch.get_num_threads()
        return f"{platform.machine()} CPU, {n_threads} thread{'s' * (n_threads != 1)}"

    @property
    def identity(self) -> tuple[str, ...]:
        told = facts(place_of(str(self.device)))
        return (ENGINE_KEY, *map(str, (self.rounds, self.seed, self.beside_bytes, *told.items())))

    def backend(self, work: Workload) -> Callable[[int], Backend]:
        def make(n_slots: int) -> Backend:
            pool_SN = self.weights.pool(n_slots)
            body = ReplayBody(
                pool_SN,
                self.weights.layout,
                work,
                self.ids_TLK,
                beside_bytes=self.beside_bytes,
                seed=self.seed,
            )
            kind = CudaBackend if self.device.type == "cuda" else CpuBackend
            return kind(pool_SN, self.weights.block, body)

        return make

    def ran(self, cell: Cell, work: Workload) -> Ran:
        need_runnable(cell)
        with torch.no_grad():
            return run(cell, work, self.backend(work), title=f"{cell.names.get('way', 'running')}")

    def timed(self, cell: Cell, work: Workload) -> Timed:
        """After a few steps that warm up: of every step the median of `rounds` runs, all else of the first of them."""
        few = min(WARM_STEPS, work.n_steps)
        self.ran(cut_cell(cell, 0, few), cut_work(work, 0, few))
        runs = [self.ran(cell, work).timed for _ in range(self.rounds)]
        took = [int(run.time_S.sum()) for run in runs]
        log.info(
            "%s %s: %d runs, %.1f %% apart",
            cell.names.get("way", ""),
            cell.names.get("policy", ""),
            len(runs),
            100 * (max(took) - min(took)) / max(1, min(took)),
        )
        time_S = np.median([run.time_S for run in runs], axis=0).astype(np.int64)
        counts = {**runs[0].counts, "now_ns": int(time_S.sum())}
        rounds_RS = np.stack([run.time_S for run in runs])
        return dataclasses.replace(runs[0], time_S=time_S, counts=counts, rounds_RS=rounds_RS)
