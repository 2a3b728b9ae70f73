"""FineMoE's expert maps (arXiv 2502.05370): the stored tokens that went the same way so far tell the next layers.

A token's map holds what every layer chose and how much. The map of the running token, up to its last known layer, is
compared with the same layers of every stored one (cosine of all rows as one vector); the row of the nearest map at the
guessed layer is the guess.

What differs from the publication, for want of recordings: its maps are whole gate distributions, here they are the
chosen experts only, with their weights (`weighted`) or alike, and behind them stand the most used ones; before a layer
is known it compares embeddings of tokens, here a stored token is compared by the map of the token before it; its store
replaces what is most redundant while it serves, here it is drawn once from the training tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of, parameter_bytes
from prefetch.predict.tables import share_of_use, use_of

TAIL = (
    1e-4  # of the share of use, added to every score: the order of experts that no nearest map has
)
TIE = 1e-9  # as similar: sums in another order must not choose another token
ITSELF, BEFORE = 0, 1  # the two maps of a stored token


@dataclass
class Trajectory:
    score: ClassVar[str] = "similarity"

    horizons: tuple[int, ...] = (1,)
    store: int = 1000
    nearest: int = 1
    weighted: bool = False
    seed: int = 0
    needs: tuple[str, ...] = field(default=(), init=False)
    sees: str = field(default="routing history", init=False)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        for name, least in (("store", 1), ("nearest", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.weighted:
            self.needs, self.sees = ("weights",), "routing history + weights"

    def fit(self, train: Part, validation: Part) -> Self:
        self.share_LE_ = share_of_use(use_of(train)[0]).astype(np.float32)
        n_rows = sum(int(counted_T.sum()) for _, counted_T in train.blocks())
        rng = np.random.default_rng(self.seed)
        drawn_N = rng.choice(n_rows, min(self.store, n_rows), replace=False)
        n_passed, ids, weights = 0, list[Any](), list[Any]()
        for block, counted_T in train.blocks(*self.needs):
            past = Past(block, 1)
            is_drawn_T = counted_T & np.isin(n_passed + np.cumsum(counted_T) - 1, drawn_N)
            n_passed += int(counted_T.sum())
            own_TLK = self._weights(past, block.ids_TLK, block.weights_TLK)
            ids.append(np.stack([block.ids_TLK, past.before()])[:, is_drawn_T])
            weights.append(np.stack([own_TLK, self._before(past)])[:, is_drawn_T])
        self.ids_2NLK_ = np.concatenate(ids, axis=1)
        self.weights_2NLK_ = np.concatenate(weights, axis=1)
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        shape_TLM = (*past.shape[:2], min(self.nearest, self.ids_2NLK_.shape[1]))
        which_TLM, similarity_TLM = np.full(shape_TLM, -1, np.int64), np.zeros(shape_TLM)
        maps_LEN, before_LEN = (self._maps(which, past.nobody) for which in (ITSELF, BEFORE))
        recorded = past.here_weights() if self.weighted else None
        _match(
            past.here(), self._weights(past, past.here(), recorded),
            past.before(), self._before(past), past.horizon, past.nobody,
            maps_LEN, _lengths(maps_LEN), before_LEN, _lengths(before_LEN)[-1], which_TLM, similarity_TLM,
        )  # fmt: skip
        scores_TLE = np.tile(np.float32(TAIL) * self.share_LE_, (past.n_tokens, 1, 1))
        _add_rows(
            self.ids_2NLK_[ITSELF], self.weights_2NLK_[ITSELF], past.nobody,
            which_TLM, similarity_TLM, scores_TLE,
        )  # fmt: skip
        return scores_TLE

    def resident_bytes(self) -> int:
        """Beside what was learnt, the two maps of every stored token, and how long they are."""
        (n_layers, n_experts), n_stored = self.share_LE_.shape, self.ids_2NLK_.shape[1]
        of_a_map = n_layers * (n_experts * np.float32().nbytes + np.float64().nbytes)
        return parameter_bytes(self) + 2 * n_stored * of_a_map

    def _before(self, past: Past) -> NDArray[np.float32]:
        recorded = past.before_weights() if self.weighted else None
        return self._weights(past, past.before(), recorded)

    def _weights(
        self, past: Past, ids_TLK: NDArray[Any], recorded_TLK: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """As recorded, or all alike; 0 where nobody was chosen."""
        if not self.weighted or recorded_TLK is None:
            recorded_TLK = np.full(ids_TLK.shape, 1 / past.card.top_k)
        weights_TLK = np.nan_to_num(recorded_TLK.astype(np.float32))
        return np.where(ids_TLK == past.nobody, np.float32(0), weights_TLK)

    def _maps(self, which: int, nobody: int) -> NDArray[np.float32]:
        """[L, E, N]: N last, because a choice meets all stored tokens."""
        ids_NLK, weights_NLK = self.ids_2NLK_[which], self.weights_2NLK_[which]
        maps_LEN = np.zeros((*self.share_LE_.shape, len(ids_NLK)), np.float32)
        n, layer, k = np.nonzero(ids_NLK != nobody)
        maps_LEN[layer, ids_NLK[n, layer, k], n] = weights_NLK[n, layer, k]
        return maps_LEN


def _lengths(maps_LEN: NDArray[np.float32]) -> NDArray[np.float64]:
    """[L, N]: of the maps up to and with every layer."""
    squares_LN = np.einsum("len,len->ln", maps_LEN, maps_LEN, dtype=np.float64)
    return np.sqrt(np.cumsum(squares_LN, axis=0))


@njit(cache=True, nogil=True)
def _match(  # type: ignore[no-untyped-def]
    here_TLK, here_weights_TLK, before_TLK, before_weights_TLK, horizon, nobody,
    maps_LEN, length_LN, before_maps_LEN, before_length_N, which_TLM, similarity_TLM,
):  # fmt: skip
    """The nearest stored tokens of every guess, the first of several; -1 = none has anything in common."""
    n_layers, _, n_stored = maps_LEN.shape
    dot_N = np.zeros(n_stored)
    for t in range(here_TLK.shape[0]):
        dot_N[:], square = 0, 0.0
        for layer in range(n_layers):
            square += _add(
                before_TLK[t, layer],
                before_weights_TLK[t, layer],
                nobody,
                before_maps_LEN[layer],
                dot_N,
            )
        _nearest(dot_N, square, before_length_N, which_TLM[t, 0], similarity_TLM[t, 0])
        which_TLM[t, 1:horizon], similarity_TLM[t, 1:horizon] = (
            which_TLM[t, 0],
            similarity_TLM[t, 0],
        )
        dot_N[:], square = 0, 0.0
        for layer in range(horizon, n_layers):
            known = layer - horizon
            square += _add(
                here_TLK[t, layer], here_weights_TLK[t, layer], nobody, maps_LEN[known], dot_N
            )
            _nearest(dot_N, square, length_LN[known], which_TLM[t, layer], similarity_TLM[t, layer])


@njit(cache=True, nogil=True)
def _add(ids_K, weights_K, nobody, map_EN, dot_N):  # type: ignore[no-untyped-def]
    """One layer more of the running token's map: its products with all stored ones; returns its square."""
    square = 0.0
    for k in range(len(ids_K)):
        if ids_K[k] != nobody:
            dot_N += np.float64(weights_K[k]) * map_EN[ids_K[k]]
            square += np.float64(weights_K[k]) ** 2
    return square


