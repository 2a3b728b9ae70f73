"""What the cells of a table share: the rows that are replayed, the model's sizes, the machine's costs, the guesses.

It knows no predictor, guesses come from the store as files; and no cell: see `grid`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from prefetch import leaves
from prefetch.artifacts import Store
from prefetch.cluster.mapping import Cluster, cluster_of
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.sim.chosen import hardware_of
from prefetch.sim.clock import SIMULATED, clock_of
from prefetch.sim.code import own_code
from prefetch.sim.costs import machine_of, need_host_memory
from prefetch.sim.engines.machine import ADMITS, Guesses
from prefetch.sim.engines.run import Timed
from prefetch.sim.foresight import guessed_rows, guesses_of
from prefetch.sim.hardware import Hardware
from prefetch.sim.lending import replayed_with
from prefetch.sim.limits.bounds import Bound, bound_of, compute_S
from prefetch.sim.memory import Budget, OfMemory, budget_of
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.sim.tables.apart import bound_apart, bound_key, row_apart, unless_refused
from prefetch.sim.tables.asked import check_asked
from prefetch.sim.tables.cell import CHEATS, REFUSALS, Cell
from prefetch.sim.tables.excerpt import first_requests
from prefetch.sim.tables.intervals import units_of
from prefetch.sim.tables.names import name_of
from prefetch.sim.tables.others import Others, most_used, replayed_rows
from prefetch.sim.tables.prior import Prior
from prefetch.sim.tables.resumed import Resumed
from prefetch.sim.tables.rows import Beside as RowBeside
from prefetch.sim.tables.rows import row_of
from prefetch.sim.tables.sweep import Apart, Job
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import PREFILL, RoutingTrace

log = logging.getLogger(__name__)
Foretold = tuple[Guesses, PredictionsReader]


class Bench:
    """What concerns every cell is checked here, before anything is made."""

    def __init__(self, cfg: Config, store: Store) -> None:
        self.cfg, self.store, self.simulator = cfg, store, cfg.simulator
        self.hardware: Hardware = hardware_of(cfg, store)
        check_asked(cfg, self.predictors)
        self.policy = cache(self._policy)  # cells share them
        self._choices: dict[tuple[str, str], Config] = {}
        self._check_names()
        made = store.make(leaves.locate(cfg.makers["trace"])(cfg))
        self.reader, self.key = TraceReader(made.folder), made.key
        self.card, self.beside = replayed_with(self.reader.card, self.simulator)
        if self.simulator.host_cache is None:
            need_host_memory(self.card, self.hardware)
        self._one_by_one = threading.Lock()
        trace, self.others = self._parts()
        work = self._workload(trace, self.simulator.phase)
        self.prior = Prior(self.simulator, self.reader, trace, self.others, work)
        self._replays(trace, work)
        if not self.work.n_accesses:
            raise ConfigError("nothing to replay: no executed row of the chosen requests and phase")
        self.machine(self.simulator.misses)  # its mistakes concern every cell

    def _replays(self, trace: RoutingTrace, work: Workload) -> None:
        """Everything that is about what is replayed."""
        self.trace, self.work = trace, work
        self.prior = self.prior.about(trace, work)
        self.machine: Callable[..., Any] = cache(self._machine)
        self._full_ns: float | None = None
        self._measured: dict[Any, Timed] = {}
        self._bounds: dict[Any, Bound] = {}
        self._guesses: dict[tuple[str, int], Foretold | Exception] = {}
        self.units = units_of(work, trace.request_T)

    def beginning(self, most_steps: int) -> Bench:
        """The same about the first whole requests that take so many steps at most; of a longer first one, so many."""
        if self.work.n_steps <= most_steps:
            return self
        part = copy.copy(self)
        trace = first_requests(self.trace, most_steps, self._part)
        part._replays(trace, self._part(trace))
        return part

    def at(self, memory: OfMemory) -> Bench:
        """The same for a GPU of which so much may be used."""
        part, told = copy.copy(self), {"memory": memory.amount}
        part.cfg = cast(Config, OmegaConf.merge(cast(DictConfig, self.cfg), told))
        part._choices = {}
        return part

    def on(self, hardware: Hardware) -> Bench:
        """The same on another machine."""
        part = copy.copy(self)
        part.hardware = hardware
        part._replays(self.trace, self.work)
        return part

    def job(self, cell: Cell, *, must_run: bool = False) -> Job:
        """Its row; of a cell that cannot run, why, unless it must."""

        def run() -> dict[str, Any]:
            return unless_refused(cell, lambda: self.row(cell), must_run=must_run)

        shown = (self.full_ns, self.units, self.cfg.seed)
        bound = partial(bound_apart, cell, self.work, self.hardware.link.latency_ns)
        apart = Apart(
            partial(row_apart, cell, self.work, *shown, must_run=must_run),
            (bound_key(cell), bound),
            ", ".join(map(str, cell.names.values())),
        )
        return Job(run, ("cell", cell, self.work, self.hardware, *shown), apart)

    def _part(self, trace: RoutingTrace) -> Workload:
        """Of some of the rows that are replayed, with prompts run as in the whole."""
        has_prompts_only = bool((trace.phase_T[trace.executed_T] == PREFILL).all())
        if has_prompts_only and not self.work.is_teacher_forced:
            return self._workload(trace, "prefill")
        return self._workload(trace, self.simulator.phase)

    def _workload(self, trace: RoutingTrace, phase: str) -> Workload:
        told = self.simulator
        return workload_of(trace, batch=told.batch, chunk=told.chunk, phase=phase)

    def _check_names(self) -> None:
        """Whoever is named exists; the code of policies is told now, as it was imported."""
        for name in self.policies:
            own_code(type(self.policy(name)).__module__)
        for name in self.predictors:
            self._choosing("predictor", name)

    def _choosing(self, group: str, name: str) -> Config:
        """A copy of the whole configuration each: made once."""
        if name == name_of(self.cfg, group):
            return self.cfg
        if (group, name) not in self._choices:
            self._choices[group, name] = leaves.with_choice(self.cfg, group, name)
        return self._choices[group, name]

    def _policy(self, name: str) -> Policy:
        chosen = self._choosing("policy", name).policy
        return cast(Policy, leaves.instantiate(chosen, "policy"))

    @property
    def root(self) -> dict[str, Any]:
        """What the cell chosen at the root is called in a table."""
        predictor = name_of(self.cfg, "predictor")
        return {
            "policy": name_of(self.cfg, "policy"),
            "predictor": predictor,
            "capacity": str(self.simulator.cache if self.cfg.memory is None else self.cfg.memory),
            "horizon": 0 if predictor == "none" else self.simulator.horizon,
        }

    @property
    def predictors(self) -> list[str]:
        return list(self.cfg.evaluate.predictors or [name_of(self.cfg, "predictor")])

    @property
    def policies(self) -> list[str]:
        return list(self.cfg.evaluate.policies or [name_of(self.cfg, "policy")])

    @property
    def capacities(self) -> list[Any]:
        if self.cfg.memory is not None:
            return [OfMemory(self.cfg.memory)]
        return list(self.cfg.evaluate.capacities or [self.simulator.cache])

    @property
    def horizons(self) -> list[int]:
        return list(self.cfg.evaluate.horizons or [self.simulator.horizon])

    def _parts(self) -> tuple[RoutingTrace, Others]:
        """What is replayed, and all other rows: those that a static choice may be fitted on."""
        if self.simulator.requests == "all":
            whole = self.reader.load()
            return whole, Others(whole, np.empty(0, np.int64))
        reader = self._predictions("none", self.horizons[0])
        keys, fitted = guessed_rows(reader), reader.card.fitted_here
        # no copies of what is asked; else a request is split in time
        is_apart = not {*reader.card.requests} & {*fitted}
        only = np.array(sorted(fitted), np.int64) if is_apart else None
        return replayed_rows(self.reader, keys), Others(self.reader, keys, only)

    def _predictions(self, name: str, horizon: int) -> PredictionsReader:
        made = self.store.make(self._asked(name, horizon))
        reader, card = PredictionsReader(made.folder), self.reader.card
        reader.check_fits(trace=self.key, n_experts=card.n_experts, n_layers=card.n_layers)
        return reader

    def has_guesses(self, name: str, horizon: int) -> bool:
        """Were they made before?"""
        try:
            return self.store.has(self._asked(name, horizon))
        except REFUSALS:  # what it needs is not configured
            return False

    def cheats(self, name: str, horizon: int) -> bool:
        return self.guesses(name, horizon)[1].card.causality == CHEATS

    def _asked(self, name: str, horizon: int) -> Any:
        """The recipe of a predictor's guesses."""
        cfg, changes = self._choosing("predictor", name), dict[str, Any]()
        if horizon not in cfg.train.horizons:
            changes["horizons"] = sorted({*cfg.train.horizons, horizon})
        if self.simulator.width is not None and self.simulator.width > 2 * self.reader.card.top_k:
            changes["width"] = self.simulator.width
        asked = cast(Config, OmegaConf.merge(cast(DictConfig, cfg), {"train": changes}))
        return leaves.locate(self.cfg.makers["predictions"])(asked, 0)

    def budget(self, capacity: Any, predictor_bytes: int = 0, landing: int = 0) -> Budget:
        """Of a cache as it is written, or of what a memory leaves."""
        is_memory = isinstance(capacity, OfMemory)
        return self._budget(
            cache=None if is_memory else capacity,
            memory=capacity.amount if is_memory else None,
            predictor_bytes=predictor_bytes,
            staging=self.simulator.staging + landing,
            split=self.prior.split(),
        )

    def share(self, share: float, predictor_bytes: int = 0, landing: int = 0) -> Budget:
        """Of a cache of this share of all experts, or of so many per layer, whatever memory was named."""
        return self._budget(
            cache=share,
            predictor_bytes=predictor_bytes,
            staging=self.simulator.staging + landing,
            split=self.prior.split(of_any_size=True),
        )

    def as_large(self, capacity: Any, more_bytes: int) -> Budget:
        """Of cells without guesses that may use as much memory as one whose guesses take so many bytes."""
        staging, split = self.simulator.staging, self.prior.split()
        return self._budget(cache=capacity, staging=staging, split=split, more_bytes=more_bytes)

    def _budget(self, **asked: Any) -> Budget:
        told = self.simulator
        about: dict[str, Any] = {"scope": told.scope, "context": told.context, "batch": told.batch}
        return budget_of(self.card, self.hardware, **about, **asked)

    def _machine(
        self, misses: str, predictor_us: float = 0.0, hardware: Hardware | None = None
    ) -> Any:
        told = self.simulator
        return machine_of(
            self.card,
            hardware or self.hardware,
            self.work,
            beside=self.beside,
            misses=misses,
            staging=told.staging,
            is_pinned=told.is_pinned,
            predictor_us=predictor_us,
            uploads=told.uploads,
            budget=told.budget,
            queue=told.queue,
            host_cache=told.host_cache,
        )

    @property
    def landing(self) -> int:
        """Places beside the cache for guesses."""
        is_beside = self.simulator.admit == ADMITS[1]
        return (self.simulator.landing or self.card.top_k) * is_beside

    def guesses(self, name: str, horizon: int) -> Foretold:
        """Read once: the cells of a table share them, and that they cannot be had."""
        if (name, horizon) not in self._guesses:
            try:
                self._guesses[name, horizon] = self._read_guesses(name, horizon)
            except REFUSALS as reason:
                self._guesses[name, horizon] = reason
        found = self._guesses[name, horizon]
        if isinstance(found, Exception):
            raise found
        return found

    def _read_guesses(self, name: str, horizon: int) -> Foretold:
        reader = self._predictions(name, horizon)
        width, threshold = self.simulator.width or self.reader.card.top_k, self.simulator.threshold
        how: dict[str, Any] = {"horizon": horizon, "width": width, "threshold": threshold}
        return guesses_of(reader, self.trace, self.work, **how), reader

    def foretells(self, policy: Policy, name: str) -> str:
        """Whose guesses a cell uses; without copies ahead, its policy those of the first predictor. Or `none`."""
        if name == "none" and "guesses" in policy.needs:
            return next((one for one in self.predictors if one != "none"), name)
        return name

    def popular(self) -> NDArray[np.int64]:
        """Entries by their use in the rows that are not replayed, the most used first."""
        return most_used(self.prior.uses_LE)

    def row(self, cell: Cell) -> dict[str, Any]:
        timed = self.timed(cell)
        beside = RowBeside(self.full_ns, self.units, self.cfg.seed, self.bound(cell))
        return row_of(cell, self.work, timed, beside)

    @cached_property
    def clock(self) -> Resumed | None:
        return clock_of(self)

    def timed(self, cell: Cell) -> Timed:
        """Of a device the cells of a table that are one and the same are measured once."""
        if self.clock is None:
            return cell.run(self.work)
        machine = cell.machine
        how = (cell.semantics, cell.streams, machine.miss_way, machine.landing, machine.predict_ns)
        start = (cell.warm.tobytes(), cell.pinned.tobytes())
        key = (repr(cell.policy), cell.budget.room_G, *how, id(cell.guesses), *start)
        if key not in self._measured:
            self._measured[key] = self.clock.timed(cell, self.work)
        return self._measured[key]

    @property
    def cluster(self) -> Cluster | None:
        """Where simulated cells run, if not here."""
        return cluster_of(self.cfg) if self.is_simulated else None

    @property
    def is_simulated(self) -> bool:
        return self.simulator.clock == SIMULATED

    @property
    def where(self) -> str:
        return self.clock.machine if self.clock else self.hardware.name

    @property
    def times(self) -> str:
        """Where the times of a table are from."""
        if self.clock:
            return "measured, drawn weights"
        error = self.hardware.measured_error
        off = "" if error is None else f": {error:.1%} off measured times"
        return f"simulated, {self.hardware.kind}{off}"

    @property
    def full_ns(self) -> float:
        """Per generated token, with every expert resident."""
        if self._full_ns is None:
            tokens = max(1, int(self.work.decode_S.sum()))
            try:
                self._full_ns = float(self._full_S()[self.work.is_decode_S].sum()) / tokens
            except ConfigError as reason:  # of a device: that is what offloading is for
                log.warning("no slowdown against full residency: %s", reason)
                self._full_ns = math.nan
        return self._full_ns

    def _full_S(self) -> NDArray[np.int64]:
        if self.clock is None:
            return compute_S(self.work, self.machine("wait"))
        everyone = np.arange(self.card.n_layers * self.card.n_experts)
        budget, machine = self.share(1.0), self.machine("wait")
        names = {"way": "all resident"}
        return self.timed(Cell(names, Lru(), budget, machine, warm=everyone)).time_S

    def bound(self, cell: Cell) -> Bound:
        key = bound_key(cell)
        with self._one_by_one:  # cells run side by side, and several share a bound
            if key not in self._bounds:
                latency_ns = self.hardware.link.latency_ns
                bound = bound_of(cell, self.work, latency_ns)
                if not self.is_simulated:  # costs of a hardware file bound no measured time
                    bound = dataclasses.replace(bound, tpot_ns=math.nan, name="of hits alone")
                self._bounds[key] = bound
            return self._bounds[key]
