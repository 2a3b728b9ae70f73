"""What the word itself tells: the use of experts by the training tokens with the same token id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import PROBABILITY, horizons_of
from prefetch.predict.tables import chance_of_use, use_of
from prefetch.trace.routing import NO_TOKEN

SMOOTHING = 1.0  # tokens of average use that every word starts with


@dataclass
class TokenTable:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "token ids"
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    most_words: int = 8192  # the most frequent ones; the others are guessed by popularity

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if self.most_words < 1:
            raise ConfigError(f"most_words: must be at least 1, got {self.most_words}")

    def fit(self, train: Part, validation: Part) -> Self:
        seen: dict[int, int] = {}
        for found in train.counted(_words, "counting words"):
            for word, count in found.items():
                seen[word] = seen.get(word, 0) + count
        if not seen.keys() - {NO_TOKEN}:
            raise MissingData("needs token ids, which this trace has not recorded")
        seen.pop(NO_TOKEN, None)
        often = sorted(seen, key=lambda word: (-seen[word], word))[: self.most_words]
        self.words_V_ = np.sort(np.array(often, np.int64))
        self.chance_LE_ = chance_of_use(*use_of(train))
        use_VLE, tokens_V = train.summed(partial(_use_by_word, self.words_V_), "counting by word")
        prior_LE = SMOOTHING * self.chance_LE_
        self.chance_VLE_ = (use_VLE.astype(np.float32) + prior_LE) / (
            tokens_V[:, None, None] + SMOOTHING
        )
        self.chance_VLE_ = self.chance_VLE_.astype(np.float32)
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        place_T = _places(self.words_V_, past)
        known_T = place_T >= 0
        scores_TLE = np.tile(self.chance_LE_, (past.n_tokens, 1, 1))
        scores_TLE[known_T] = self.chance_VLE_[place_T[known_T]]
        return scores_TLE


def _places(words_V: NDArray[np.int64], past: Past) -> NDArray[np.int64]:
    """Where a token's word stands in the table; -1 = nowhere."""
    place_T = np.searchsorted(words_V, past.token_T)
    place_T = np.minimum(place_T, len(words_V) - 1)
    return np.where(words_V[place_T] == past.token_T, place_T, -1)


def _words(part: Part) -> dict[int, int]:
    """How often each was met."""
    seen: dict[int, int] = {}
    for past, _, counted_T in part.lessons(1):
        words, counts = np.unique(past.token_T[counted_T], return_counts=True)
        for word, count in zip(words.tolist(), counts.tolist(), strict=True):
            seen[word] = seen.get(word, 0) + count
    return seen


def _use_by_word(
    words_V: NDArray[np.int64], part: Part
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[V, L, E] choices, and [V] tokens."""
    card = part.card
    use_VLE = np.zeros((len(words_V), card.n_layers, card.n_experts), np.int32)
    tokens_V = np.zeros(len(words_V), np.int64)
    for past, ids_TLK, counted_T in part.lessons(1):
        _count(ids_TLK, _places(words_V, past), counted_T, past.nobody, use_VLE, tokens_V)
    return use_VLE, tokens_V


@njit(cache=True, nogil=True)
def _count(ids_TLK, place_T, counted_T, nobody, use_VLE, tokens_V):  # type: ignore[no-untyped-def]
    for t in range(ids_TLK.shape[0]):
        word = place_T[t]
        if word < 0 or not counted_T[t]:
            continue
        tokens_V[word] += 1
        for layer in range(ids_TLK.shape[1]):
            for k in range(ids_TLK.shape[2]):
                if ids_TLK[t, layer, k] != nobody:
                    use_VLE[word, layer, ids_TLK[t, layer, k]] += 1
