"""A recurrent network on routing history: every finished token moves the state of its request, which all layers read.

One network for all layers, of one horizon each. It learns from chunks of requests, each begun with an empty state;
when it guesses, the state runs through the whole request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.networks.training import alone, check, fill, flat, train_net, training_of
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.tables import chance_of_use, use_of
from prefetch.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from prefetch.predict.networks.recurrent_net import RecurrentNet, State
    from prefetch.predict.networks.sequences import Told

CHUNK = 256  # tokens that are guessed together: memory, and nothing else


@dataclass
class Recurrent:
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    hidden: int = 128
    units: int = 64  # of the state
    chunk: int = 256  # tokens of a request that are learnt from together
    epochs: int = 9
    batch: int = 3  # chunks
    learning_rate: float = 4e-3
    dropout: float = 0.3
    patience: int = 3
    most_tokens: int = 65_536  # of the training requests
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # where an interrupted fit left its checkpoints
        self.curve: list[dict[str, float]] = []  # a row per epoch and horizon
        self.horizons = horizons_of(self.horizons)
        self._nets: dict[int, RecurrentNet] = {}
        check(self, "hidden", "units", "chunk", "most_tokens")

    def fit(self, train: Part, validation: Part) -> Self:
        from prefetch.predict.networks.sequences import Chunks, Told

        self.chance_LE_, self._nets = chance_of_use(*use_of(train)), {}
        parts = (part.some(self.most_tokens, self.seed) for part in (train, validation))
        told, asked = (Told.gathered(_blocks(part)) for part in parts)
        n_experts = self.chance_LE_.shape[1]
        sets = [Chunks(part, n_experts, chunk=self.chunk, window=0) for part in (told, asked)]
        for horizon in self.horizons:
            setattr(self, f"network_h{horizon}_", flat(self._fit(sets, horizon)))
        return self

    def _fit(self, sets: list[Any], horizon: int) -> RecurrentNet:
        from prefetch.predict.networks.sequences import loss, right

        with alone(self.seed):
            net = self._net(horizon)
        curve: list[dict[str, float]] = []
        train_net(
            net, *sets, loss=loss, score=right, settings=training_of(self),
            title=f"recurrent, {horizon} ahead", curve=curve,
        )  # fmt: skip
        self.curve += [{"horizon": horizon, **row} for row in curve]
        return net

    def _net(self, horizon: int) -> RecurrentNet:
        import torch

        from prefetch.predict.networks.recurrent_net import RecurrentNet

        return RecurrentNet(
            torch.tensor(self.chance_LE_), self.hidden, self.units, horizon, self.dropout
        )

    def fitted(self, horizon: int) -> RecurrentNet:

        if horizon not in self._nets:
            net = self._net(horizon)
            fill(net, getattr(self, f"network_h{horizon}_"))
            self._nets[horizon] = net.eval()
        return self._nets[horizon]

    def scores(self, past: Past) -> NDArray[np.float32]:
        import torch

        from prefetch.predict.networks.sequences import Chunks, Told, known_ids

        net, out_TLE = self.fitted(past.horizon), np.empty(past.shape, np.float32)
        told = Told(known_ids(past), past.first_T, np.ones(past.n_tokens, bool))
        chunks = Chunks(told, past.shape[2], chunk=CHUNK, window=0)
        with one_thread(), torch.no_grad():
            for i, (_, first, stop) in enumerate(chunks.chunks):
                if first == past.first_T[first]:
                    state = net.empty(1)
                logits, state = net.run(chunks.__getitems__([i]), state)
                out_TLE[first:stop] = torch.sigmoid(logits).numpy()
        return out_TLE

    def online(self, horizon: int) -> RecurrentOnline:
        return RecurrentOnline(self.fitted(horizon), horizon)


class RecurrentOnline:
    """The same answers, one event at a time; sums in another order, so they differ in the last digits."""

    def __init__(self, net: RecurrentNet, horizon: int) -> None:
        import torch

        self._net, self._horizon = net, horizon
        self._used_LE = torch.zeros(net.n_layers, net.n_experts)
        self._above_LN = torch.zeros(net.n_layers, net.hidden)
        self.start()

    def start(self) -> None:
        self._begin(self._net.empty(1), self._used_LE[:0])

    def observe(
        self, layer: int, ids: NDArray[Any], gate_input: NDArray[Any] | None = None
    ) -> None:
        import torch

        with torch.no_grad():
            known = torch.from_numpy(ids[ids < self._net.n_experts].astype(np.int64))
            self._used_LE[layer, known] = 1
            above = self._net.above_LEN[layer, known].sum(0)
            self._above_LN[layer] = above + (self._above_LN[layer - 1] if layer else 0)
            if layer == self._net.n_layers - 1:
                self._begin(self._state, self._used_LE)

    def _begin(self, state: State, used_LE: Tensor) -> None:
        """A token begins after this one; after none where nothing was used yet."""
        import torch

        with torch.no_grad():
            used_BCD = used_LE.reshape(1, -1, self._used_LE.numel())
            states, read, self._state = self._net.between(used_BCD, state)
        self._states_MG = states[0, -1:]
        self._read_UMLE = read[:, 0, -1:].unflatten(2, self._used_LE.shape)
        self._used_LE.zero_()

    def guess(self, layer: int) -> NDArray[np.float32]:
        import torch

        here, known = slice(layer, layer + 1), layer - self._horizon
        above_N, nearest_E = torch.zeros(self._net.hidden), torch.zeros(self._net.n_experts)
        if known >= 0:
            above_N, nearest_E = self._above_LN[known], self._used_LE[known]
        read_UMLE = self._read_UMLE[:, :, here]
        with torch.no_grad():
            logits = self._net.answer(
                above_N[None, None], nearest_E[None, None], read_UMLE, self._states_MG, here
            )
            return torch.sigmoid(logits)[0, 0].numpy()


def _blocks(part: Part) -> Iterator[Told]:
    from prefetch.predict.networks.sequences import Told

    for past, ids_TLK, counted_T in part.lessons(1):
        yield Told(ids_TLK, past.first_T, counted_T)
