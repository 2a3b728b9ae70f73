"""Which expert goes with which: joint counts, what they tell in bits, and the same under independence.

It knows no token order: whoever counts says what stands here and what there.
T tokens, K choices, E experts, C row classes, L layers, M moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.special import digamma

from analysis.routing.significance import FEWEST_REQUESTS, design_effects
from analysis.routing.statistics import entropy_bits
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard

MOST_BYTES = 2 << 30  # dense tables of pair counts; more experts than that fit need fewer horizons
SKIP = 255  # class of a row that is not counted
DENSE = 0.1  # pairs of a request per cell of the table, from which on the whole table is walked
SMALL_COUNT = 1 << 14  # from here on the asymptotic form is exact to 1e-8


def check_bytes(n_bytes: int, card: ModelCard) -> None:
    if n_bytes > MOST_BYTES:
        raise MissingData(
            f"pair counts of {card.n_experts} experts in {card.n_layers} layers would take {n_bytes / 1e9:.1f} GB, "
            f"more than {MOST_BYTES / 1e9:.1f}; fewer analyze.horizons need less"
        )


@njit(cache=True, nogil=True)
def count_pairs(here_TK, there_TK, class_T, nobody, out_CEE):  # type: ignore[no-untyped-def]
    """Adds one to out[class, a, b] for every a here and every b there, row by row."""
    for t in range(here_TK.shape[0]):
        c = class_T[t]
        if c >= out_CEE.shape[0]:
            continue
        for i in range(here_TK.shape[1]):
            a = here_TK[t, i]
            if a == nobody:
                continue
            row_E = out_CEE[c, a]
            for j in range(there_TK.shape[1]):
                b = there_TK[t, j]
                if b != nobody:
                    row_E[b] += 1


@njit(cache=True, nogil=True)
def count_margins(here_TK, there_TK, class_T, nobody, here_CE, there_CE, tokens_C):  # type: ignore[no-untyped-def]
    """Over the rows that have an expert on both sides."""
    for t in range(here_TK.shape[0]):
        c = class_T[t]
        if c >= tokens_C.shape[0] or not has_both(here_TK[t], there_TK[t], nobody):
            continue
        tokens_C[c] += 1
        for k in range(here_TK.shape[1]):
            if here_TK[t, k] != nobody:
                here_CE[c, here_TK[t, k]] += 1
            if there_TK[t, k] != nobody:
                there_CE[c, there_TK[t, k]] += 1


@njit(cache=True, nogil=True)
def has_both(here_K, there_K, nobody):  # type: ignore[no-untyped-def]
    has_here, has_there = False, False
    for k in range(here_K.shape[0]):
        has_here |= here_K[k] != nobody
        has_there |= there_K[k] != nobody
    return has_here and has_there


class Spread:
    """How pair counts spread over requests: sums over requests of products of their counts, in integers.

    Of a request's T tokens that had an expert on both sides, n chose a here and b there, a chose a here, b b there.
    Where both sides are the same, what stands at a >= b says nothing.
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.pair_LMEE = np.zeros((n_layers, 5, n_experts, n_experts), np.int64)  # nn na nb nT ab
        self.margin_LME = np.zeros((n_layers, 4, n_experts), np.int64)  # aa aT bb bT
        self.total_LM = np.zeros((n_layers, 2), np.int64)  # requests, TT

    @staticmethod
    def n_bytes(n_layers: int, n_experts: int) -> int:
        return 5 * 8 * n_layers * n_experts**2

    def add(
        self, layer: int, here_TK: Any, there_TK: Any, starts_R: Any, class_T: Any, nobody: int
    ) -> None:
        """The rows of whole requests; those of class `SKIP` do not count."""
        edges = np.append(starts_R, len(here_TK))
        sums = self.pair_LMEE[layer], self.margin_LME[layer], self.total_LM[layer]
        is_same = here_TK is there_TK
        _square_requests(here_TK, there_TK, edges, class_T, nobody, is_same, *sums)

    def merge(self, later: Spread) -> None:
        for name in ("pair_LMEE", "margin_LME", "total_LM"):
            getattr(self, name).__iadd__(getattr(later, name))

    @property
    def requests_L(self) -> NDArray[np.int64]:
        requests_L: NDArray[np.int64] = self.total_LM[:, 0]
        return requests_L

    def effects(
        self, layer: int, count_EE: Any, here_E: Any, there_E: Any, expected_EE: Any, tokens: int
    ) -> NDArray[np.float64]:
        """[E, E] design effects of one layer; NaN where there are too few requests to tell."""
        if self.requests_L[layer] < FEWEST_REQUESTS:
            return np.full(expected_EE.shape, np.nan)
        moments = self.pair_LMEE[layer], self.margin_LME[layer], self.total_LM[layer]
        return design_effects((count_EE, here_E, there_E, expected_EE, tokens), *moments)


