"""The cells of a validation: what is run, what the simulator says of it, and what the engine did.

It compares nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from prefetch import leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.clock import DeviceClock
from prefetch.engine.cuda import need_device
from prefetch.engine.replay import Ran, n_slots, need_runnable, told_of
from prefetch.engine.validating.costs import Costs
from prefetch.errors import ConfigError
from prefetch.models.cards import card_names, load_architecture
from prefetch.sim.engines.pool import HIT
from prefetch.sim.engines.recorded import Recorded
from prefetch.sim.engines.run import Timed
from prefetch.sim.limits.bounds import compute_S
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.excerpt import cell_of as cut_cell
from prefetch.sim.tables.excerpt import work_of as cut_work
from prefetch.sim.tables.grid import cell_of
from prefetch.sim.tables.needed import Noise
from prefetch.sim.workload import Workload

log = logging.getLogger(__name__)
NS_PER_MS = 1e6
OWN = "own"  # among model cards: the trace's own sizes
WARM = 0.1  # of the steps, that no time counts
# what is run where nothing was asked for
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 24, "capacities": [0.25, 0.5], "horizons": [0, 4], "batches": [1, 4]},
    "cuda": {
        "steps": 220,
        "capacities": [0.25, 0.5, 1.0],
        "horizons": [0, 1, 4],
        "batches": [1, 4, 16],
    },
}


@dataclass(frozen=True, eq=False)
class Case:
    """One cell, with the costs of its parts in its machine. `ran` is the engine's."""

    names: dict[str, Any]
    cell: Cell
    work: Workload
    clock: DeviceClock
    by_file: Cell | None = None  # with the costs of a measured hardware file instead
    hardware: str = ""  # what the chosen one has to do with it
    said: list[Timed] = field(default_factory=list)  # what the simulator said

    def predicted(self) -> dict[str, Any]:
        self.said.append(self.cell.run(self.work))
        said, machine = self.said[0], self.cell.machine
        resident_S = compute_S(self.work, machine)
        layer_A = np.repeat(
            np.tile(np.arange(self.work.card.n_layers), self.work.n_steps),
            np.diff(self.work.start_V),
        )
        missing_A = said.outcome_A != HIT
        copies_S = np.add.reduceat(missing_A * machine.whole_ns_L[layer_A], self._first_A)
        return {
            **self.names,
            "predicted_ms": self._tpot_ms(said.time_S),
            "predicted_hit_rate": float((~missing_A).mean()),
            "predicted_bytes": said.counts["moved_bytes"],
            "predicted_stall": _stalled(said),
            "roofline_ms": self._tpot_ms(resident_S),  # every expert resident
            "constants_ms": self._tpot_ms(resident_S + copies_S),  # a copy's time for each miss
            "file_ms": self._file_ms(),
        }

    def measured(self) -> dict[str, Any]:
        ran, said = self.ran(), self.said[0]
        decided_A, moved = self._again(ran, said)
        return {
            "measured_ms": self._tpot_ms(ran.timed.time_S),
            "measured_hit_rate": float((ran.timed.outcome_A == HIT).mean()),
            "measured_stall": _stalled(ran.timed),
            "hits_equal": bool((ran.timed.outcome_A == decided_A).all()),
            "bytes_equal": ran.copied_bytes == moved == ran.timed.counts["moved_bytes"],
        }

    def ran(self) -> Ran:
        return self.clock.ran(self.cell, self.work)

    def _again(self, ran: Ran, said: Timed) -> tuple[NDArray[np.integer], int]:
        """Outcomes and bytes of the simulator: its own; with guesses, for the order of events on the device."""
        if self.cell.guesses is None:
            return said.outcome_A, said.counts["moved_bytes"]
        told, start = told_of(self.cell, self.work)
        again = Recorded(*told, **start).run(ran.record)
        return np.array(again.outcome), again.counts["moved_bytes"]

    def _file_ms(self) -> float:
        """NaN without a file of this machine."""
        return self._tpot_ms(self.by_file.run(self.work).time_S) if self.by_file else math.nan

    @property
    def _first_A(self) -> NDArray[np.int64]:
        return self.work.start_V[: -1 : self.work.card.n_layers]

    def _tpot_ms(self, time_S: NDArray[np.int64]) -> float:
        counted_S = self.work.is_decode_S.copy()
        counted_S[: int(WARM * len(counted_S))] = False
        return (
            float(time_S[counted_S].sum() / max(1, self.work.decode_S[counted_S].sum())) / NS_PER_MS
        )


def _stalled(timed: Timed) -> float:
    waited = timed.counts["stall_ns"] + timed.counts["late_stall_ns"]
    return waited / max(1, timed.counts["now_ns"])


def check(cfg: Config) -> None:
    told = cfg.validate
    for name in ("model_cards", "capacities", "policies", "horizons", "batches"):
        if getattr(told, name) is not None and not len(getattr(told, name)):
            raise ConfigError(f"validate.{name}=[]: names nothing; give at least one")
    least = {"horizons": 0, "batches": 1}
    for name, low in least.items():
        values = list(getattr(told, name) or [])
        if any(value < low for value in values):
            raise ConfigError(f"validate.{name}={values}: each must be at least {low}")
    if told.repeats < 2:
        raise ConfigError(
            f"validate.repeats={told.repeats}: the engine's own spread needs at least 2"
        )
    if told.steps is not None and told.steps < 10:
        raise ConfigError(f"validate.steps={told.steps}: must be at least 10")
    if not 0 <= told.recall <= 1:
        raise ConfigError(f"validate.recall={told.recall}: must be from 0 to 1")


