"""MoE-Beyond's encoder (arXiv 2508.17137): a small transformer over a request's tokens, from gate inputs to experts.

As published it is a leak, and is marked as one: it reads the gate's input at the very layer that it guesses, which the
gate itself turns into the answer, and every token sees the later ones. With `leak: false` it reads layer l - horizon
and no later token: an honest predictor with the same net.

Where it differs from the published one: a layer is a sequence of its own, not the tail of one sequence of all layers;
the layer's embedding is learnt and added, not drawn and appended; there is no dropout. As there, no position is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.part import Part
from prefetch.predict.past import Answered, Past
from prefetch.predict.predictor import ANSWER, horizons_of
from prefetch.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS_AT_ONCE = 8  # of a step: a step's inputs are this many times tokens times hidden size
WEIGHT_DECAY, LARGEST_GRADIENT = 0.01, 1.0  # the published ones


@dataclass
class Encoder:
    """One net for all layers; one for every horizon, where the horizon makes a difference."""

    needs: ClassVar[tuple[str, ...]] = ("gate_inputs",)
    score: ClassVar[str] = "logit"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    horizons: tuple[int, ...] = (1,)
    leak: bool = True
    hidden: int = 64
    n_layers: int = 2
    heads: int = 4
    context: int = 512
    epochs: int = 3
    learning_rate: float = 1e-3
    seed: int = 0
    sees: str = field(default=ANSWER, init=False)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        for name in ("hidden", "n_layers", "heads", "context", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ConfigError(
                f"hidden: must be a multiple of heads={self.heads}, got {self.hidden}"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate: must be above 0, got {self.learning_rate}")
        if self.seed < 0:
            raise ConfigError(f"seed: must not be negative, got {self.seed}")
        self.sees = ANSWER if self.leak else "gate inputs"

    def fit(self, train: Part, validation: Part) -> Self:
        train.require(*self.needs)
        self.shape_ = _shape(train)
        horizons = self.horizons[:1] if self.leak else self.horizons
        with one_thread():
            self.parameters_HP_ = np.stack([self._fitted(train, horizon) for horizon in horizons])
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        import torch
        from torch.nn.utils import vector_to_parameters

        net = self._net()
        learnt_P = self.parameters_HP_[0 if self.leak else self.horizons.index(past.horizon)]
        vector_to_parameters(torch.from_numpy(learnt_P.copy()), net.parameters())
        scores_TLE, inputs_TLD = np.empty(past.shape, np.float32), self._inputs(past)
        with one_thread(), torch.inference_mode():
            for rows in pieces(past, self.context):
                for layers in layer_groups(past.card.n_layers):
                    logits = self._logits(net, inputs_TLD[rows, layers], layers)
                    scores_TLE[rows, layers] = logits.transpose(0, 1).numpy()
        return scores_TLE

    def _inputs(self, past: Past) -> NDArray[np.float16]:
        if not self.leak:
            return past.gate_inputs()
        assert isinstance(past, Answered)
        return past.own_gate_inputs()

    def _fitted(self, train: Part, horizon: int) -> NDArray[np.float32]:
        """[P]: all parameters of the net, learnt a piece of a request and some layers at a time."""
        import torch
        from torch.nn.utils import clip_grad_norm_, parameters_to_vector

        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            net = self._net()
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY
        )
        for _ in range(self.epochs):
            for loss in self._losses(net, train, horizon, rng):
                optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(net.parameters(), LARGEST_GRADIENT)
                optimizer.step()
        return parameters_to_vector(net.parameters()).detach().numpy()

    def _losses(
        self, net: nn.ModuleDict, train: Part, horizon: int, rng: np.random.Generator
    ) -> Iterator[Tensor]:
        """In a new order at every call, within blocks."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        for block, counted_T in train.blocks(*self.needs):
            past = (Answered if self.leak else Past)(block, horizon)
            inputs_TLD, n_layers = self._inputs(past), past.card.n_layers
            taught_TL = counted_T[:, None] & (block.ids_TLK != past.nobody).any(axis=2)
            steps = [(r, ls) for r in pieces(past, self.context) for ls in layer_groups(n_layers)]
            for step in rng.permutation(len(steps)).tolist():
                rows, layers = steps[step]
                taught = torch.from_numpy(taught_TL[rows, layers].T.copy())
                if not taught.any():
                    continue
                used_TLE = _used(block.ids_TLK[rows, layers], past.card.n_experts)
                used = torch.from_numpy(used_TLE).transpose(0, 1)
                logits = self._logits(net, inputs_TLD[rows, layers], layers)
                yield binary_cross_entropy_with_logits(logits[taught], used[taught])

    def _net(self) -> nn.ModuleDict:
        from torch import nn

        n_inputs, n_layers, n_experts = self.shape_.tolist()
        block = nn.TransformerEncoderLayer(
            self.hidden, self.heads, 4 * self.hidden, dropout=0.0, batch_first=True
        )
        return nn.ModuleDict(
            {
                "norm": nn.LayerNorm(n_inputs),
                "project": nn.Linear(n_inputs, self.hidden),
                "layer": nn.Embedding(n_layers, self.hidden),
                "encoder": nn.TransformerEncoder(block, self.n_layers, enable_nested_tensor=False),
                "experts": nn.Linear(self.hidden, n_experts),
            }
        )

    def _logits(self, net: nn.ModuleDict, inputs_TLD: NDArray[np.float16], layers: slice) -> Tensor:
        """[L, T, E]: a sequence of tokens for every one of these layers."""
        import torch

        inputs_LTD = torch.from_numpy(
            np.nan_to_num(inputs_TLD.transpose(1, 0, 2)).astype(np.float32)
        )
        numbers_L = torch.arange(layers.start, layers.stop)
        states_LTD = net["project"](net["norm"](inputs_LTD)) + net["layer"](numbers_L)[:, None]
        n_tokens, mask = len(inputs_TLD), None
        if not self.leak:
            mask = torch.ones((n_tokens, n_tokens), dtype=torch.bool).triu(1)
        return net["experts"](net["encoder"](states_LTD, mask=mask))


def pieces(past: Past, context: int) -> Iterator[slice]:
    """Rows of one request, `context` at most: what a token can attend to."""
    stops = [*past.starts_R[1:].tolist(), past.n_tokens]
    for first, stop in zip(past.starts_R.tolist(), stops, strict=True):
        for start in range(first, stop, context):
            yield slice(start, min(start + context, stop))


def layer_groups(n_layers: int) -> Iterator[slice]:
    for first in range(0, n_layers, LAYERS_AT_ONCE):
        yield slice(first, min(first + LAYERS_AT_ONCE, n_layers))


def _shape(train: Part) -> NDArray[np.int64]:
    """Of the net: size of a gate input, layers, experts."""
    for block, _ in train.blocks("gate_inputs"):
        assert block.gate_inputs_TLD is not None
        n_inputs = block.gate_inputs_TLD.shape[2]
        return np.array([n_inputs, block.card.n_layers, block.card.n_experts])
    raise MissingData("no training request has a row: there is nothing to learn from")


def _used(ids_TLK: NDArray[Any], n_experts: int) -> NDArray[np.float32]:
    """[T, L, E]: 1 for who was chosen."""
    used_TLE = np.zeros((*ids_TLK.shape[:2], n_experts + 1), np.float32)
    np.put_along_axis(used_TLE, np.minimum(ids_TLK, n_experts).astype(np.int64), 1, axis=2)
    return used_TLE[:, :, :-1]  # "no expert" is beyond the last