@njit(cache=True, nogil=True)
def _square_requests(  # type: ignore[no-untyped-def]
    here_TK, there_TK, edges, class_T, nobody, is_same, pair_MEE, margin_ME, total_M
):
    n_requests, n_experts = len(edges) - 1, pair_MEE.shape[1]
    pairs_CEE = np.zeros((1, n_experts, n_experts), np.int32)
    for r in range(n_requests):
        one, two = here_TK[edges[r] : edges[r + 1]], there_TK[edges[r] : edges[r + 1]]
        zero_T = np.where(class_T[edges[r] : edges[r + 1]] == SKIP, SKIP, 0)
        if zero_T.all():
            continue
        here_CE = np.zeros((1, n_experts), np.int64)
        there_CE, tokens_C = np.zeros_like(here_CE), np.zeros(1, np.int64)
        count_margins(one, two, zero_T, nobody, here_CE, there_CE, tokens_C)
        count_pairs(one, two, zero_T, nobody, pairs_CEE)
        total_M[0] += tokens_C[0] > 0
        total_M[1] += tokens_C[0] ** 2
        _square_margins(here_CE[0], there_CE[0], tokens_C[0], margin_ME, is_same, pair_MEE[4])
        of = here_CE[0], there_CE[0], tokens_C[0]
        if len(one) * one.shape[1] ** 2 > DENSE * pairs_CEE[0].size:
            _settle_all(*of, is_same, pairs_CEE[0], pair_MEE)
            continue
        for t in range(len(one)):
            if zero_T[t] == 0:
                _settle(one[t], two[t], *of, nobody, pairs_CEE[0], pair_MEE)


@njit(cache=True, nogil=True)
def _square_margins(here_E, there_E, tokens, margin_ME, is_same, both_EE):  # type: ignore[no-untyped-def]
    margin_ME[0] += here_E**2
    margin_ME[1] += here_E * tokens
    margin_ME[2] += there_E**2
    margin_ME[3] += there_E * tokens
    for a in range(len(here_E)):
        if here_E[a]:
            first, here = a + 1 if is_same else 0, here_E[a]
            both_B, there_B = both_EE[a, first:], there_E[first:]
            for b in range(len(both_B)):
                both_B[b] += here * there_B[b]


@njit(cache=True, nogil=True)
def _settle_all(here_E, there_E, tokens, is_same, pairs_EE, pair_MEE):  # type: ignore[no-untyped-def]
    """The same as `_settle` for every cell of the table, in its order: faster where a request met many of them.

    Rows as arrays of their own, so that the loop becomes vector instructions: half the time.
    """
    for a in range(len(here_E)):
        if here_E[a] == 0:
            continue
        first, here = a + 1 if is_same else 0, here_E[a]
        n_B, there_B = pairs_EE[a, first:], there_E[first:]
        nn_B, na_B = pair_MEE[0, a, first:], pair_MEE[1, a, first:]
        nb_B, nt_B = pair_MEE[2, a, first:], pair_MEE[3, a, first:]
        for b in range(len(n_B)):
            n = np.int64(n_B[b])
            nn_B[b] += n * n
            na_B[b] += n * here
            nb_B[b] += n * there_B[b]
            nt_B[b] += n * tokens
        pairs_EE[a] = 0


@njit(cache=True, nogil=True)
def _settle(here_K, there_K, here_E, there_E, tokens, nobody, pairs_EE, pair_MEE):  # type: ignore[no-untyped-def]
    """Adds the products of every pair of the row once, where the request meets it first, and clears its count."""
    for a in here_K:
        for b in there_K:
            if a == nobody or b == nobody or pairs_EE[a, b] == 0:
                continue
            n = np.int64(pairs_EE[a, b])
            pairs_EE[a, b] = 0
            pair_MEE[0, a, b] += n * n
            pair_MEE[1, a, b] += n * here_E[a]
            pair_MEE[2, a, b] += n * there_E[b]
            pair_MEE[3, a, b] += n * tokens


INFORMATION = (
    "entropy_bits",
    "mutual_information_bits",
    "entropy_plugin_bits",
    "conditional_entropy_plugin_bits",
    "mutual_information_plugin_bits",
)
CONTROL = ("mutual_information_shuffled_bits", "mutual_information_shuffled_plugin_bits")


