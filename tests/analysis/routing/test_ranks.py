"""Places of what was chosen are those in lists written out, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.routing.pairs import SKIP
from analysis.routing.ranks import _mix, rank_drawn, rank_known, rank_markov

E, T, R, NOBODY = 12, 60, 7, 255
GOLDEN, ALL_BITS = 0x9E3779B97F4A7C15, 2**64 - 1


def drawn_rows(seed: int, top_k: int, nobody: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    ids_TK = np.argsort(rng.random((T, E)), axis=1)[:, :top_k].astype(np.uint8)
    ids_TK[rng.random(ids_TK.shape) < nobody] = NOBODY
    return ids_TK


def rows_told(seed: int) -> tuple[Any, Any]:
    """Class and request of every row; a class is a place in four, or says that the row does not count."""
    rng = np.random.default_rng(seed)
    class_T = rng.choice(np.array([0, 1, 2, 3, 4, SKIP], np.uint8), T)
    return class_T, np.sort(rng.integers(0, R, T))


def chances(seed: int) -> Any:
    """Of few different values, so that many are equal; their sums are exact."""
    return np.random.default_rng(seed).integers(0, 4, (E, E)).astype(np.float32) / 4


@pytest.mark.parametrize("top_k", [1, 3])
def test_popularity_and_the_previous_token(top_k: int) -> None:
    rng = np.random.default_rng(1)
    there_TK, (class_T, number_T) = drawn_rows(2, top_k), rows_told(3)
    follows_T, popular = rng.random(T) < 0.7, rng.permutation(E).tolist()
    follows_T[0] = False
    expected = np.zeros((2, 4, E), int), np.zeros((4, R), int)
    for t in np.flatnonzero(class_T < 4):
        before = [e for e in there_TK[t - 1].tolist() if e != NOBODY] if follows_T[t] else []
        guesses = popular, before + [e for e in popular if e not in before]
        for b in [e for e in there_TK[t].tolist() if e != NOBODY]:
            expected[1][3, number_T[t]] += 1
            for p in (0, 1):
                place = guesses[p].index(b)
                expected[0][p, class_T[t], place] += 1
                expected[1][p, number_T[t]] += place < top_k
    found = tuple(np.zeros_like(one) for one in expected)
    rank_E = np.argsort(popular)
    rank_known(there_TK, follows_T, rank_E, class_T, number_T, NOBODY, *found)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def places(here_K: Any, chance_EE: Any) -> list[int]:
    """All experts, the one with the largest sum of chances first, of equal ones the lower."""
    score_E = sum(chance_EE[a] for a in here_K.tolist() if a != NOBODY)
    return sorted(range(E), key=lambda b: (-score_E[b], b))


@pytest.mark.parametrize(("top_k", "nobody"), [(3, 0.3), (7, 0.0), (8, 0.0), (8, 0.1), (9, 0.0)])
def test_chances_of_all_that_was_chosen_are_added(top_k: int, nobody: float) -> None:
    here_TK, there_TK = drawn_rows(4, top_k, nobody), drawn_rows(5, top_k)
    here_TK[::9] = NOBODY  # nobody to go by
    (class_T, number_T), chance_EE = rows_told(6), chances(7)
    ranks_CE, hits_R = np.zeros((4, E), int), np.zeros(R, int)
    for t in np.flatnonzero((class_T < 4) & (here_TK != NOBODY).any(axis=1)):
        guesses = places(here_TK[t], chance_EE)
        for b in [e for e in there_TK[t].tolist() if e != NOBODY]:
            ranks_CE[class_T[t], guesses.index(b)] += 1
            hits_R[number_T[t]] += guesses.index(b) < top_k
    found = np.zeros_like(ranks_CE), np.zeros_like(hits_R)
    rank_markov(here_TK, there_TK, chance_EE, class_T, number_T, NOBODY, *found)
    np.testing.assert_array_equal(found[0], ranks_CE)
    np.testing.assert_array_equal(found[1], hits_R)


def bits(x: int) -> int:
    with np.errstate(over="ignore"):
        return int(_mix(np.uint64(x & ALL_BITS)))


def test_bits_are_those_of_splitmix64() -> None:
    """Its first numbers from 1234567, as Vigna's C code gives them."""
    told = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [bits(1234567 + n * GOLDEN) for n in (1, 2, 3, 4)] == told


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 3.5])
def test_experts_are_drawn_from_the_cdf_by_the_row_alone(share: float) -> None:
    here_TK, there_TK, chance_EE = drawn_rows(8, 3), drawn_rows(9, 3), chances(10)
    here_TK[::9] = NOBODY
    rng, (class_T, _) = np.random.default_rng(11), rows_told(12)
    row_T, seed = rng.permutation(10**6)[:T], 2**63 + 12345
    share_E = rng.random(E) * (rng.random(E) < 0.8)
    cdf_E = np.cumsum(share_E) / share_E.sum()
    ranks_CE = np.zeros((4, E), int)
    for t in np.flatnonzero((class_T < 4) & (here_TK != NOBODY).any(axis=1)):
        state = bits(seed ^ (int(row_T[t]) * GOLDEN & ALL_BITS))
        if (state >> 11) / 2**53 >= share:
            continue
        for _ in range(max(1, int(share)) * (there_TK[t] != NOBODY).sum()):
            state = bits(state + GOLDEN)
            drawn = int(np.searchsorted(cdf_E, (state >> 11) / 2**53, side="right"))
            ranks_CE[class_T[t], places(here_TK[t], chance_EE).index(drawn)] += 1
    guide, found = np.searchsorted(cdf_E, np.arange(8) / 8, side="right"), np.zeros_like(ranks_CE)
    for rows in (slice(0, 25), slice(25, T)):
        given = here_TK[rows], there_TK[rows], chance_EE, cdf_E, guide, row_T[rows]
        with np.errstate(over="ignore"):
            rank_drawn(*given, np.uint64(seed), share, class_T[rows], NOBODY, found)
    np.testing.assert_array_equal(found, ranks_CE)
