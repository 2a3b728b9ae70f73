"""ProMoE's predictor (arXiv 2410.22134): a small net per layer reads the gate's input some layers before.

Nets of different horizons and layers share nothing. In the first layers, where no gate input of this token exists yet,
the most used experts are the guess.
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
class HiddenMlp:
    needs: ClassVar[tuple[str, ...]] = ("gate_inputs",)
    sees: ClassVar[str] = "gate inputs"
    score: ClassVar[str] = "logit"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "lightning")

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

    def fit(self, train: Part, validation: Part) -> Self:
        from prefetch.predict.nets import each_alone

        design = Design(
            column="gate_inputs",
            source=Past.gate_inputs,
            loss=each_alone,
            units=self.hidden,
            is_linear=False,
            title="hidden_mlp",
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
        return scores_of(past.gate_inputs(), weights, self.popular_LE_, is_linear=False)
