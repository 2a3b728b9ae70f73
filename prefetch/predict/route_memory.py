"""Route memory: a token goes on like the tokens that routed alike so far.

Two memories, nothing fitted but how they are mixed: the earlier tokens of the same request, and tokens of the training
requests; `alike` says how alike tokens are. An idea of our own; no training, and every token that is served could
enlarge it.

M remembered tokens, S earlier tokens of the request, T tokens, L layers, K choices, E experts, H horizons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict import alike
from prefetch.predict.alike import Memory, Mix, Running
from prefetch.predict.guesses import ranked
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of, parameter_bytes
from prefetch.predict.tables import chance_of_use, use_of
from prefetch.trace.routing import id_dtype, no_expert

SHARPNESS = (0.4, 0.8, 1.6)  # tried in each memory
WEIGHTS = (0.25, 1.0, 4.0)  # of the training requests, tried beside 1 for the same request
TUNING_TOKENS, TUNING_BLOCK = 800, 128  # of the validation requests: enough to tell mixtures apart
FEWEST_TOLD = 4  # training requests that a network can be told of: of fewer, one left out would change too much


@dataclass
class RouteMemory:
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    memory_tokens: int = 16384  # of the training requests; 0 = the same request alone
    window: int = 1024  # earlier tokens of the same request
    nearest: int = 32  # remembered training tokens that are asked
    decay: float = 0.85  # a layer further back counts so much
    carry: float = 0.05  # of how alike the tokens before were
    seed: int = 0

    def __post_init__(self) -> None:
        self._memory: Memory | None = None
        self.horizons = horizons_of(self.horizons)
        claims = {
            f"memory_tokens={self.memory_tokens}: must not be negative": self.memory_tokens >= 0,
            f"window={self.window}: must be at least 1": self.window >= 1,
            f"nearest={self.nearest}: must be at least 1": self.nearest >= 1,
            f"decay={self.decay}: must be above 0, at most 1": 0 < self.decay <= 1,
            f"carry={self.carry}: must be from 0 to 1": 0 <= self.carry <= 1,
        }
        for claim, holds in claims.items():
            if not holds:
                raise ConfigError(claim)

    def fit(self, train: Part, validation: Part) -> Self:
        """Remembers whole training requests, drawn by the seed; tunes how sharply each memory answers."""
        self._check_depth(train.card.n_layers * train.card.top_k, train.card.n_layers)
        self.chance_LE_ = chance_of_use(*use_of(train))
        self.remember(train)
        self.mix_H3_ = np.array([self._tuned(validation, horizon) for horizon in self.horizons])
        return self

    def _check_depth(self, n_choices: int, n_layers: int) -> None:
        """What is alike is counted in 32 bits, and a layer counts 1 / decay as much as the one before it."""
        least = (alike.MOST_ALIKE / n_choices) ** (-1 / max(1, n_layers - 1))
        if self.decay < least:
            raise ConfigError(
                f"decay={self.decay}: too small for {n_layers} layers, whose weights no number would hold; "
                f"pass predictor.decay={math.ceil(100 * least) / 100} or more"
            )

    def remember(self, train: Part, fewest: int = 1) -> None:
        """Nothing, where there are fewer than `fewest` training requests."""
        most = self.memory_tokens if len(train.requests) >= fewest else 0
        self.ids_MLK_, self.request_M_ = _remembered(train, most, self.seed)
        self.goes_on_M_ = np.diff(self.request_M_, prepend=-1) == 0

    @classmethod
    def rebuilt(cls, fitted: Any) -> Self:
        """For a network that keeps what it learnt of this memory as its own: `chance_LE_`, `ids_MLK_`, `request_M_`."""
        memory = cls(memory_tokens=fitted.most_tokens, seed=fitted.seed)
        memory.chance_LE_, memory.ids_MLK_ = fitted.chance_LE_, fitted.ids_MLK_
        memory.request_M_ = fitted.request_M_
        memory.goes_on_M_ = np.diff(memory.request_M_, prepend=-1) == 0
        return memory

    def told(
        self, past: Past, *, is_remembered: bool
    ) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """For a network: [T, L, F, E] what both memories say, [T, L, 2] how alike the most alike tokens are.

        Requests that are remembered (those that the network learns from) are not asked about themselves.
        """
        told_TLFE = np.zeros((*past.shape[:2], alike.N_TOLD, past.shape[2]), np.float16)
        sure_TL2, here_TLK = np.zeros((*past.shape[:2], 2), np.float32), past.here()
        memory, running, how = (
            self.memory(),
            self.running(past.card.top_k),
            self.mixed((1.0, 1.0, 1.0)),
        )
        stops = [*past.starts_R[1:].tolist(), past.n_tokens]
        for first, stop in zip(past.starts_R.tolist(), stops, strict=True):
            own_first, own_stop = 0, 0
            if (
                is_remembered
                and (own := np.flatnonzero(self.request_M_ == past.request_T[first])).size
            ):
                own_first, own_stop = int(own[0]), int(own[-1]) + 1
            told = np.zeros(
                (stop - first, *told_TLFE.shape[1:]), np.float32
            )  # numba has no float16
            alike.replay_told(
                past.earlier(stop - 1), here_TLK[first:stop], past.horizon, own_first, own_stop, past.nobody,
                memory, running, how, told, sure_TL2[first:stop],
            )  # fmt: skip
            told_TLFE[first:stop] = told
        return told_TLFE, sure_TL2

    def _tuned(self, validation: Part, horizon: int) -> tuple[float, float, float]:
        """(sharpness inside, sharpness outside, weight of outside) with the best recall, one after the other."""
        lessons, asked = [], 0
        drawn = validation.some(TUNING_TOKENS, self.seed)
        for lesson in drawn.lessons(horizon, max_rows=TUNING_BLOCK):
            lessons.append(lesson)
            asked += int(lesson.counted_T.sum())
            if asked >= TUNING_TOKENS:
                break

        def recall(mix: tuple[float, float, float]) -> int:
            return sum(
                _hits(self._scores(past, mix), ids, counted) for past, ids, counted in lessons
            )

        inside = max(SHARPNESS, key=lambda value: recall((value, 1.0, 0.0)))
        outside = max(SHARPNESS, key=lambda value: recall((inside, value, 1e6)))
        weight = max(WEIGHTS, key=lambda value: recall((inside, outside, value)))
        return inside, outside, weight

    def scores(self, past: Past) -> NDArray[np.float32]:
        return self._scores(past, tuple(self.mix_H3_[self.horizons.index(past.horizon)].tolist()))

    def _scores(self, past: Past, mix: tuple[float, ...]) -> NDArray[np.float32]:
        out_TLE, here_TLK = np.empty(past.shape, np.float32), past.here()
        memory, running, how = self.memory(), self.running(past.card.top_k), self.mixed(mix)
        stops = [*past.starts_R[1:].tolist(), past.n_tokens]
        for first, stop in zip(past.starts_R.tolist(), stops, strict=True):
            alike.replay(
                past.earlier(stop - 1), here_TLK[first:stop], past.horizon, past.nobody, memory, running, how,
                self.chance_LE_, out_TLE[first:stop],
            )  # fmt: skip
        return out_TLE

    def memory(self) -> Memory:
        """Made when first asked for: the lists follow from what is remembered."""
        if self._memory is None or self._memory.ids_MLK is not self.ids_MLK_:
            n_experts = self.chance_LE_.shape[1]
            lists = alike.lists(self.ids_MLK_, n_experts, no_expert(n_experts))
            self._memory = Memory(self.ids_MLK_, self.goes_on_M_, *lists)
        return self._memory

    def running(self, top_k: int) -> Running:
        n_layers, n_experts = self.chance_LE_.shape
        n_remembered, dtype = len(self.ids_MLK_), self.ids_MLK_.dtype
        return Running(
            alike_M=np.zeros(n_remembered, np.float32),
            before_M=np.zeros(n_remembered, np.float32),
            alike_S=np.zeros(self.window, np.float32),
            before_S=np.zeros(self.window, np.float32),
            weight_S=np.zeros(self.window, np.float32),
            bits_SLW=np.zeros((self.window, n_layers, -(-n_experts // 64)), np.uint64),
            ids_SLK=np.zeros((self.window, n_layers, top_k), dtype),
            now_LK=np.zeros((n_layers, top_k), dtype),
            known=np.zeros(2, np.int64),
        )

    def resident_bytes(self) -> int:
        return parameter_bytes(self) + self.made_bytes()

    def made_bytes(self) -> int:
        """Beside what was learnt: who used which expert, and what is known of one request that runs."""
        memory, running = self.memory(), self.running(self.ids_MLK_.shape[2])
        return sum(array.nbytes for array in (memory.offset_LE, memory.users, *running))

    def mixed(self, mix: tuple[float, ...]) -> Mix:
        return Mix(self.decay, self.carry, self.nearest, *mix)

    def online(self, horizon: int) -> RouteMemoryOnline:
        return RouteMemoryOnline(self, horizon)


class RouteMemoryOnline:
    """The same answers, one event at a time. An answer stands until the next guess."""

    def __init__(self, fitted: RouteMemory, horizon: int) -> None:
        mix = fitted.mix_H3_[fitted.horizons.index(horizon)].tolist()
        running = fitted.running(fitted.ids_MLK_.shape[2])
        # plain tuples: to look at named ones takes 6 of the 8 microseconds of a call (numba 0.68, one EPYC core)
        self._memory, self._running = tuple(fitted.memory()), tuple(running)
        self._how_6 = np.array(fitted.mixed(tuple(mix)), np.float64)
        self._begin = running
        self._chance_LE, self._nobody = fitted.chance_LE_, no_expert(fitted.chance_LE_.shape[1])
        self._out_E = np.empty(fitted.chance_LE_.shape[1], np.float32)

    def start(self) -> None:
        alike.begin(self._begin)

    def observe(
        self, layer: int, ids: NDArray[Any], gate_input: NDArray[Any] | None = None
    ) -> None:
        alike.observe_event(ids, layer, self._nobody, self._memory, self._running, self._how_6)

    def guess(self, layer: int) -> NDArray[np.float32]:
        alike.guess_event(
            layer, self._nobody, self._memory, self._running, self._how_6, self._chance_LE, self._out_E
        )  # fmt: skip
        return self._out_E


def _remembered(train: Part, most: int, seed: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Whole training requests, until there are enough tokens, in trace order."""
    card = train.card
    ids = [np.zeros((0, card.n_layers, card.top_k), id_dtype(card.n_experts))]
    requests = [np.zeros(0, np.int64)]
    for block, counted_T in train.some(most, seed).blocks():
        ids.append(block.ids_TLK[counted_T])
        requests.append(block.request_T[counted_T].astype(np.int64))
    return np.concatenate(ids)[:most], np.concatenate(requests)[:most]


def mean_and_spread(sure_N2: NDArray[np.float32]) -> NDArray[np.float32]:
    """[2, 2] of how sure each memory is; one that always says the same is left as it is."""
    spread_2 = sure_N2.std(axis=0)
    spread_2 = np.where(spread_2 < 1e-3, 1.0, spread_2 + 1e-3)
    return np.stack([sure_N2.mean(axis=0), spread_2]).astype(np.float32)


def _hits(
    scores_TLE: NDArray[np.float32], ids_TLK: NDArray[Any], counted_T: NDArray[np.bool_]
) -> int:
    """True choices among the best k."""
    best_TLK, _ = ranked(scores_TLE[counted_T], ids_TLK.shape[2])
    true_TLK = ids_TLK[counted_T]
    known = true_TLK < scores_TLE.shape[2]
    return int(((true_TLK[..., None] == best_TLK[:, :, None, :]).any(axis=3) & known).sum())
