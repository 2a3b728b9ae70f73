"""The layer's most used experts of the training requests, whatever the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import NOTHING, PROBABILITY, horizons_of
from prefetch.predict.tables import chance_of_use, use_of


@dataclass
class Popularity:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = NOTHING
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        self.chance_LE_ = chance_of_use(*use_of(train))
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        return np.broadcast_to(self.chance_LE_, past.shape)
