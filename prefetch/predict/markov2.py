"""Layer l - horizon of this token and layer l of the token before, as two experts whose odds multiply.

The product of both conditional shares over the share of use, which each of them contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.predict.tables import add_rows, count_after, is_known, rows_of, share_of_use, use_of

TINY = 1e-9


@dataclass
class Markov2:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = "logit"

    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        prior_LE = share_of_use(use_of(train)[0])
        self.prior_LE_ = np.log(prior_LE + TINY).astype(np.float32)
        before_LEE, *above = train.summed(partial(_followed, self.horizons), "counting pairs")
        self.above_HLEE_ = np.stack([rows_of(counts_LEE, prior_LE) for counts_LEE in above])
        self.before_LEE_ = rows_of(before_LEE, prior_LE)
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        scores_TLE = np.tile(self.prior_LE_, (past.n_tokens, 1, 1))
        above_LEE = self.above_HLEE_[self.horizons.index(past.horizon)]
        for known_TLK, rows_LEE in ((past.here(), above_LEE), (past.before(), self.before_LEE_)):
            told_TLE = np.zeros(past.shape, np.float32)
            add_rows(known_TLK, rows_LEE, past.nobody, told_TLE)
            known_TL1 = is_known(known_TLK, past.nobody)[:, :, None]
            mean_TLE = np.log(told_TLE / past.card.top_k + TINY) - self.prior_LE_
            scores_TLE += np.where(known_TL1, mean_TLE, 0)
        return scores_TLE


def _followed(horizons: tuple[int, ...], part: Part) -> tuple[NDArray[np.int64], ...]:
    """[L, E, E] counts of what came after the token before, then of what came after each horizon's layer."""
    card = part.card
    shape = (card.n_layers, card.n_experts, card.n_experts)
    before_LEE, *above = (np.zeros(shape, np.int64) for _ in range(1 + len(horizons)))
    for h, horizon in enumerate(horizons):
        for past, ids_TLK, counted_T in part.lessons(horizon):
            count_after(past.here(), ids_TLK, counted_T, past.nobody, above[h])
            if h == 0:
                count_after(past.before(), ids_TLK, counted_T, past.nobody, before_LEE)
    return (before_LEE, *above)
