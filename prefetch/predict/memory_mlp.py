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

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.mlp import DECAYS
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.route_memory import SHARP_INSIDE, SHARP_OUTSIDE, RouteMemory
from prefetch.predict.tables import chance_of_use, use_of

if TYPE_CHECKING:
    from torch import Tensor

    from prefetch.predict.history_net import MemoryNet, Rows

WINDOW = 512  # rows that are guessed at once


@dataclass
class MemoryMlp:
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    hidden: int = 160
    epochs: int = 5
    batch: int = 256
    learning_rate: float = 3e-3
    dropout: float = 0.2
    patience: int = 3
    most_tokens: int = 32_768  # of the training requests: to learn from, and to remember
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # where an interrupted fit left its checkpoints
        self.curve: list[dict[str, float]] = []  # a row per epoch and horizon
        self.horizons = horizons_of(self.horizons)
        self._nets: dict[int, MemoryNet] = {}
        self._memory: RouteMemory | None = None
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"hidden={self.hidden}, dropout={self.dropout}: expected at least 1, and a share below 1"
            )

    def fit(self, train: Part, validation: Part) -> Self:
        from prefetch.predict.history_net import loss, right
        from prefetch.predict.training import alone, train_net, training_of

        self.chance_LE_ = chance_of_use(*use_of(train))
        memory = RouteMemory(memory_tokens=self.most_tokens, seed=self.seed)
        memory.chance_LE_ = self.chance_LE_
        memory.remember(train)
        self.ids_MLK_, self.request_M_ = memory.ids_MLK_, memory.request_M_
        sure_H22, self._memory = [], memory
        for horizon in self.horizons:
            told = _gathered(self._told(train, horizon, is_remembered=True))
            sure = told[3][told[2]]
            sure_22 = np.stack([sure.mean((0, 1)), sure.std((0, 1)) + 1e-3]).astype(np.float32)
            asked = _gathered(self._told(validation, horizon, is_remembered=False))
            with alone(self.seed):
                net = self._net(horizon)
            title = f"memory_mlp, {horizon} ahead"
            sets = _rows(told, sure_22), _rows(asked, sure_22)
            curve: list[dict[str, float]] = []
            train_net(
                net,
                *sets,
                loss=loss,
                score=right,
                settings=training_of(self),
                title=title,
                curve=curve,
            )
            self.curve += [{"horizon": horizon, **row} for row in curve]
            sure_H22.append(sure_22)
            setattr(self, f"network_h{horizon}_", _flat(net))
        self.sure_H22_ = np.stack(sure_H22)
        return self

    def _told(
        self, part: Part, horizon: int, *, is_remembered: bool
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """(ids, contexts, counted, how sure a memory is, its word) of every block, up to `most_tokens`."""
        total, memory = 0, self.memory()
        remembered = set(self.request_M_.tolist())
        for past, ids_TLK, counted_T in part.lessons(horizon, max_rows=1024):
            if total and total + len(ids_TLK) > self.most_tokens:
                break
            total += len(ids_TLK)
            if is_remembered:
                counted_T = counted_T & np.isin(past.request_T, sorted(remembered))
            told_TLFE, sure_TL2 = memory.told(past, is_remembered=is_remembered)
            yield ids_TLK, _contexts(past), counted_T, sure_TL2, told_TLFE

    def memory(self) -> RouteMemory:
        """Rebuilt from what was learnt."""
        if self._memory is None:
            memory = RouteMemory(memory_tokens=self.most_tokens, seed=self.seed)
            memory.chance_LE_, memory.ids_MLK_ = self.chance_LE_, self.ids_MLK_
            memory.request_M_ = self.request_M_
            memory.goes_on_M_ = np.diff(self.request_M_, prepend=-1) == 0
            self._memory = memory
        return self._memory

    def _net(self, horizon: int) -> MemoryNet:
        import torch

        from prefetch.predict.history_net import MemoryNet

        n_told = len(SHARP_INSIDE) + len(SHARP_OUTSIDE)
        chance_LE = torch.tensor(self.chance_LE_)
        return MemoryNet(chance_LE, len(DECAYS), self.hidden, horizon, self.dropout, n_told)

    def scores(self, past: Past) -> NDArray[np.float32]:
        import torch

        from prefetch.predict.training import one_thread

        net = self._fitted(past.horizon)
        told_TLFE, sure_TL2 = self.memory().told(past, is_remembered=False)
        sure_22 = self.sure_H22_[self.horizons.index(past.horizon)]
        known_TLK = np.full((*past.shape[:2], past.card.top_k), past.nobody, np.int64)
        reach = past.card.n_layers - past.horizon
        if reach > 0:
            known_TLK[:, :reach] = past.here()[:, past.horizon :]
        everything = np.ones(past.n_tokens, bool)
        rows = _rows((known_TLK, _contexts(past), everything, sure_TL2, told_TLFE), sure_22)
        out_TLE = np.empty(past.shape, np.float32)
        with one_thread(), torch.no_grad():
            for window in past.windows(WINDOW):
                batch = rows.__getitems__(list(range(window.start, window.stop)))
                out_TLE[window] = torch.sigmoid(net(*batch)).numpy()
        return out_TLE

    def _fitted(self, horizon: int) -> MemoryNet:
        if horizon not in self._nets:
            net = self._net(horizon)
            _fill(net, getattr(self, f"network_h{horizon}_"))
            self._nets[horizon] = net.eval()
        return self._nets[horizon]


def _contexts(past: Past) -> NDArray[np.float16]:
    return np.stack([past.usage(decay) for decay in DECAYS], axis=1).astype(np.float16)


def _gathered(blocks: Iterator[tuple[NDArray[Any], ...]]) -> tuple[NDArray[Any], ...]:
    found = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    if not found or not found[2].any():
        raise MissingData(
            "a network needs training and validation rows; there are too few requests"
        )
    return tuple(found)


def _rows(told: tuple[NDArray[Any], ...], sure_22: NDArray[np.float32]) -> Rows:
    """How sure a memory is comes as a distance from its mean over the training rows."""
    from prefetch.predict.history_net import Rows

    ids_TLK, context_TCLE, counted_T, sure_TL2, told_TLFE = told
    sure = ((sure_TL2 - sure_22[0]) / sure_22[1]).astype(np.float32)
    return Rows(ids_TLK, context_TCLE, np.flatnonzero(counted_T), told_TLFE, sure)


def _flat(net: MemoryNet) -> NDArray[np.float32]:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in net.state_dict().values()])


def _fill(net: MemoryNet, flat: NDArray[np.float32]) -> None:
    import torch

    at, state = 0, dict[str, "Tensor"]()
    for name, tensor in net.state_dict().items():
        state[name] = torch.from_numpy(flat[at : at + tensor.numel()].reshape(tensor.shape).copy())
        at += tensor.numel()
    net.load_state_dict(state)
