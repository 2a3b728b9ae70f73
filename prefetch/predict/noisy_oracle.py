"""The answer with a set share of it: how good must a predictor be?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.part import Part
from prefetch.predict.past import Answered, Past
from prefetch.predict.predictor import ANSWER, horizons_of
from prefetch.predict.random import Random


@dataclass
class NoisyOracle:
    """Every true expert with chance `recall`, in a random order; the other guesses are wrong ones, drawn at random."""

    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = ANSWER
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)
    recall: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if not 0 <= self.recall <= 1:
            raise ConfigError(f"recall: must lie between 0 and 1, got {self.recall}")

    def fit(self, train: Part, validation: Part) -> Self:
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        """What is told stands above 2, wrong experts between 1 and 2, true ones that are kept back below 1."""
        assert isinstance(past, Answered)
        draws = Random(self.horizons, self.seed)
        drawn_TLE = draws.scores(past)
        is_true_TLE = np.zeros((*past.shape[:2], past.shape[2] + 1), bool)
        ids_TLK = np.minimum(past.answer, past.shape[2])  # "no expert" is beyond the last
        np.put_along_axis(is_true_TLE, ids_TLK.astype(np.int64), True, axis=2)
        is_true_TLE = is_true_TLE[:, :, :-1]
        is_told_TLE = is_true_TLE & (drawn_TLE < self.recall)
        return drawn_TLE + np.where(is_told_TLE, 2, np.where(is_true_TLE, 0, 1)).astype(np.float32)
