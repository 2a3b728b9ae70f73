"""The default learned predictor: one small network on routing history alone, for all layers, of one horizon each.

It sees this token's experts up to layer l - horizon, the token before, and two decayed averages of earlier tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.networks import history
from prefetch.predict.networks.training import alone, check, train_net, training_of
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.tables import chance_of_use, use_of
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import no_expert

DECAYS = (0.0, 0.8, 0.97)  # of usage averages; with decay 0 it is the token before


@dataclass
class Mlp:
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    hidden: int = 128
    decays: tuple[float, ...] = DECAYS
    epochs: int = 8
    batch: int = 256
    learning_rate: float = 4e-3
    dropout: float = 0.2
    patience: int = 3
    most_tokens: int = (
        100_000  # of the training requests, drawn by the seed; they are held in memory
    )
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # where an interrupted fit left its checkpoints
        self.curve: list[dict[str, float]] = []  # a row per epoch and horizon
        self.horizons = horizons_of(self.horizons)
        self.decays = tuple(float(decay) for decay in self.decays)
        if not all(0 <= decay < 1 for decay in self.decays):
            raise ConfigError(f"decays={list(self.decays)}: expected each from 0 up to below 1")
        check(self, "hidden", "most_tokens")

    def fit(self, train: Part, validation: Part) -> Self:
        chance_LE = chance_of_use(*use_of(train))
        told, asked = (
            _Told.of(part.some(self.most_tokens, self.seed), self.decays)
            for part in (train, validation)
        )
        for horizon in self.horizons:
            weights = self._fit(chance_LE, told, asked, horizon)
            sizes = self._sizes(train.card, horizon)
            setattr(self, f"network_h{horizon}_", history.arranged(weights, sizes, self.decays))
        return self

    def _sizes(self, card: ModelCard, horizon: int) -> history.Sizes:
        return history.Sizes(
            layers=card.n_layers,
            experts=card.n_experts,
            hidden=self.hidden,
            contexts=len(self.decays),
            horizon=horizon,
            top_k=card.top_k,
            nobody=no_expert(card.n_experts),
        )

    def _fit(
        self, chance_LE: NDArray[np.float32], told: _Told, asked: _Told, horizon: int
    ) -> history.Weights:
        import torch

        from prefetch.predict.networks.history_net import HistoryNet, Rows, loss, right

        curve: list[dict[str, float]] = []
        with alone(self.seed):
            net = HistoryNet(
                torch.tensor(chance_LE), len(self.decays), self.hidden, horizon, self.dropout
            )
        train_net(
            net,
            Rows(told.ids_TLK, told.context_TCLE, told.rows),
            Rows(asked.ids_TLK, asked.context_TCLE, asked.rows),
            loss=loss,
            score=right,
            settings=training_of(self),
            title=f"mlp, {horizon} ahead",
            curve=curve,
        )
        self.curve += [{"horizon": horizon, **row} for row in curve]
        return net.weights()

    def scores(self, past: Past) -> NDArray[np.float32]:
        out_TLE, here_TLK = np.empty(past.shape, np.float32), past.here()
        network = self.network(past.horizon)
        room = history.fresh(network)
        stops = [*past.starts_R[1:].tolist(), past.n_tokens]
        for first, stop in zip(past.starts_R.tolist(), stops, strict=True):
            earlier_SLK = past.earlier(stop - 1)
            history.replay(earlier_SLK, here_TLK[first:stop], network, room, out_TLE[first:stop])
        return out_TLE

    def network(self, horizon: int) -> history.Float:
        """Of one horizon; what was read from a file is moved to where compiled loops like it, not held twice."""
        name = f"network_h{horizon}_"
        setattr(self, name, history.aligned(getattr(self, name)))
        network: history.Float = getattr(self, name)
        return network

    def online(self, horizon: int) -> MlpOnline:
        return MlpOnline(self, horizon)


class MlpOnline:
    """The same answers, one event at a time. An answer stands until the next guess."""

    def __init__(self, fitted: Mlp, horizon: int) -> None:
        self._network = fitted.network(horizon)
        self._room = history.fresh(self._network)
        self._out_E = history.answer_in(self._network, self._room)

    def start(self) -> None:
        history.begin(self._network, self._room)

    def observe(
        self, layer: int, ids: NDArray[Any], gate_input: NDArray[Any] | None = None
    ) -> None:
        history.observe(ids, layer, self._network, self._room)

    def guess(self, layer: int) -> NDArray[np.float32]:
        history.guess(layer, self._network, self._room)
        return self._out_E


def contexts_of(past: Past, decays: tuple[float, ...]) -> NDArray[np.float16]:
    """[T, C, L, E]"""
    n_tokens, n_layers, n_experts = past.shape
    out_TCLE = np.empty((n_tokens, len(decays), n_layers, n_experts), np.float16)
    for c, decay in enumerate(decays):
        out_TCLE[:, c] = past.usage(decay)
    return out_TCLE


@dataclass(frozen=True, eq=False)
class _Told:
    """What the network learns from: routing, and the usage of earlier tokens."""

    ids_TLK: NDArray[Any]
    context_TCLE: NDArray[np.float16]
    rows: NDArray[np.int64]  # those that count

    @classmethod
    def of(cls, part: Part, decays: tuple[float, ...]) -> _Told:
        ids, contexts, counted = [], [], []
        for past, ids_TLK, counted_T in part.lessons(1):
            ids.append(ids_TLK)
            contexts.append(contexts_of(past, decays))
            counted.append(counted_T)
        return cls(
            np.concatenate(ids), np.concatenate(contexts), np.flatnonzero(np.concatenate(counted))
        )
