"""The network on routing history, told what route memory says: the most accurate of routing history, and the dearest.

Its memory is the training requests; while it learns, a request is not asked about itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import MissingData
from prefetch.predict.alike import N_TOLD
from prefetch.predict.mlp import DECAYS, contexts_of
from prefetch.predict.networks.training import alone, check, fill, flat, train_net, training_of
from prefetch.predict.part import Part, together
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of, parameter_bytes
from prefetch.predict.route_memory import FEWEST_TOLD, RouteMemory, mean_and_spread
from prefetch.predict.tables import chance_of_use, use_of
from prefetch.threads import one_thread
from prefetch.trace.routing import RoutingTrace

if TYPE_CHECKING:
    from prefetch.predict.networks.memory_net import MemoryNet, OrderedRows

WINDOW = 512  # rows that are guessed at once


@dataclass
class MemoryMlp:
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    hidden: int = 160
    epochs: int = 6
    batch: int = 256
    learning_rate: float = 3e-3
    dropout: float = 0.25
    stops_early: bool = False
    patience: int = 3
    most_tokens: int = 32_768  # of the training requests: to learn from, and to remember
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # where an interrupted fit left its checkpoints
        self.curve: list[dict[str, float]] = []  # a row per epoch and horizon
        self.horizons = horizons_of(self.horizons)
        self._nets: dict[int, MemoryNet] = {}
        self._memory: RouteMemory | None = None
        check(self, "hidden", "most_tokens")

    def fit(self, train: Part, validation: Part) -> Self:
        """Unless they tell when to stop, the validation requests are learnt from as well."""
        if not self.stops_early:
            train = together(train, validation)
        self.chance_LE_ = chance_of_use(*use_of(train))
        train, validation = (part.some(self.most_tokens, self.seed) for part in (train, validation))
        memory = RouteMemory(memory_tokens=self.most_tokens, seed=self.seed)
        memory.chance_LE_ = self.chance_LE_
        memory.remember(train, FEWEST_TOLD)
        self.ids_MLK_, self.request_M_ = memory.ids_MLK_, memory.request_M_
        self._memory, self._nets = memory, {}
        fitted = [self._fit(horizon, train, validation) for horizon in self.horizons]
        self.sure_H22_ = np.stack([sure_22 for sure_22, _ in fitted])
        for horizon, (_, network) in zip(self.horizons, fitted, strict=True):
            setattr(self, f"network_h{horizon}_", network)
        return self

    def _fit(
        self, horizon: int, train: Part, validation: Part
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """How sure the memories are, mean and spread, and the network."""
        from prefetch.predict.networks.memory_net import loss, right

        told = _gathered(self._told(train, horizon, is_remembered=True))
        sure_22 = mean_and_spread(told[3][told[2]].reshape(-1, 2))
        asked = tuple(array[:0] for array in told)
        if self.stops_early:
            asked = _gathered(self._told(validation, horizon, is_remembered=False))
        with alone(self.seed):
            net = self._net(horizon)
        curve: list[dict[str, float]] = []
        train_net(
            net, _rows(told, sure_22), _rows(asked, sure_22), loss=loss, score=right, settings=training_of(self),
            title=f"memory_mlp, {horizon} ahead", curve=curve,
        )  # fmt: skip
        self.curve += [{"horizon": horizon, **row} for row in curve]
        return sure_22, flat(net)

    def _told(
        self, part: Part, horizon: int, *, is_remembered: bool
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """(ids, contexts, counted, how sure a memory is, its word) of every block."""
        memory = self.memory()
        remembered = set(self.request_M_.tolist())
        drawn, columns = np.random.default_rng(self.seed), {"weights"} & set(part.columns)
        for block, counted_T in part.blocks(*columns, max_rows=1024):
            past, ids_TLK = Past(block, horizon), best_first(block, drawn)
            if is_remembered and remembered:
                counted_T = counted_T & np.isin(past.request_T, sorted(remembered))
            told_TLFE, sure_TL2 = memory.told(past, is_remembered=is_remembered)
            yield ids_TLK, contexts_of(past, DECAYS), counted_T, sure_TL2, told_TLFE

    def memory(self) -> RouteMemory:
        """Rebuilt from what was learnt."""
        if self._memory is None:
            self._memory = RouteMemory.rebuilt(self)
        return self._memory

    def resident_bytes(self) -> int:
        """The networks, and what route memory makes of its tokens."""
        return parameter_bytes(self) + self.memory().made_bytes()

    def _net(self, horizon: int) -> MemoryNet:
        import torch

        from prefetch.predict.networks.memory_net import MemoryNet

        chance_LE = torch.tensor(self.chance_LE_)
        return MemoryNet(chance_LE, len(DECAYS), self.hidden, horizon, self.dropout, N_TOLD)

    def scores(self, past: Past) -> NDArray[np.float32]:
        import torch

        net = self.fitted(past.horizon)
        told_TLFE, sure_TL2 = self.memory().told(past, is_remembered=False)
        sure_22 = self.sure_H22_[self.horizons.index(past.horizon)]
        known_TLK = np.full((*past.shape[:2], past.card.top_k), past.nobody, np.int64)
        reach = past.card.n_layers - past.horizon
        if reach > 0:
            known_TLK[:, :reach] = past.here()[:, past.horizon :]
        everything = np.ones(past.n_tokens, bool)
        rows = _rows(
            (known_TLK, contexts_of(past, DECAYS), everything, sure_TL2, told_TLFE), sure_22
        )
        out_TLE = np.empty(past.shape, np.float32)
        with one_thread(), torch.no_grad():
            for window in past.windows(WINDOW):
                batch = rows.__getitems__(list(range(window.start, window.stop)))
                out_TLE[window] = torch.sigmoid(net(*batch[:-1])).numpy()
        return out_TLE

    def fitted(self, horizon: int) -> MemoryNet:
        if horizon not in self._nets:
            net = self._net(horizon)
            fill(net, getattr(self, f"network_h{horizon}_"))
            self._nets[horizon] = net.eval()
        return self._nets[horizon]


def _gathered(blocks: Iterator[tuple[NDArray[Any], ...]]) -> tuple[NDArray[Any], ...]:
    found = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    if not found or not found[2].any():
        raise MissingData(
            "a network needs training and validation rows; there are too few requests"
        )
    return tuple(found)


def _rows(told: tuple[NDArray[Any], ...], sure_22: NDArray[np.float32]) -> OrderedRows:
    """How sure a memory is comes as a distance from its mean over the training rows."""
    from prefetch.predict.networks.memory_net import OrderedRows

    ids_TLK, context_TCLE, counted_T, sure_TL2, told_TLFE = told
    sure = ((sure_TL2 - sure_22[0]) / sure_22[1]).astype(np.float32)
    return OrderedRows(ids_TLK, context_TCLE, np.flatnonzero(counted_T), told_TLFE, sure)


def best_first(block: RoutingTrace, drawn: np.random.Generator) -> NDArray[Any]:
    """The choices in the order of their weights; where weights are not recorded in no order, not in that of ids."""
    if block.weights_TLK is None:
        order = drawn.permuted(
            np.broadcast_to(np.arange(block.card.top_k), block.ids_TLK.shape), axis=2
        )
    else:
        order = np.argsort(
            -np.nan_to_num(block.weights_TLK.astype(np.float32)), axis=2, kind="stable"
        )
    return np.take_along_axis(block.ids_TLK, order, axis=2)
