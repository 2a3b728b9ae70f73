"""Pre-attention expert prediction (arXiv 2511.10676): two linear layers on what the attention of a layer reads.

The input of attention at layer l - horizon + 1 exists once layer l - horizon is done: at horizon 1 it is that of the
guessed layer itself, which even the first layer has. Above that the first layers are guessed by popularity.

Where it differs from the published one: its ranking loss is not reproduced; here every chosen expert is compared with
all that were not chosen (`nets.against_others`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.layer_nets import Design, Weights, fitted, popular_logits, scores_of
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.predict.training import check, training_of


@dataclass
class PreAttention:
    needs: ClassVar[tuple[str, ...]] = ("pre_attention",)
    sees: ClassVar[str] = "attention inputs"
    score: ClassVar[str] = "logit"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")

    horizons: tuple[int, ...] = (1,)
    hidden: int = 128
    activation: bool = False
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

    def fit(self, train: Part, validation: Part) -> Self:
        from prefetch.predict.nets import against_others

        design = Design(
            column="pre_attention",
            source=Past.pre_attention,
            loss=against_others,
            units=self.hidden,
            is_linear=not self.activation,
            title="pre_attention",
        )
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
        is_linear = not self.activation
        return scores_of(past.pre_attention(), weights, self.popular_LE_, is_linear=is_linear)