def information(
    joint_EE: NDArray[Any], here_E: NDArray[Any], there_E: NDArray[Any]
) -> dict[str, float]:
    """Entropies and mutual information in bits between one choice here and one there, both drawn at random.

    `joint_EE` counts pairs over rows, `here_E` and `there_E` how many of those rows chose each expert. What stays open,
    `conditional_entropy_bits`, takes the control too: see `left_open`.
    """
    if not joint_EE.any():
        return dict.fromkeys(INFORMATION, np.nan)
    # over pairs: rows that miss some choices count less, on both sides alike
    h_here, h_there = entropy_bits(joint_EE.sum(axis=1)), entropy_bits(joint_EE.sum(axis=0))
    h_joint = entropy_bits(joint_EE.ravel())
    bias = _bias(joint_EE, here_E, there_E)
    here, there, joint = h_here + bias[0], h_there + bias[1], h_joint + bias[2]
    return {
        "entropy_bits": float(there),
        "mutual_information_bits": float(here + there - joint),
        "entropy_plugin_bits": float(h_there),
        "conditional_entropy_plugin_bits": float(h_joint - h_here),
        "mutual_information_plugin_bits": float(h_here + h_there - h_joint),
    }


def left_open(told: dict[str, float]) -> float:
    """Bits of the later choice that the earlier one leaves open: its entropy less what is found beyond the control.

    With few tokens most cells of the joint counts are empty, and no correction of their entropy knows them: of two
    unrelated choices among 256 experts 4.7 bits would stay open after 2000 tokens, not 8. The control errs as much.
    Where one follows from the other the joint counts have few cells to miss, the control still has many, and what is
    told is too much: 3.3 bits, not 0, after those 2000 tokens, 0.7 after 20,000. So it is a bound from above.
    """
    beyond = told["mutual_information_bits"] - told["mutual_information_shuffled_bits"]
    return float(np.clip(told["entropy_bits"] - beyond, 0.0, told["entropy_bits"]))


def _bias(
    joint_EE: NDArray[Any], here_E: NDArray[Any], there_E: NDArray[Any]
) -> tuple[float, float, float]:
    """Bits to add to the plug-in entropies here, there and of both.

    An expert is in a row or not, so a cell of the joint counts varies like a count of rows, however many pairs a row
    adds: every count goes into the estimator as it is, and k > 1 needs no other formula.
    """
    return _missing_bits(here_E), _missing_bits(there_E), _missing_bits(joint_EE.ravel())


def _missing_bits(counts: NDArray[Any]) -> float:
    """Grassberger's estimate of an entropy (2003, arXiv:physics/0307138, eq. 29) less the plug-in one, in bits.

    At a thousand tokens it errs a third as much as Miller and Madow's (a test holds it to that).
    """
    used = counts[counts > 0]
    total = used.sum()
    return float((used * (np.log(used) - _expected_log(used))).sum() / (total * np.log(2)))


@cache
def _small_logs() -> NDArray[np.float64]:
    n = np.arange(1, SMALL_COUNT).astype(float)
    sign = np.where(n % 2 == 0, 0.5, -0.5)
    return np.append(0.0, digamma(n) + sign * (digamma((n + 1) / 2) - digamma(n / 2)))


def _expected_log(counts: NDArray[Any]) -> NDArray[np.float64]:
    """G(n), for which E[n G(n)] is nearly m log m where n varies around m."""
    small = _small_logs()[np.minimum(counts, SMALL_COUNT - 1)]
    return np.where(counts < SMALL_COUNT, small, np.log(counts) - counts % 2 / counts)


def control(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> dict[str, float]:
    """The same estimate where the rows there are shuffled: what is left is the estimator's own error."""
    if not here_E.any() or not there_E.any():
        return dict.fromkeys(CONTROL, np.nan)
    joint_EE = shuffled(here_E, there_E, n_tokens, rng)
    expected_EE = here_E[:, None] * (there_E[None, :] / n_tokens)
    share_EE = np.divide(joint_EE, expected_EE, out=np.ones(joint_EE.shape), where=joint_EE > 0)
    # the deviance: cells are drawn one by one, so their sums vary, which a permutation's do not
    deviance = (joint_EE * np.log(share_EE) - joint_EE + expected_EE).sum()
    plugin = float(deviance / (expected_EE.sum() * np.log(2)))
    here, there, joint = _bias(joint_EE, here_E, there_E)
    return dict(zip(CONTROL, (plugin + here + there - joint, plugin), strict=True))


def shuffled(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Joint counts as they would be had the rows there been permuted: each cell's own distribution, exactly.

    Of the n rows, there_b hold b; the rows that hold a here meet here_a of the n at random: a hypergeometric count.
    Drawn cell by cell, so that no row need be kept; a test holds it against real permutations.
    """
    good_EE = np.broadcast_to(there_E[None, :], (len(here_E), len(there_E)))
    drawn: NDArray[np.int64] = rng.hypergeometric(good_EE, n_tokens - good_EE, here_E[:, None])
    return drawn
