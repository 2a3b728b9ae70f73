"""The answer itself: what prefetching can gain at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.noisy_oracle import NoisyOracle
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import ANSWER, horizons_of


@dataclass
class Oracle:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = ANSWER
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        return NoisyOracle(self.horizons, recall=1.0).scores(past)
