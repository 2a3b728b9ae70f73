"""The engine for a model that runs: routing comes event by event, guesses from predictors that watch it.

It knows no weights. B requests of a batch, each watched by a predictor's incremental face.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.engine.backend import Backend
from prefetch.engine.engine import Engine
from prefetch.errors import ConfigError
from prefetch.predict.predictor import Online
from prefetch.sim.engines.machine import WAIT, Guesses, Machine
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload
from prefetch.trace.card import ModelCard

MILLION = 1_000_000  # scores are handed on in millionths
Watch = Callable[[], Online]  # a predictor that knows of no request yet


def workload_without_end(card: ModelCard) -> Workload:
    """Of the event that runs, and of no other: `ids_A` is written anew for each."""
    none = np.empty(0, np.int64)
    few = np.empty(0, np.int32)
    ids_A = np.zeros(card.n_experts, np.uint16)
    return Workload(card, ids_A, few, none, none, none, few, few, none, none, few)


def machine_without_clock(card: ModelCard, staging: int) -> Machine:
    """What decisions depend on: sizes, and how guesses are run."""
    n_layers = card.n_layers
    ns_L, sizes = np.zeros(n_layers, np.int64), card.expert_bytes_L or (1,) * n_layers
    return Machine(
        before_S=np.empty(0, np.int64),
        weight_ns_L=ns_L,
        token_ns_L=ns_L,
        host_weight_ns_L=ns_L,
        host_token_ns_L=ns_L,
        chunk_ns_LX=ns_L[:, None],
        n_chunks_L=np.ones(n_layers, np.int64),
        whole_ns_L=ns_L,
        bytes_L=np.array(sizes, np.int64),
        chunk_bytes=int(max(sizes)),
        miss_way=WAIT,
        staging=staging,
        issue_ns=0,
        predict_ns=0,
        uploads=0,
        shared_per_1000=0,
        cancels=True,
        protects=True,
    )


class LiveEngine(Engine):
    """`step` as a forward pass begins, then `layer` once per MoE layer, in the model's order."""

    def __init__(
        self,
        backend: Backend,
        n_slots: int,
        card: ModelCard,
        policy: Policy,
        room_G: Sequence[int],
        size_L: Sequence[int],
        *,
        staging: int,
        watch: Watch | None = None,
        horizon: int = 1,
        width: int = 0,
    ) -> None:
        guesses = Guesses(
            np.empty((0, width if watch else 0), np.int32),
            np.empty((0, width if watch else 0), np.int64),
            horizon,
        )
        work, machine = workload_without_end(card), machine_without_clock(card, staging)
        super().__init__(backend, n_slots, work, policy, room_G, size_L, machine, guesses)
        self.watch, self.lanes = watch, list[Online]()
        self.next_event = 0
        self.seen: list[NDArray[Any]] = []  # this step's routing, layer by layer
        self.hits = self.late = self.misses = self.resident_events = 0
        self._told: dict[int, list[tuple[int, int]]] = {}
        self.is_real_BS: NDArray[Any] | None = None
        self._is_announced = False
        self._is_decode = True  # each request runs one token: routing is known layer by layer

    def step(
        self, n_requests: int, n_rows: int, *, is_new: bool, is_real_BS: NDArray[Any] | None = None
    ) -> None:
        """A forward pass over so many tokens begins. `is_new`: of requests that nobody knows yet.

        is_real_BS: of a padded prompt, which rows are tokens.
        """
        n_layers = self.work.card.n_layers
        self.next_event += -self.next_event % n_layers  # an interrupted pass is not gone on with
        if self.watch and (is_new or len(self.lanes) != n_requests):
            more = n_requests - len(self.lanes)
            self.lanes = (self.lanes + [self.watch() for _ in range(more)])[:n_requests]
            for lane in self.lanes:
                lane.start()
        self._is_announced, self._is_decode = True, n_rows == n_requests
        self.most_waiting = (self.guesses.ahead + 1) * self.width * max(1, n_requests)
        self.is_real_BS = is_real_BS
        self._told, self.seen = {}, []
        self.begin(self.next_event)
        self.record.clear()

    def layer(self, layer: int, ids_TK: NDArray[Any]) -> None:
        """The routing of the next event; ids outside of the layer's experts are nobody's."""
        n_layers = self.work.card.n_layers
        if layer == 0 and not self._is_announced:
            self.step(1, len(ids_TK), is_new=True)
        self._is_announced = False
        if layer != self.next_event % n_layers:
            raise ConfigError(
                f"MoE layer {layer} runs where layer {self.next_event % n_layers} is next: the engine serves models "
                "that run every MoE layer once per step, in their order"
            )
        event = self.next_event
        self.next_event += 1
        self._watch(layer, ids_TK)
        self._run_event(event, ids_TK)
        self.record.clear()

    def resident_layer(self, layer: int) -> None:
        """Every expert is there: the host does not ask which are needed."""
        self.next_event += 1
        self.resident_events += 1
        self.launch_all(layer, {})

    def _run_event(self, event: int, ids_TK: NDArray[Any]) -> None:
        n_experts = self.work.card.n_experts
        chosen = [expert for expert in ids_TK.ravel().tolist() if 0 <= expert < n_experts]
        if not chosen:
            self.nothing_needed(event)
            return
        experts = list(dict.fromkeys(reversed(chosen)))[::-1]  # the last choice is the most recent
        counted = Counter(chosen)
        self.work.ids_A[: len(experts)] = experts
        self.event(event, range(len(experts)), [counted[expert] for expert in experts])
        outcomes = Counter(self.outcome.values())
        self.outcome.clear()
        for outcome, name in enumerate(("misses", "hits", "late")):
            setattr(self, name, getattr(self, name) + outcomes[outcome])

    def guessed(self, target: int) -> list[tuple[int, int]]:
        """Everyone's best first, as the simulator lines them up."""
        if target not in self._told:
            layer, width = target % self.work.card.n_layers, self.width
            scores = [lane.guess(layer) for lane in self.lanes if self._is_decode]
            if any(len(of_lane) != self.work.card.n_experts for of_lane in scores):
                raise ConfigError(
                    f"the predictor guesses about {len(scores[0])} experts, the model has {self.work.card.n_experts}"
                )
            ranked = [_best(of_lane, width) for of_lane in scores]
            self._told[target] = [lane[i] for i in range(width) for lane in ranked if i < len(lane)]
        return self._told[target]

    def _watch(self, layer: int, ids_TK: NDArray[Any]) -> None:
        """Of a prompt the tokens are told one after the other, once all layers are known."""
        self.seen.append(ids_TK)
        if not self.lanes:
            return
        if self._is_decode:
            for lane, ids_K in zip(self.lanes, ids_TK, strict=True):
                lane.observe(layer, ids_K)
        elif layer == self.work.card.n_layers - 1:
            for b, (lane, ids_SLK) in enumerate(zip(self.lanes, self._prompts(), strict=True)):
                is_real_S = slice(None) if self.is_real_BS is None else self.is_real_BS[b]
                for ids_LK in ids_SLK[is_real_S]:
                    for slot, ids_K in enumerate(ids_LK):
                        lane.observe(slot, ids_K)

    def _prompts(self) -> NDArray[Any]:
        """[B, S, L, K]: rows of a batch lie request after request."""
        ids_TLK = np.stack(self.seen, axis=1)
        return ids_TLK.reshape(len(self.lanes), -1, *ids_TLK.shape[1:])


def _best(scores_E: NDArray[np.float32], width: int) -> list[tuple[int, int]]:
    scores_E = np.clip(scores_E, -1e9, 1e9, where=np.isfinite(scores_E), out=scores_E.copy())
    order = np.argsort(-scores_E, kind="stable")[:width]
    return [(int(e), int(scores_E[e] * MILLION)) for e in order if np.isfinite(scores_E[e])]
