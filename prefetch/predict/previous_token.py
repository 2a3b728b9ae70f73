"""The experts that the token before used at this layer, and then the most used ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.predict.tables import add_rows, chance_of_use, use_of


@dataclass
class PreviousToken:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        self.chance_LE_ = chance_of_use(*use_of(train))
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        scores_TLE = np.tile(self.chance_LE_, (past.n_tokens, 1, 1))
        n_layers, n_experts = self.chance_LE_.shape
        itself_LEE = np.tile(np.float32(2) * np.eye(n_experts, dtype=np.float32), (n_layers, 1, 1))
        add_rows(past.before(), itself_LEE, past.nobody, scores_TLE)
        return scores_TLE
