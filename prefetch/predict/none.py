"""No guess at all: what loading on demand does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import NOT_GUESSED, NOTHING, horizons_of


@dataclass
class Nothing:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = NOTHING
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        return np.full(past.shape, NOT_GUESSED, np.float32)