def cases_of(cfg: Config, store: Store) -> list[Case]:
    cfg = _with_defaults(cfg)
    told = cfg.validate.model_cards
    cards = _usual(cfg, Bench(_root(cfg, None, 1), store)) if told is None else list(told)
    cases = [case for card in cards for case in _of_card(cfg, card, store)]
    if not cases:
        raise ConfigError("validate: no cell of the grid fits into this device's memory")
    return cases


def _with_defaults(cfg: Config) -> Config:
    """What was not asked for is what the device runs in a minute or two."""
    usual = DEFAULTS[need_device(cfg.simulator.device).type]
    told = {name: value for name, value in usual.items() if getattr(cfg.validate, name) is None}
    return cast(Config, OmegaConf.merge(cast(DictConfig, cfg), {"validate": told}))


def _root(cfg: Config, card: str | None, batch: int) -> Config:
    """Guesses are drawn here, so that no predictor is needed."""
    told: dict[str, Any] = {"simulator": {"batch": batch}}
    if card is not None:
        told["simulator"] |= {"model_card": None if card == OWN else card}
    merged = cast(Config, OmegaConf.merge(cast(DictConfig, cfg), told))
    return leaves.with_choice(merged, "predictor", "none")


def told_of_hardware(bench: Bench) -> str:
    """What the hardware that was chosen has to do with a validation."""
    name, kind = bench.hardware.name, bench.hardware.kind
    if bench.hardware.is_measured:
        return f"hardware={name} ({kind}) predicts beside, in a column of its own."
    return (
        f"hardware={name} is a {kind}: no number of it enters here. With hardware=measured the error of that file is "
        "found as well, and on a GPU written into it."
    )


def _usual(cfg: Config, bench: Bench) -> list[str | None]:
    """The trace's own sizes, and the smallest shipped model with as many experts."""
    shipped = {name: load_architecture(name).card(None, None) for name in card_names()}
    fitting = {
        name: card
        for name, card in shipped.items()
        if card.n_experts == bench.card.n_experts
        and card.expert_precision in ("bf16", "fp16", "fp32")
    }
    other = min(fitting, key=lambda name: (fitting[name].expert_bytes_L or (0,))[0], default=None)
    if other is None:
        log.warning("no shipped model card has %d experts: one card is run", bench.card.n_experts)
    return [cfg.simulator.model_card, other] if other else [cfg.simulator.model_card]


def _of_card(cfg: Config, card: str | None, store: Store) -> Iterator[Case]:
    """Cells of one model card share its drawn weights."""
    clock: DeviceClock | None = None
    for batch in cfg.validate.batches or []:
        bench = Bench(_root(cfg, card, batch), store)
        clock = clock or _clock_of(cfg, bench)
        yield from _of_bench(cfg, bench, clock)


def _clock_of(cfg: Config, bench: Bench) -> DeviceClock:
    return DeviceClock(
        bench.card,
        bench.trace.ids_TLK,
        device=cfg.simulator.device,
        lookup_bytes=bench.beside.lookup_bytes,
        seed=cfg.seed,
    )


def _fits(clock: DeviceClock, cell: Cell, names: dict[str, Any]) -> bool:
    """A pool that this device cannot hold is no reason to leave the others out."""
    try:
        clock.weights.need(n_slots(cell, clock.card.n_experts))
    except ConfigError as reason:
        log.warning("not run: %s, cache %s: %s", names["model_card"], names["capacity"], reason)
        return False
    return True


def _of_bench(cfg: Config, bench: Bench, clock: DeviceClock) -> Iterator[Case]:
    """Cells of one batch share what was timed alone."""
    told, steps = cfg.validate, min(cfg.validate.steps or 0, bench.work.n_steps)
    work = cut_work(bench.work, 0, steps)
    if not work.is_decode_S[int(WARM * steps) :].any():
        raise ConfigError(
            f"validate.steps={steps}, batch {bench.simulator.batch}: the first steps are prompts, and no token is "
            "generated after the first tenth; give more validate.steps or smaller validate.batches"
        )
    costs, noise = Costs(clock, work), Noise(work, cfg.seed)
    for policy, capacity, horizon in itertools.product(
        told.policies, told.capacities or [], told.horizons or []
    ):
        names = {
            "model_card": bench.card.name,
            "batch": bench.simulator.batch,
            "policy": policy,
            "capacity": str(capacity),
            "horizon": horizon,
        }
        cell = cell_of(bench, "validate", policy, "none", capacity, max(1, horizon))
        need_runnable(cell)
        cell = cut_cell(cell, 0, steps)
        guesses = noise.guesses(told.recall, horizon) if horizon else None
        cell = dataclasses.replace(cell, guesses=guesses)
        if not _fits(clock, cell, names):
            continue
        by_file = cell if bench.hardware.is_measured else None
        cell = dataclasses.replace(cell, machine=costs.machine(cell))
        cell = dataclasses.replace(cell, machine=costs.with_launches(cell))
        yield Case(names, cell, work, clock, by_file, told_of_hardware(bench))
