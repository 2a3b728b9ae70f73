"""Counts of who was used after whom, and scores that are sums of their rows. It knows no predictor.

T tokens, L layers, K choices, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import MissingData
from prefetch.predict.part import Part

SMOOTHING = 0.5  # how many uses of the prior every row starts with


def use_of(part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[L, E] choices of every expert, and [L] tokens that the layer ran for."""
    use_LE, tokens_L = part.summed(_use_of, "counting use")
    if not use_LE.any():
        raise MissingData("no training request has a row: there is nothing to learn from")
    return use_LE, tokens_L


def _use_of(part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    card = part.card
    use_LE = np.zeros((card.n_layers, card.n_experts), np.int64)
    tokens_L = np.zeros(card.n_layers, np.int64)
    for lesson in part.lessons(1):
        count_use(lesson.ids_TLK, lesson.counted_T, lesson.past.nobody, use_LE, tokens_L)
    return use_LE, tokens_L


def chance_of_use(use_LE: NDArray[np.int64], tokens_L: NDArray[np.int64]) -> NDArray[np.float32]:
    """[L, E]: the share of tokens that use an expert."""
    return (use_LE / np.maximum(tokens_L, 1)[:, None]).astype(np.float32)


def share_of_use(use_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L, E], summing to 1 over experts; even where a layer never ran."""
    total_L = use_LE.sum(axis=1, keepdims=True)
    return np.where(total_L > 0, use_LE / np.maximum(total_L, 1), 1 / use_LE.shape[1])


def rows_of(counts_LEE: NDArray[np.int64], prior_LE: NDArray[np.float64]) -> NDArray[np.float32]:
    """[L, i, j]: the share of j among what followed i, from the prior where i was rarely seen."""
    total_LE1 = counts_LEE.sum(axis=2, keepdims=True)
    rows_LEE = (counts_LEE + SMOOTHING * prior_LE[:, None, :]) / (total_LE1 + SMOOTHING)
    return rows_LEE.astype(np.float32)


@njit(cache=True, nogil=True)
def count_use(ids_TLK, counted_T, nobody, use_LE, tokens_L):  # type: ignore[no-untyped-def]
    for t in range(ids_TLK.shape[0]):
        if not counted_T[t]:
            continue
        for layer in range(ids_TLK.shape[1]):
            ran = False
            for k in range(ids_TLK.shape[2]):
                if ids_TLK[t, layer, k] != nobody:
                    use_LE[layer, ids_TLK[t, layer, k]] += 1
                    ran = True
            tokens_L[layer] += ran


@njit(cache=True, nogil=True)
def count_after(known_TLK, ids_TLK, counted_T, nobody, counts_LEE):  # type: ignore[no-untyped-def]
    """counts[l, i, j]: how often j was chosen at layer l where i was known."""
    for t in range(ids_TLK.shape[0]):
        if not counted_T[t]:
            continue
        for layer in range(ids_TLK.shape[1]):
            for a in range(known_TLK.shape[2]):
                i = known_TLK[t, layer, a]
                if i == nobody:
                    continue
                for b in range(ids_TLK.shape[2]):
                    j = ids_TLK[t, layer, b]
                    if j != nobody:
                        counts_LEE[layer, i, j] += 1


@njit(cache=True, nogil=True)
def add_rows(known_TLK, rows_LEE, nobody, scores_TLE):  # type: ignore[no-untyped-def]
    """Adds the rows of the known experts; where none is known nothing is added."""
    for t in range(known_TLK.shape[0]):
        for layer in range(known_TLK.shape[1]):
            for a in range(known_TLK.shape[2]):
                i = known_TLK[t, layer, a]
                if i != nobody:
                    for j in range(rows_LEE.shape[2]):
                        scores_TLE[t, layer, j] += rows_LEE[layer, i, j]


def is_known(known_TLK: NDArray[Any], nobody: int) -> NDArray[np.bool_]:
    """[T, L]: is anything known there?"""
    return np.asarray((known_TLK != nobody).any(axis=2))
