"""First-order Markov counts: the experts of layer l - horizon tell those of layer l.

In the first layers, where this token has no such layer yet, the token before tells, at the same layer. With
`chained`, the counts of one layer to the next are multiplied instead of counting over the whole distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.tables import (
    add_rows,
    chance_of_use,
    count_after,
    is_known,
    rows_of,
    share_of_use,
    use_of,
)


@dataclass
class Markov:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    chained: bool = False

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        use_LE, tokens_L = use_of(train)
        self.chance_LE_ = chance_of_use(use_LE, tokens_L)
        prior_LE = share_of_use(use_LE)
        self.rows_HLEE_ = np.stack([_rows(train, horizon, prior_LE) for horizon in self.horizons])
        if self.chained:
            step_LEE = _rows(train, 1, prior_LE)
            for rows_LEE, horizon in zip(self.rows_HLEE_, self.horizons, strict=True):
                for layer in range(horizon, len(step_LEE)):
                    chain = step_LEE[layer - horizon + 1 : layer + 1]
                    rows_LEE[layer] = chain[0] if horizon == 1 else np.linalg.multi_dot(list(chain))
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        known_TLK = past.nearest()
        scores_TLE = np.zeros(past.shape, np.float32)
        add_rows(
            known_TLK, self.rows_HLEE_[self.horizons.index(past.horizon)], past.nobody, scores_TLE
        )
        return np.where(is_known(known_TLK, past.nobody)[:, :, None], scores_TLE, self.chance_LE_)


def _rows(train: Part, horizon: int, prior_LE: NDArray[np.float64]) -> NDArray[np.float32]:
    (counts_LEE,) = train.summed(partial(_followed, horizon), f"counting {horizon} ahead")
    return rows_of(counts_LEE, prior_LE)


def _followed(horizon: int, part: Part) -> tuple[NDArray[np.int64]]:
    card = part.card
    counts_LEE = np.zeros((card.n_layers, card.n_experts, card.n_experts), np.int64)
    for past, ids_TLK, counted_T in part.lessons(horizon):
        count_after(past.nearest(), ids_TLK, counted_T, past.nobody, counts_LEE)
    return (counts_LEE,)
