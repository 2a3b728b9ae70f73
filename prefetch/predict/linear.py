"""Ridge regression (scikit-learn) from who was chosen so far to who is chosen: one model per horizon and layer.

It reads who was chosen at some known layers of this token and at the guessed layer by the token before. What is learnt
is the deviation from an expert's average use, so that a layer without anything known is guessed by popularity.
H horizons, N rows, L layers, F features, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.guesses import ranked
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.tables import add_rows, chance_of_use, use_of
from prefetch.trace.routing import no_expert

if TYPE_CHECKING:
    from scipy.sparse import csr_array

EDGE = 0.01  # a regression leaves 0..1: beyond this close to an end it is bent, and keeps its order


@dataclass
class Linear:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = PROBABILITY
    libraries: ClassVar[tuple[str, ...]] = ("scikit-learn", "scipy")

    horizons: tuple[int, ...] = (1,)
    depth: int = 3
    alphas: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)

    def __post_init__(self) -> None:
        self.horizons, self.alphas = horizons_of(self.horizons), tuple(map(float, self.alphas))
        if self.depth < 1:
            raise ConfigError(f"depth: must be at least 1, got {self.depth}")
        if not self.alphas or not min(self.alphas) > 0:
            raise ConfigError(f"alphas: expected numbers above 0, got {list(self.alphas)}")

    def fit(self, train: Part, validation: Part) -> Self:
        from threadpoolctl import threadpool_limits

        self.chance_LE_ = chance_of_use(*use_of(train))
        with threadpool_limits(1):  # the same sums in the same order on every machine
            fits = [self._fit(train, validation, horizon) for horizon in self.horizons]
        self.rows_HLFE_ = np.stack([rows_LFE for rows_LFE, _ in fits])
        self.alpha_HL_ = np.stack([alpha_L for _, alpha_L in fits])
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        rows_LFE = self.rows_HLFE_[self.horizons.index(past.horizon)]
        scores_TLE = np.tile(self.chance_LE_, (past.n_tokens, 1, 1))
        n_experts = past.card.n_experts
        for place, known_TLK in enumerate(_known(past, self.depth)):
            own = slice(place * n_experts, (place + 1) * n_experts)
            add_rows(known_TLK, rows_LFE[:, own], past.nobody, scores_TLE)
        return _within(scores_TLE)

    def _fit(
        self, train: Part, validation: Part, horizon: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """[L, F, E] and the alpha of every layer."""
        told, asked = (_Seen.of(part, horizon, self.depth) for part in (train, validation))
        n_layers, n_experts = self.chance_LE_.shape
        rows_LFE = np.zeros((n_layers, (self.depth + 1) * n_experts, n_experts), np.float32)
        alpha_L = np.zeros(n_layers)
        for layer, chance_E in enumerate(self.chance_LE_):
            if chance_E.any():
                alpha_L[layer], rows_LFE[layer] = self._best(told, asked, layer, chance_E)
        return rows_LFE, alpha_L

    def _best(
        self, told: _Seen, asked: _Seen, layer: int, chance_E: NDArray[np.float32]
    ) -> tuple[float, NDArray[np.float32]]:
        """The alpha that finds most of the experts that the validation tokens used, the larger of equal ones."""
        from sklearn.linear_model import Ridge

        features_NF, ids_NK = told.layer(layer, len(chance_E))
        deviation_NE = _used(ids_NK, len(chance_E)) - chance_E
        asked_NF, asked_NK = asked.layer(layer, len(chance_E))
        best: tuple[int, float, Any] = (-1, 0.0, None)
        for alpha in sorted(self.alphas, reverse=True):
            ridge = Ridge(alpha, fit_intercept=False, solver="cholesky")
            rows_FE = ridge.fit(features_NF, deviation_NE).coef_.reshape(len(chance_E), -1).T
            hits = _hits(asked_NF @ rows_FE + chance_E, asked_NK)
            if hits > best[0]:
                best = hits, alpha, rows_FE
        return best[1], best[2].astype(np.float32)


class _Seen(NamedTuple):
    """What was known, one array after the other, and what came."""

    known: list[NDArray[Any]]  # of [N, L, K]
    ids_NLK: NDArray[Any]

    @classmethod
    def of(cls, part: Part, horizon: int, depth: int) -> _Seen:
        card = part.card
        nobody = np.full((0, card.n_layers, card.top_k), no_expert(card.n_experts))
        rows: list[list[NDArray[Any]]] = [[nobody] for _ in range(depth + 2)]
        for past, ids_TLK, counted_T in part.lessons(horizon):
            for place, array_TLK in enumerate((*_known(past, depth), ids_TLK)):
                rows[place].append(array_TLK[counted_T])
        *known, ids = (np.concatenate(arrays) for arrays in rows)
        return cls(known, ids)

    def layer(self, layer: int, n_experts: int) -> tuple[csr_array, NDArray[Any]]:
        """Features of the tokens that ran it, and their ids."""
        from scipy.sparse import csr_array

        ran_N = (self.ids_NLK[:, layer] < n_experts).any(axis=1)
        known_NCK = np.stack([array[ran_N, layer] for array in self.known], axis=1).astype(np.int32)
        is_one_NC = known_NCK < n_experts
        n_rows, n_places, _ = known_NCK.shape
        column_NCK = known_NCK + n_experts * np.arange(n_places, dtype=np.int32)[:, None]
        first_N = np.concatenate([[0], np.cumsum(is_one_NC.sum(axis=(1, 2)))])
        ones = np.ones(int(first_N[-1]))
        shape = n_rows, n_places * n_experts
        features_NF = csr_array((ones, column_NCK[is_one_NC], first_N), shape=shape)
        return features_NF, self.ids_NLK[ran_N, layer]


def _known(past: Past, depth: int) -> Iterator[NDArray[Any]]:
    for back in range(depth):
        yield past.here(back)
    yield past.before()


def _used(ids_NK: NDArray[Any], n_experts: int) -> NDArray[np.float64]:
    used_NE = np.zeros((len(ids_NK), n_experts + 1))
    np.put_along_axis(used_NE, np.minimum(ids_NK, n_experts).astype(np.int64), 1, axis=1)
    return used_NE[:, :-1]  # "no expert" is beyond the last


def _hits(scores_NE: NDArray[Any], ids_NK: NDArray[Any]) -> int:
    guess_NLK, _ = ranked(scores_NE[:, None], min(ids_NK.shape[1], scores_NE.shape[1]))
    same_NKK = guess_NLK[:, 0, :, None] == ids_NK[:, None, :]
    return int(same_NKK.any(axis=2).sum())


def _within(scores_TLE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Into 0..1 without changing the order: the ends are bent, so that value and slope go on smoothly."""
    low_TLE, high_TLE = np.minimum(scores_TLE, EDGE), np.maximum(scores_TLE, 1 - EDGE)
    bent_TLE = np.where(
        scores_TLE < EDGE, EDGE / (2 - low_TLE / EDGE), 1 - EDGE / (2 - (1 - high_TLE) / EDGE)
    )
    is_plain_TLE = (scores_TLE >= EDGE) & (scores_TLE <= 1 - EDGE)
    return np.where(is_plain_TLE, scores_TLE, bent_TLE).astype(np.float32)