@njit(cache=True, nogil=True)
def _nearest(dot_N, square, length_N, which_M, similarity_M):  # type: ignore[no-untyped-def]
    found, most = 0, len(which_M)
    for n in range(len(dot_N)):
        if dot_N[n] <= 0:
            continue
        similarity = dot_N[n] / (np.sqrt(square) * length_N[n])
        if found == most and similarity <= similarity_M[most - 1] + TIE:
            continue
        place = found if found < most else most - 1
        while place > 0 and similarity > similarity_M[place - 1] + TIE:
            which_M[place], similarity_M[place] = which_M[place - 1], similarity_M[place - 1]
            place -= 1
        which_M[place], similarity_M[place] = n, similarity
        found = min(found + 1, most)


@njit(cache=True, nogil=True)
def _add_rows(ids_NLK, weights_NLK, nobody, which_TLM, similarity_TLM, scores_TLE):  # type: ignore[no-untyped-def]
    """The average of the nearest maps' rows, the more similar weighing more."""
    for t in range(which_TLM.shape[0]):
        for layer in range(which_TLM.shape[1]):
            total = similarity_TLM[t, layer].sum()
            for m in range(which_TLM.shape[2]):
                n = which_TLM[t, layer, m]
                if n < 0:
                    break
                for k in range(ids_NLK.shape[2]):
                    if ids_NLK[n, layer, k] != nobody:
                        share = similarity_TLM[t, layer, m] / total
                        scores_TLE[t, layer, ids_NLK[n, layer, k]] += (
                            share * weights_NLK[n, layer, k]
                        )
