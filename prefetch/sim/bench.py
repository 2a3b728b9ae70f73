"""The cells of a table, and what they share: the rows that are replayed, the model's sizes, the machine's costs.

It knows no predictor: guesses come from the store as files.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.models.cards import card_names, load_architecture
from prefetch.sim.bounds import compute_S, least_ns
from prefetch.sim.cell import Cell, row_of
from prefetch.sim.costs import UNKNOWN, Beside, beside_of, machine_of, need_host_memory
from prefetch.sim.foresight import guessed_rows, guesses_of, keys_of
from prefetch.sim.hardware import Hardware
from prefetch.sim.machine import ADMITS, Guesses
from prefetch.sim.memory import Budget, budget_of
from prefetch.sim.names import name_of
from prefetch.sim.others import most_used
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.sim.pool import ATOMIC, OVERSHOOT
from prefetch.sim.prior import Prior, check_prior
from prefetch.sim.sizes import lent_to
from prefetch.sim.streaming import BUFFERS
from prefetch.sim.workload import workload_of
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import RoutingTrace

log = logging.getLogger(__name__)
SEMANTICS = {"atomic": ATOMIC, "overshoot": OVERSHOOT}
CURVE = (
    0.0625,
    0.125,
    0.25,
    0.375,
    0.5,
    0.625,
    0.75,
    0.875,
    0.9375,
)  # where savings are looked for
CHOSEN, OPTIMUM, ORACLE = "chosen", "optimum", "oracle prefetch"


class Bench:
    """What all cells share: the rows that are replayed, the model's sizes, the machine's costs."""

    def __init__(self, cfg: Config, store: Store) -> None:
        self.cfg, self.store, self.simulator = cfg, store, cfg.simulator
        self.hardware: Hardware = config.instantiate(cfg.hardware, "hardware")
        self._check()
        made = store.make(config.locate(cfg.makers["trace"])(cfg))
        self.reader, self._key = TraceReader(made.folder), made.key
        self.card, self.beside = self._card()
        if self.simulator.host_cache is None:
            need_host_memory(self.card, self.hardware)
        whole = self.reader.load()
        self.trace, self.others = self._parts(whole)
        self.work = workload_of(
            self.trace,
            batch=self.simulator.batch,
            chunk=self.simulator.chunk,
            phase=self.simulator.phase,
        )
        if not self.work.n_accesses:
            raise ConfigError("nothing to replay: no executed row of the chosen requests and phase")
        self._full_ns: float | None = None
        self._bounds: dict[Any, float | None] = {}
        self._one_by_one = threading.Lock()
        self.machine, self.policy = cache(self._machine), cache(self._policy)  # cells share them
        self._guesses: dict[tuple[str, int], tuple[Guesses, PredictionsReader]] = {}
        self.prior = Prior(self.simulator, self.reader, self.trace, self.others, self.work)

    def _check(self) -> None:
        told = self.simulator
        if told.semantics not in SEMANTICS:
            raise ConfigError(
                f"simulator.semantics={told.semantics}: expected one of {', '.join(SEMANTICS)}"
            )
        if told.requests not in ("test", "all"):
            raise ConfigError(f"simulator.requests={told.requests}: expected test or all")
        if self.cfg.train.test_trace is not None:
            raise ConfigError(
                f"train.test_trace={self.cfg.train.test_trace}: guesses would be about that trace, and this one is "
                "replayed; leave it out, or replay that trace with trace=FOLDER"
            )
        check_prior(told)
        if told.requests == "all" and any(name != "none" for name in self.predictors):
            raise ConfigError(
                "simulator.requests=all: predictors are fitted on some of them; pass predictor=none, "
                "or simulator.requests=test"
            )

    @property
    def root(self) -> dict[str, Any]:
        """What the cell chosen at the root is called in a table."""
        predictor = name_of(self.cfg, "predictor")
        capacity = self.cfg.memory if self.cfg.memory is not None else self.simulator.cache
        return {
            "policy": name_of(self.cfg, "policy"),
            "predictor": predictor,
            "capacity": str(capacity),
            "horizon": 0 if predictor == "none" else self.simulator.horizon,
        }

    @property
    def predictors(self) -> list[str]:
        name = name_of(self.cfg, "predictor")
        return list(self.cfg.evaluate.predictors or [name])

    @property
    def policies(self) -> list[str]:
        return list(self.cfg.evaluate.policies or [name_of(self.cfg, "policy")])

    @property
    def capacities(self) -> list[Any]:
        if self.cfg.memory is not None:
            return [None]  # what remains of the memory
        return list(self.cfg.evaluate.capacities or [self.simulator.cache])

    @property
    def horizons(self) -> list[int]:
        return list(self.cfg.evaluate.horizons or [self.simulator.horizon])

    def _card(self) -> tuple[ModelCard, Beside]:
        """The trace's own sizes, or those of another model of the same shape."""
        own, name = self.reader.card, self.simulator.model_card
        if name is None:
            if own.expert_bytes_L is None:
                raise ConfigError(
                    f"the trace of {own.name} does not say how large an expert is; pass simulator.model_card=NAME, "
                    f"one of {', '.join(card_names())}"
                )
            return own, UNKNOWN
        architecture = load_architecture(name)
        lent = architecture.card(None, None)
        if lent.n_experts != own.n_experts:
            raise ConfigError(
                f"simulator.model_card={name}: has {lent.n_experts} experts per layer, the trace {own.n_experts}"
            )
        if (lent.n_layers, lent.top_k) != (own.n_layers, own.top_k):
            log.warning(
                f"simulator.model_card={name} has {lent.n_layers} layers and k = {lent.top_k}, the trace "
                f"{own.n_layers} and {own.top_k}: the trace's are replayed, with its sizes"
            )
        return lent_to(lent, own), beside_of(architecture)

    def _parts(self, whole: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
        """What is replayed, and all other rows: those that a static choice may be fitted on."""
        if self.simulator.requests == "all":
            return whole, whole
        reader = self._predictions("none", self.horizons[0])
        keys_T = keys_of(whole.request_T, whole.position_T)
        asked = np.isin(keys_T, guessed_rows(reader))
        is_other = ~asked
        if not {*reader.card.requests} & {
            *reader.card.fitted_here
        }:  # else a request is split in time
            is_other &= np.isin(
                whole.request_T, reader.card.fitted_here
            )  # no copies of what is asked
        return whole.rows(asked), whole.rows(is_other)

    def _predictions(self, name: str, horizon: int) -> PredictionsReader:
        cfg = (
            self.cfg
            if name == name_of(self.cfg, "predictor")
            else config.with_choice(self.cfg, "predictor", name)
        )
        changes: dict[str, Any] = {}
        if horizon not in cfg.train.horizons:
            changes["horizons"] = sorted({*cfg.train.horizons, horizon})
        if self.simulator.width is not None and self.simulator.width > 2 * self.reader.card.top_k:
            changes["width"] = self.simulator.width
        asked = cast(Config, OmegaConf.merge(cast(DictConfig, cfg), {"train": changes}))
        recipe = config.locate(self.cfg.makers["predictions"])(asked, 0)
        reader, card = PredictionsReader(self.store.make(recipe).folder), self.reader.card
        reader.check_fits(trace=self._key, n_experts=card.n_experts, n_layers=card.n_layers)
        return reader

    def budget(self, capacity: Any, predictor_bytes: int, landing: int = 0) -> Budget:
        told = self.simulator
        return budget_of(
            self.card,
            self.hardware,
            cache=capacity,
            memory=self.cfg.memory,
            scope=told.scope,
            context=told.context,
            batch=told.batch,
            staging=told.staging + landing,
            predictor_bytes=predictor_bytes,
            split=self.prior.split(),
        )

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
        if self.simulator.admit not in ADMITS:
            raise ConfigError(
                f"simulator.admit={self.simulator.admit}: expected one of {', '.join(ADMITS)}"
            )
        return (self.simulator.landing or self.card.top_k) * (self.simulator.admit == ADMITS[1])

    def guesses(self, name: str, horizon: int) -> tuple[Guesses, PredictionsReader]:
        """Read once: the cells of a table share them."""
        if (name, horizon) not in self._guesses:
            self._guesses[name, horizon] = self._read_guesses(name, horizon)
        return self._guesses[name, horizon]

    def _read_guesses(self, name: str, horizon: int) -> tuple[Guesses, PredictionsReader]:
        reader = self._predictions(name, horizon)
        width = self.simulator.width or self.reader.card.top_k
        made = guesses_of(
            reader,
            self.trace,
            self.work,
            horizon=horizon,
            width=width,
            threshold=self.simulator.threshold,
        )
        return made, reader

    def cells(self) -> Iterator[Cell]:
        for policy, name, capacity, horizon in itertools.product(
            self.policies, self.predictors, self.capacities, self.horizons
        ):
            if name == "none" and horizon != self.horizons[0]:
                continue
            yield self._cell(CHOSEN, policy, name, capacity, horizon)
        for capacity in self.capacities:
            for policy in self.policies:
                if "none" not in self.predictors:
                    yield self._cell("no prefetch", policy, "none", capacity, self.horizons[0])
            yield self._cell("lru", "lru", "none", capacity, self.horizons[0])
            yield self._cell(OPTIMUM, "belady", "none", capacity, self.horizons[0])
            if self.simulator.requests == "test":  # guesses, even true ones, are about these
                yield self._cell(ORACLE, self.policies[0], "oracle", capacity, self.horizons[0])
            yield from self._today(capacity)
            yield from self._streaming(capacity)
        yield from self._curve()

    def alone(self, policy: str, capacity: str) -> Cell:
        """The cell of this policy without guesses, at a capacity as a table names it."""
        named = {str(one if one is not None else self.cfg.memory): one for one in self.capacities}
        return self._cell("no prefetch", policy, "none", named[capacity], self.horizons[0])

    def sized(self, policy: str, each: int) -> Cell:
        """The cell of this policy without guesses, with room for so many experts per layer."""
        return self._cell("curve", policy, "none", each, self.horizons[0], is_curve=True)

    def _curve(self) -> Iterator[Cell]:
        """The cell chosen at the root, or the grid's first, at all sizes that it can have, each size once."""
        seen, root = set[tuple[int, ...]](), self.root
        policy = root["policy"] if root["policy"] in self.policies else self.policies[0]
        name = root["predictor"] if root["predictor"] in self.predictors else self.predictors[0]
        ahead = self.simulator.horizon
        horizon = ahead if ahead in self.horizons else self.horizons[0]
        for share in CURVE:
            try:
                cell = self._cell("curve", policy, name, share, horizon, is_curve=True)
            except ConfigError as reason:
                log.info("no cell of %s of all experts: %s", share, reason)
                continue
            if cell.budget.slots_G not in seen:
                seen.add(cell.budget.slots_G)
                yield cell

    def _cell(
        self,
        way: str,
        policy: str,
        name: str,
        capacity: Any,
        horizon: int,
        *,
        is_curve: bool = False,
    ) -> Cell:
        made, guesses, event_us, n_bytes = self.policy(policy), None, 0.0, 0
        if name != "none":
            guesses, reader = self.guesses(name, horizon)
            event_us = reader.card.event_us or 0.0
        foretold = self.foretold(made, name, horizon)
        if foretold is not None:
            n_bytes = foretold.card.parameter_bytes
        has_cheated = foretold is not None and foretold.card.causality == "cheats"
        has_cheated |= "future" in made.needs or self.prior.has_seen(made)
        landing = self.landing if guesses is not None else 0
        sized = self.share if is_curve else self.budget
        budget = sized(capacity, n_bytes, landing)
        return Cell(
            names={
                "way": way,
                "policy": policy,
                "predictor": name,
                "mark": "cheats" if has_cheated else "",
                "capacity": str(capacity if capacity is not None else self.cfg.memory),
                "horizon": horizon if guesses is not None else 0,
                "misses": self.simulator.misses,
            },
            policy=made,
            budget=budget,
            machine=self.machine(self.simulator.misses, event_us)._replace(landing=landing),
            guesses=guesses,
            semantics=SEMANTICS[self.simulator.semantics],
            told=self.prior.told(made, len(budget.room_G), foretold, horizon),
            warm=self.prior.warm(made),
            pinned=self.prior.pinned(made, budget if is_curve else None),
        )

    def foretold(self, policy: Policy, name: str, horizon: int) -> PredictionsReader | None:
        """The guesses of a cell; without copies ahead, those by which its policy evicts: of the first predictor."""
        if name == "none" and "guesses" in policy.needs:
            name = next((one for one in self.predictors if one != "none"), name)
        return None if name == "none" else self.guesses(name, horizon)[1]

    def share(self, share: float, n_bytes: int, landing: int = 0) -> Budget:
        """Of a cache of this share of all experts, or of so many per layer, whatever memory was named."""
        return budget_of(
            self.card,
            self.hardware,
            cache=share,
            scope=self.simulator.scope,
            context=self.simulator.context,
            batch=self.simulator.batch,
            staging=self.simulator.staging + landing,
            predictor_bytes=n_bytes,
            split=self.prior.split(of_any_size=True),
        )

    def _policy(self, name: str) -> Policy:
        if name == name_of(self.cfg, "policy"):
            return cast(Policy, config.instantiate(self.cfg.policy, "policy"))
        return cast(
            Policy,
            config.instantiate(config.with_choice(self.cfg, "policy", name).policy, "policy"),
        )

    def _today(self, capacity: Any) -> Iterator[Cell]:
        """Experts that always stay on the GPU, the others computed on the host; and the host beside a filling cache."""
        budget = self.budget(capacity, 0)
        names = {
            "predictor": "none",
            "horizon": 0,
            "capacity": str(capacity if capacity is not None else self.cfg.memory),
        }
        hottest = self.popular()  # with requests=all counted on what is replayed, and marked
        by_layer = np.arange(self.card.n_layers * self.card.n_experts)
        split = dataclasses.replace(
            budget, room_G=(sum(budget.room_G),), scope="global"
        )  # whole layers, the first ones
        for way, warm, one, misses in (
            ("static split by layer", by_layer, split, "host"),
            ("host compute", hottest, budget, "host"),
            ("host compute and uploads", hottest, budget, "both"),
        ):
            yield Cell(
                names={
                    "way": way,
                    "policy": "lru" if misses == "both" else "static",
                    "misses": misses,
                    "mark": "cheats"
                    if warm is hottest and self.simulator.requests == "all"
                    else "",
                    **names,
                },
                policy=Lru(),
                budget=one,
                machine=self.machine(misses),
                warm=warm,
            )

    def _streaming(self, capacity: Any) -> Iterator[Cell]:
        """Prompts by whole layers through two buffers beside an LRU cache, the other steps without guesses."""
        if not (self.work.prefill_S > 0).any() or self.simulator.host_cache is not None:
            return
        try:
            budget = self.budget(capacity, 0, BUFFERS * self.card.n_experts)
        except ConfigError as error:
            log.warning(f"layer streaming is left out: {error}")
            return
        yield Cell(
            names={
                "way": "layer streaming",
                "policy": "lru",
                "predictor": "none",
                "mark": "",
                "capacity": str(capacity if capacity is not None else self.cfg.memory),
                "horizon": 0,
                "misses": "wait",
            },
            policy=Lru(),
            budget=budget,
            machine=self.machine("wait"),
            semantics=SEMANTICS[self.simulator.semantics],
            streams=True,
        )

    def popular(self) -> NDArray[np.int64]:
        """Entries by their use in the rows that are not replayed, the most used first."""
        return most_used(self.prior.uses_LE)

    def row(self, cell: Cell) -> dict[str, Any]:
        timed = cell.run(self.work)
        return row_of(cell, self.work, timed, self.bound(cell), self.full_ns, self.cfg.seed)

    @property
    def tokens(self) -> int:
        return max(1, int(self.work.decode_S.sum()))

    @cached_property
    def _largest(self) -> int:
        """Experts that one event needs, at most."""
        return int(np.diff(self.work.start_V).max(initial=0))

    @property
    def full_ns(self) -> float:
        """Per generated token, with every expert resident."""
        if self._full_ns is None:
            took_S = compute_S(self.work, self.machine("wait"))
            self._full_ns = float(took_S[self.work.is_decode_S].sum()) / self.tokens
        return self._full_ns

    def bound(self, cell: Cell) -> float | None:
        if (self.work.prefill_S > 0).any():
            return None  # what a prompt has brought is not the generated tokens' to pay
        if self.simulator.semantics == "overshoot" and self._largest > min(cell.budget.slots_G):
            return None  # an event larger than its cache stays whole until the next
        warm = np.concatenate([cell.pinned, cell.warm])
        machine = cell.machine
        key = (cell.budget.room_G, machine.miss_way, machine.landing, warm.tobytes())
        with self._one_by_one:  # cells run side by side, and several share a bound
            if key not in self._bounds:
                link = self.hardware.link
                least = least_ns(self.work, cell.machine, cell.budget, link.latency_ns, warm)
                self._bounds[key] = None if least is None else least / self.tokens
            return self._bounds[key]
