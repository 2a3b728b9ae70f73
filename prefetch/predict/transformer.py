"""A small transformer on routing history: attention to alike tokens of the request, and along the layers of a token.

One network for all layers, of one horizon each. Its attention to earlier tokens starts as route memory does and is
learnt from there. It sees `window` earlier tokens at most; requests stand alone. With `memory`, it is told what route
memory says of the training requests as well; while it learns, a request is not asked about itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.alike import N_TOLD
from prefetch.predict.networks.training import alone, check, fill, flat, train_net, training_of
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of, parameter_bytes
from prefetch.predict.route_memory import FEWEST_TOLD, RouteMemory, mean_and_spread
from prefetch.predict.tables import chance_of_use, use_of

if TYPE_CHECKING:
    from prefetch.predict.networks.sequences import Told
    from prefetch.predict.networks.transformer_net import TransformerNet

CHUNK = 128  # tokens that are learnt from or guessed together: memory, and nothing else
LEAST_WEIGHT = 1e-4


@dataclass
class Transformer:
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    hidden: int = 128
    heads: int = 4  # along the layers
    window: int = 256  # earlier tokens of the request
    weights: bool = False  # of the choices
    memory: bool = False  # of the training requests
    epochs: int = 4
    batch: int = 1  # chunks of at most 128 tokens
    learning_rate: float = 2e-3
    dropout: float = 0.2
    patience: int = 3
    most_tokens: int = 32_768  # of the training requests
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    needs: tuple[str, ...] = field(default=(), init=False)
    sees: str = field(default="routing history", init=False)

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # where an interrupted fit left its checkpoints
        self.curve: list[dict[str, float]] = []  # a row per epoch and horizon
        self.horizons = horizons_of(self.horizons)
        self._nets: dict[int, TransformerNet] = {}
        self._memory: RouteMemory | None = None
        check(self, "hidden", "heads", "window", "most_tokens")
        if self.hidden % self.heads:
            raise ConfigError(
                f"hidden: must be a multiple of heads={self.heads}, got {self.hidden}"
            )
        if self.weights:
            self.needs, self.sees = ("weights",), "routing history + weights"

    def fit(self, train: Part, validation: Part) -> Self:
        self.chance_LE_ = chance_of_use(*use_of(train))
        train, validation = (part.some(self.most_tokens, self.seed) for part in (train, validation))
        self.weight_2L_ = self._weight_scale(train)
        self._nets, self._memory = {}, None
        if self.memory:
            self._memory = RouteMemory(memory_tokens=self.most_tokens, seed=self.seed)
            self._memory.chance_LE_ = self.chance_LE_
            self._memory.remember(train, FEWEST_TOLD)
            self.ids_MLK_, self.request_M_ = self._memory.ids_MLK_, self._memory.request_M_
        for horizon in self.horizons:
            net = self._fit(train, validation, horizon)
            setattr(self, f"network_h{horizon}_", net)
        return self

    def _fit(self, train: Part, validation: Part, horizon: int) -> NDArray[np.float32]:
        from prefetch.predict.networks.sequences import Chunks, Told, loss, right

        parts = ((train, True), (validation, False))
        sets = [
            Told.gathered(self._blocks(part, horizon, is_remembered=told)) for part, told in parts
        ]
        if self.memory:
            assert sets[0].sure_TL2 is not None
            sure_N2 = sets[0].sure_TL2[sets[0].counted_T].reshape(-1, 2)
            setattr(self, f"sure_h{horizon}_", mean_and_spread(sure_N2))
            sets = [self._scaled(told, horizon) for told in sets]
        n_experts = self.chance_LE_.shape[1]
        chunks = [Chunks(told, n_experts, chunk=CHUNK, window=self.window + 1) for told in sets]
        with alone(self.seed):
            net = self._net(horizon)
        curve: list[dict[str, float]] = []
        train_net(
            net, *chunks, loss=loss, score=right, settings=training_of(self),
            title=f"transformer, {horizon} ahead", curve=curve,
        )  # fmt: skip
        self.curve += [{"horizon": horizon, **row} for row in curve]
        return flat(net)

    def _blocks(self, part: Part, horizon: int, *, is_remembered: bool) -> Iterator[Told]:
        for past, ids_TLK, counted_T in part.lessons(horizon, *self.needs, max_rows=1024):
            if self.memory and is_remembered and len(self.request_M_):
                counted_T = counted_T & np.isin(past.request_T, np.unique(self.request_M_))
            yield self._told(past, ids_TLK, counted_T, is_remembered=is_remembered)

    def _told(
        self, past: Past, ids_TLK: NDArray[Any], counted_T: NDArray[np.bool_], *, is_remembered: bool
    ) -> Told:  # fmt: skip
        from prefetch.predict.networks.sequences import Told, known_weights

        weights_TLK = known_weights(past) if self.weights else None
        told_TLFE, sure_TL2 = None, None
        if self.memory:
            told_TLFE, sure_TL2 = self._remembering().told(past, is_remembered=is_remembered)
        return Told(ids_TLK, past.first_T, counted_T, weights_TLK, told_TLFE, sure_TL2)

    def _scaled(self, told: Told, horizon: int) -> Told:
        """How sure a memory is comes as a distance from its mean over the training rows."""
        mean_2, spread_2 = getattr(self, f"sure_h{horizon}_")
        return dataclasses.replace(told, sure_TL2=(told.sure_TL2 - mean_2) / spread_2)

    def _remembering(self) -> RouteMemory:
        """Rebuilt from what was learnt."""
        if self._memory is None:
            self._memory = RouteMemory.rebuilt(self)
        return self._memory

    def _weight_scale(self, train: Part) -> NDArray[np.float32]:
        """[2, L]: mean and spread of the logarithms of weights."""
        sums_3L = np.zeros((3, train.card.n_layers))
        if self.weights:
            for past, _, _ in train.lessons(1, *self.needs):
                weights_TLK = past.before_weights()
                logs_TLK = np.log(np.maximum(weights_TLK, LEAST_WEIGHT)) * (weights_TLK > 0)
                terms = weights_TLK > 0, logs_TLK, logs_TLK**2
                sums_3L += np.stack([term.sum(axis=(0, 2)) for term in terms])
        count_L = np.maximum(sums_3L[0], 1)
        mean_L = sums_3L[1] / count_L
        spread_L = np.sqrt(np.maximum(sums_3L[2] / count_L - mean_L**2, 1e-4))
        return np.stack([mean_L, spread_L]).astype(np.float32)

    def resident_bytes(self) -> int:
        """The networks, and what route memory makes of its tokens."""
        return parameter_bytes(self) + (self._remembering().made_bytes() if self.memory else 0)

    def _net(self, horizon: int) -> TransformerNet:
        import torch

        from prefetch.predict.networks.transformer_net import Shape, TransformerNet

        n_told = N_TOLD if self.memory else 0
        shape = Shape(
            self.hidden, self.heads, horizon, self.window, self.dropout, self.weights, n_told
        )
        return TransformerNet(torch.tensor(self.chance_LE_), torch.tensor(self.weight_2L_), shape)

    def scores(self, past: Past) -> NDArray[np.float32]:
        from prefetch.predict.networks.sequences import answers, known_ids

        net = self.fitted(past.horizon)
        everything = np.ones(past.n_tokens, bool)
        told = self._told(past, known_ids(past), everything, is_remembered=False)
        if self.memory:
            told = self._scaled(told, past.horizon)
        return answers(net, told, chunk=CHUNK, window=self.window + 1)

    def fitted(self, horizon: int) -> TransformerNet:
        if horizon not in self._nets:
            net = self._net(horizon)
            fill(net, getattr(self, f"network_h{horizon}_"))
            self._nets[horizon] = net.eval()
        return self._nets[horizon]
