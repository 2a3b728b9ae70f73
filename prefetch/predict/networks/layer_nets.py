"""A small net per layer and horizon on what was recorded of this token: fitted with torch, asked with numpy.

Whoever uses it says what its input is. Where a token has no such input yet the most used experts are the guess.
H horizons, T tokens, L layers, D hidden, M units within, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.networks.training import Training, check, training_of
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.predict.tables import use_of

if TYPE_CHECKING:
    from prefetch.predict.networks.training import Loss

Source = Callable[[Past], NDArray[np.float16]]  # [T, L, D]; 0 where there is none yet


class Weights(NamedTuple):
    """Of one horizon, or of all with H first; 0 for layers that have no input."""

    inner_LDM: NDArray[np.float32]
    inner_bias_LM: NDArray[np.float32]
    outer_LME: NDArray[np.float32]
    outer_bias_LE: NDArray[np.float32]


class Recorded(NamedTuple):
    x_TLD: NDArray[np.float16]
    ids_TLK: NDArray[np.int32]


class Design(NamedTuple):
    """What tells one predictor of this kind from another."""

    column: str  # of the trace
    source: Source
    loss: Loss
    units: int
    is_linear: bool  # nothing between the two layers
    title: str


@dataclass
class InputNets:
    """A predictor of this kind: whoever derives from it says what is read, and how it is learnt."""

    needs: ClassVar[
        tuple[str, ...]
    ]  # the one column of the trace, and the name of what `Past` tells of it
    sees: ClassVar[str]
    score: ClassVar[str] = "logit"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")
    loss: ClassVar[str]  # of `nets`
    title: ClassVar[str]

    horizons: tuple[int, ...] = (1,)
    hidden: int = 128
    epochs: int = 10
    learning_rate: float = 0.01
    batch: int = 512
    patience: int = 3
    most_tokens: int = 32_768  # of the training requests: an input is as wide as the model
    seed: int = 0
    accelerator: str = "cpu"
    devices: int | str = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        self.resume: Path | None = None  # a folder, where an interrupted fit goes on
        self.horizons = horizons_of(self.horizons)
        check(self, "hidden", "most_tokens")

    @property
    def is_linear(self) -> bool:
        return False

    def fit(self, train: Part, validation: Part) -> Self:
        from prefetch.predict.networks import nets

        column, loss = self.needs[0], getattr(nets, self.loss)
        source = getattr(Past, column)
        design = Design(column, source, loss, self.hidden, self.is_linear, self.title)
        self.popular_LE_ = popular_logits(train)
        parts = (
            train.some(self.most_tokens, self.seed),
            validation.some(self.most_tokens, self.seed),
        )
        learnt = fitted(design, parts, self.horizons, self.popular_LE_, training_of(self))
        self.inner_HLDM_, self.inner_bias_HLM_, self.outer_HLME_, self.outer_bias_HLE_ = learnt
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        learnt = self.inner_HLDM_, self.inner_bias_HLM_, self.outer_HLME_, self.outer_bias_HLE_
        place = self.horizons.index(past.horizon)
        weights = Weights(*(array[place] for array in learnt))
        x_TLD = getattr(past, self.needs[0])()
        return scores_of(x_TLD, weights, self.popular_LE_, is_linear=self.is_linear)


def fitted(
    design: Design,
    parts: tuple[Part, Part],
    horizons: Iterable[int],
    popular_LE: NDArray[np.float32],
    settings: Training,
) -> Weights:
    """[H, ...]: to be learnt from the first part, with the best epoch chosen by the second."""
    of_H = []
    for horizon in horizons:
        told, asked = (_recorded(part, horizon, design) for part in parts)
        of_H.append(_fit(design, told, asked, popular_LE, settings, horizon))
    return Weights(*(np.stack(arrays) for arrays in zip(*of_H, strict=True)))


def scores_of(
    x_TLD: NDArray[np.float16],
    weights: Weights,
    popular_LE: NDArray[np.float32],
    *,
    is_linear: bool,
) -> NDArray[np.float32]:
    """[T, L, E] logits."""
    scores_TLE = np.tile(popular_LE, (len(x_TLD), 1, 1))
    for layer in np.flatnonzero(weights.inner_LDM.any(axis=(1, 2))):
        x_TD = finite(x_TLD[:, layer])
        inner_TM = x_TD @ weights.inner_LDM[layer] + weights.inner_bias_LM[layer]
        if not is_linear:
            np.maximum(inner_TM, 0, out=inner_TM)
        own_TE = inner_TM @ weights.outer_LME[layer] + weights.outer_bias_LE[layer]
        known_T = x_TD.any(axis=1)
        scores_TLE[known_T, layer] = own_TE[known_T]
    return scores_TLE


def popular_logits(part: Part) -> NDArray[np.float32]:
    """[L, E]: what is said of an expert before anything is known of the token."""
    use_LE, tokens_L = use_of(part)
    chance_LE = (use_LE + 0.5) / (tokens_L[:, None] + 1)  # never 0 or 1
    return np.log(chance_LE / (1 - chance_LE)).astype(np.float32)


def finite(x: NDArray[np.float16]) -> NDArray[np.float32]:
    """float32; what is not a number counts as 0."""
    return np.nan_to_num(x).astype(np.float32)


def _recorded(part: Part, horizon: int, design: Design) -> Recorded:
    card, inputs, ids = part.card, list[Any](), list[Any]()
    for past, ids_TLK, counted_T in part.lessons(horizon, design.column):
        inputs.append(np.nan_to_num(design.source(past)[counted_T]))
        ids.append(ids_TLK[counted_T].astype(np.int32))
    if not inputs:
        none_TLK = np.zeros((0, card.n_layers, card.top_k), np.int32)
        return Recorded(np.zeros((0, card.n_layers, 0), np.float16), none_TLK)
    return Recorded(np.concatenate(inputs), np.concatenate(ids))


def _fit(
    design: Design,
    told: Recorded,
    asked: Recorded,
    popular_LE: NDArray[np.float32],
    settings: Training,
    horizon: int,
) -> Weights:
    """Only the layers that have an input are learnt."""
    import torch

    from prefetch.predict.networks import nets
    from prefetch.predict.networks.training import alone, train_net

    (n_layers, n_experts), n_inputs = popular_LE.shape, told.x_TLD.shape[2]
    empty = [(n_inputs, design.units), (design.units,), (design.units, n_experts), (n_experts,)]
    weights = Weights(*(np.zeros((n_layers, *shape), np.float32) for shape in empty))
    layers = np.flatnonzero(told.x_TLD.any(axis=(0, 2)))
    if not len(layers):
        return weights
    mean_LD, scale_LD = (torch.from_numpy(array[layers]) for array in _scaling(told.x_TLD))
    bias_LE = torch.from_numpy(popular_LE[layers])
    with alone(settings.seed):
        net = nets.LayerNets(mean_LD, scale_LD, bias_LE, design.units, is_linear=design.is_linear)
    train_net(
        net,
        _tensors(told, layers),
        _tensors(asked, layers),
        loss=design.loss,
        score=nets.recall,
        settings=settings,
        title=f"{design.title}, {horizon} ahead",
    )
    for array, learnt in zip(weights, net.folded(), strict=True):
        array[layers] = learnt.detach().numpy()
    return weights


def _tensors(recorded: Recorded, layers: NDArray[Any]) -> list[Any]:
    import torch

    return [torch.from_numpy(array[:, layers]) for array in recorded]


def _scaling(x_TLD: NDArray[np.float16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[L, D] mean and spread over the rows that have an input; a layer at a time, because it is large."""
    shape = x_TLD.shape[1:]
    mean_LD, scale_LD = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for layer in range(shape[0]):
        x_TD = x_TLD[:, layer].astype(np.float32)
        x_TD = x_TD[x_TD.any(axis=1)]
        if len(x_TD):
            mean_LD[layer], spread_D = x_TD.mean(axis=0), x_TD.std(axis=0)
            least = 1e-3 * spread_D.max() + 1e-6  # a constant input tells nothing: it stays small
            scale_LD[layer] = np.maximum(spread_D, least)
    return mean_LD, scale_LD
