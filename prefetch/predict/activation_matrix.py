"""MoE-Infinity's expert activation matrices (arXiv 2401.14361): the training request that was most like this one.

A matrix counts how often a request chose every expert of every layer. The running request has one too: its earlier
tokens in all rows, this token in the rows of its known layers. Similarity is the cosine of two rows, averaged over the
layers; the row of the most similar matrix, less the farther ahead it is, is the guess.

`variant: paper` compares every row. `variant: code` compares as the published code does (`find_most_similar`, read at
d617801): the rows of this token's known layers are overwritten in the collection, and with them equal for all matrices,
so that only the rows still to come decide, which hold earlier tokens alone. Where nothing can be compared (a first
token) the code takes the first matrix; the paper's variant takes the average of the training requests.

Of the collection's upkeep nothing is left: the code fills free slots and then replaces the least used one while it
serves, here it is fixed once. Empty slots, which the code divides by zero and then picks, do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.predict.tables import share_of_use, use_of

VARIANTS = ("paper", "code")
TINY = 1e-8  # the code's, added to every entry of the matrix that it takes
TIE = 1e-9  # as similar: sums in another order must not choose another matrix


@dataclass
class ActivationMatrix:
    """`capacity` matrices: of all training requests, or of as many that lie evenly spaced in their order."""

    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "routing history"
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)
    variant: str = "paper"
    capacity: int = 120

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant: expected one of {VARIANTS}, got {self.variant!r}")
        if self.capacity < 1:
            raise ConfigError(f"capacity: must be at least 1, got {self.capacity}")

    def fit(self, train: Part, validation: Part) -> Self:
        self.share_LE_ = share_of_use(use_of(train)[0]).astype(np.float32)
        chosen_N = _evenly(_requests_with_rows(train), self.capacity)
        self.counts_NLE_ = np.zeros((len(chosen_N), *self.share_LE_.shape), np.int32)
        for past, ids_TLK, counted_T in train.lessons(1):
            place_T = np.searchsorted(chosen_N, past.request_T)
            place_T = np.minimum(place_T, len(chosen_N) - 1)
            is_chosen_T = counted_T & (chosen_N[place_T] == past.request_T)
            slot_T = np.where(is_chosen_T, place_T, -1)
            _count(ids_TLK, slot_T, past.nobody, self.counts_NLE_)
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        unit_LEN, shares_NLE = self.compared()
        best_TL = np.full(past.shape[:2], -1, np.int64)
        _match(
            past.here(), past.before(), past.first_T, past.horizon, past.nobody,
            unit_LEN, self.variant == "paper", best_TL,
        )  # fmt: skip
        if self.variant == "code":
            best_TL = np.maximum(best_TL, 0)
        matched_TLE = shares_NLE[best_TL, np.arange(past.card.n_layers)]
        return matched_TLE * self.decay(past.horizon)[:, None]

    def compared(self) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """[L, E, N] what a request is compared with, and [N + 1, L, E] what is guessed then; at -1 the average."""
        shares_NLE = np.concatenate([self._shares(), self.share_LE_[None]])
        return _unit_rows(self.counts_NLE_), shares_NLE + np.float32(TINY)

    def decay(self, horizon: int) -> NDArray[np.float32]:
        """[L]: the farther ahead, the less."""
        n_layers = len(self.share_LE_)
        ahead_L = np.minimum(horizon, np.arange(n_layers) + 1)
        return (1 - ahead_L / (n_layers + 1)).astype(np.float32)

    def _shares(self) -> NDArray[np.float32]:
        """Of every matrix, so that long requests weigh like short ones; the average where a layer never ran."""
        total_NL1 = self.counts_NLE_.sum(axis=2, keepdims=True)
        shares_NLE = self.counts_NLE_ / np.maximum(total_NL1, 1)
        return np.where(total_NL1 > 0, shares_NLE, self.share_LE_).astype(np.float32)


def _requests_with_rows(train: Part) -> NDArray[np.int64]:
    """In ascending order; one without a row that counts would be an empty slot."""
    found = [
        np.unique(past.request_T[counted_T & (ids_TLK != past.nobody).any(axis=(1, 2))])
        for past, ids_TLK, counted_T in train.lessons(1)
    ]
    return np.unique(np.concatenate(found)).astype(np.int64)


def _evenly(requests: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    n = min(capacity, len(requests))
    return requests[np.arange(n) * len(requests) // n]


def _unit_rows(counts_NLE: NDArray[np.int32]) -> NDArray[np.float64]:
    """[L, E, N]: rows of length 1, or 0 where a layer never ran; N last, because a choice meets all matrices."""
    counts_LEN = np.ascontiguousarray(counts_NLE.transpose(1, 2, 0), np.float64)
    length_L1N = np.sqrt((counts_LEN**2).sum(axis=1, keepdims=True))
    return counts_LEN / np.maximum(length_L1N, 1)


@njit(cache=True, nogil=True)
def _count(ids_TLK, slot_T, nobody, counts_NLE):  # type: ignore[no-untyped-def]
    for t in range(ids_TLK.shape[0]):
        if slot_T[t] < 0:
            continue
        for layer in range(ids_TLK.shape[1]):
            for k in range(ids_TLK.shape[2]):
                if ids_TLK[t, layer, k] != nobody:
                    counts_NLE[slot_T[t], layer, ids_TLK[t, layer, k]] += 1


@njit(cache=True, nogil=True)
def _match(here_TLK, before_TLK, first_T, horizon, nobody, unit_LEN, is_paper, best_TL):  # type: ignore[no-untyped-def]
    """best[t, l]: the number of the most similar matrix, the first of several; -1 = no row can be compared.

    Cosines are kept per layer and change with that layer's choices only. A token's last `horizon` layers are learnt of
    when the next token begins.
    """
    n_layers, n_experts, n_slots = unit_LEN.shape
    counts_LE, dot_LN = np.zeros((n_layers, n_experts)), np.zeros((n_layers, n_slots))
    cosine_LN, later_LN = np.zeros((n_layers, n_slots)), np.zeros((n_layers + 1, n_slots))
    for t in range(here_TLK.shape[0]):
        if first_T[t] == t:
            counts_LE[:], dot_LN[:], cosine_LN[:] = 0, 0, 0
        else:
            for layer in range(max(0, n_layers - horizon), n_layers):
                _observe(before_TLK[t, layer], nobody, unit_LEN[layer], counts_LE[layer], dot_LN[layer],
                         cosine_LN[layer])  # fmt: skip
        for layer in range(n_layers - 1, -1, -1):
            later_LN[layer] = later_LN[layer + 1] + cosine_LN[layer]
        earlier_N = np.zeros(n_slots)
        best_TL[t, :horizon] = _best(later_LN[0])  # all that was known when the token began
        for layer in range(horizon, n_layers):
            known = layer - horizon
            _observe(here_TLK[t, layer], nobody, unit_LEN[known], counts_LE[known], dot_LN[known],
                     cosine_LN[known])  # fmt: skip
            if is_paper:
                earlier_N += cosine_LN[known]
            best_TL[t, layer] = _best(earlier_N + later_LN[known + 1])


@njit(cache=True, nogil=True)
def _observe(ids_K, nobody, unit_EN, counts_E, dot_N, cosine_N):  # type: ignore[no-untyped-def]
    for expert in ids_K:
        if expert != nobody:
            counts_E[expert] += 1
            dot_N += unit_EN[expert]
    length = np.sqrt((counts_E**2).sum())
    if length > 0:
        cosine_N[:] = dot_N / length


@njit(cache=True, nogil=True)
def _best(similarity_N):  # type: ignore[no-untyped-def]
    best, most = -1, 0.0
    for n in range(len(similarity_N)):
        if similarity_N[n] > most + TIE:
            best, most = n, similarity_N[n]
    return best
