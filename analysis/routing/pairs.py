"""Which expert goes with which: joint counts, what they tell in bits, and the same under independence.

It knows no token order: whoever counts says what stands here and what there.
T tokens, K choices, E experts, C row classes, L layers, M moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.special import digamma

from analysis.routing.significance import FEWEST_REQUESTS, design_effects
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard

MOST_BYTES = 2 << 30  # dense tables of pair counts; more experts than that fit need fewer horizons
SKIP = 255  # class of a row that is not counted
DENSE = 0.1  # pairs of a request per cell of the table, from which on the whole table is walked
HYPERGEOMETRIC = 10**9  # rows that numpy's takes fewer than
MANY = 100.0  # variance of a count, from which on it is drawn as a normal one
SMALL_COUNT = 1 << 14  # from here on the asymptotic form is exact to 1e-8


def check_bytes(n_bytes: int, card: ModelCard) -> None:
    if n_bytes > MOST_BYTES:
        raise MissingData(
            f"pair counts of {card.n_experts} experts in {card.n_layers} layers would take {n_bytes / 1e9:.1f} GB, "
            f"more than {MOST_BYTES / 1e9:.1f}; a lower analyze.horizon needs less"
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
def count_alone(ids_TK, class_T, nobody, out_CE, tokens_C):  # type: ignore[no-untyped-def]
    """Over the rows that have an expert here. Is that every row which counts?"""
    is_whole = True
    for t in range(ids_TK.shape[0]):
        c, is_known = class_T[t], False
        if c >= tokens_C.shape[0]:
            continue
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody:
                out_CE[c, ids_TK[t, k]] += 1
                is_known = True
        tokens_C[c] += is_known
        is_whole &= is_known
    return is_whole


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
    both, from_E, to_E = _sums(joint_EE)
    h_here, h_there = _sums(from_E[None])[0].entropy_bits, _sums(to_E[None])[0].entropy_bits
    h_joint = both.entropy_bits
    here, there = h_here + _missing_bits(here_E), h_there + _missing_bits(there_E)
    joint = h_joint + both.missing_bits
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


class _Sums(NamedTuple):
    """Of counts n: their sum, and those of n log n and of n G(n), in nats."""

    total: int
    logs: float
    expected_logs: float

    @property
    def entropy_bits(self) -> float:
        """Plug-in."""
        return max(0.0, float((np.log(self.total) - self.logs / self.total) / np.log(2)))

    @property
    def missing_bits(self) -> float:
        """Grassberger's estimate of an entropy (2003, arXiv:physics/0307138, eq. 29) less the plug-in one, in bits.

        At a thousand tokens it errs a third as much as Miller and Madow's (a test holds it to that). An expert is in a
        row or not, so a cell of joint counts varies like a count of rows, however many pairs a row adds: every count
        goes into the estimator as it is, and k > 1 needs no other formula.
        """
        return float((self.logs - self.expected_logs) / (self.total * np.log(2)))


def _sums(counts_EE: NDArray[Any]) -> tuple[_Sums, NDArray[np.int64], NDArray[np.int64]]:
    """And the sums of rows and columns."""
    row_E, column_E = (np.zeros(n, np.int64) for n in counts_EE.shape)
    logs = _log_sums(counts_EE, *_small_logs(), row_E, column_E)
    return _Sums(int(row_E.sum()), *logs), row_E, column_E


def _missing_bits(count_E: NDArray[Any]) -> float:
    return _sums(count_E[None])[0].missing_bits


@njit(cache=True, nogil=True)
def _log_sums(counts_EE, log_N, expected_N, row_E, column_E):  # type: ignore[no-untyped-def]
    """Sums of n log n and of n G(n), for which E[n G(n)] is nearly m log m where n varies around m."""
    logs, expected = 0.0, 0.0
    for a in range(counts_EE.shape[0]):
        for b in range(counts_EE.shape[1]):
            n = counts_EE[a, b]
            row_E[a] += n
            column_E[b] += n
            if n < len(log_N):
                logs += log_N[n]
                expected += expected_N[n]
            else:
                large = n * np.log(n)
                logs += large
                expected += large - n % 2
    return logs, expected


@cache
def _small_logs() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """n log n and n G(n) of every small n."""
    n = np.arange(1, SMALL_COUNT).astype(float)
    sign = np.where(n % 2 == 0, 0.5, -0.5)
    expected = digamma(n) + sign * (digamma((n + 1) / 2) - digamma(n / 2))
    return np.append(0.0, n * np.log(n)), np.append(0.0, n * expected)


def control(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> dict[str, float]:
    """The same estimate where the rows there are shuffled: what is left is the estimator's own error."""
    if not here_E.any() or not there_E.any():
        return dict.fromkeys(CONTROL, np.nan)
    both, from_E, to_E = _sums(shuffled(here_E, there_E, n_tokens, rng))
    pairs = float(here_E.sum()) * (float(there_E.sum()) / n_tokens)
    # the deviance from here_a * there_b / n: cells are drawn one by one, so their sums vary; a permutation's do not
    log_expected = from_E @ _log(here_E) + to_E @ _log(there_E) - both.total * np.log(n_tokens)
    plugin = float((both.logs - log_expected - both.total + pairs) / (pairs * np.log(2)))
    bias = _missing_bits(here_E) + _missing_bits(there_E) - (both.missing_bits if both.total else 0)
    return dict(zip(CONTROL, (plugin + bias, plugin), strict=True))


def _log(count_E: NDArray[Any]) -> NDArray[np.float64]:
    """Of nobody: 0, as nobody is in no pair."""
    return np.log(np.maximum(count_E, 1))


def shuffled(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Joint counts as they would be had the rows there been permuted: each cell by itself.

    Of the n rows, there_b hold b; the rows that hold a here meet here_a of the n at random: a hypergeometric count.
    Drawn cell by cell, so that no row need be kept; a test holds it against real permutations. Where the count varies
    much, it is a rounded normal one of the same mean, variance and skewness (Cornish and Fisher 1938), in a tenth of
    the time.
    """
    drawn_EE = np.empty((len(here_E), len(there_E)), np.int64)
    normal_EE = rng.standard_normal(drawn_EE.shape)
    few_a, few_b = np.nonzero(_draw_many(here_E, there_E, n_tokens, normal_EE, drawn_EE))
    drawn_EE[few_a, few_b] = _few(here_E[few_a], there_E[few_b], n_tokens, rng)
    return drawn_EE


def _few(
    here_P: NDArray[Any], there_P: NDArray[Any], n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[pair]: how many of the rows that are here are there, where that varies little.

    Of more rows than numpy's hypergeometric takes, binomial: the smaller side is drawn, and whoever is nearly
    everywhere is counted by where it is not; its variance is within 0.1 %.
    """
    if n < HYPERGEOMETRIC:
        return rng.hypergeometric(there_P, n - there_P, here_P)
    is_most_P = there_P > n // 2
    other_P = np.where(is_most_P, n - there_P, there_P)
    fewer_P, more_P = np.minimum(here_P, other_P), np.maximum(here_P, other_P)
    drawn_P = rng.binomial(fewer_P, more_P / n)
    return np.where(is_most_P, here_P - drawn_P, drawn_P)


@njit(cache=True, nogil=True)
def _draw_many(here_E, there_E, n, normal_EE, drawn_EE):  # type: ignore[no-untyped-def]
    """Which cells vary too little for that?"""
    is_few_EE = np.zeros(drawn_EE.shape, np.bool_)
    for a in range(len(here_E)):
        share = here_E[a] / n
        for b in range(len(there_E)):
            other, z = there_E[b] / n, normal_EE[a, b]
            variance = here_E[a] * other * (1 - share) * (n - there_E[b]) / max(1, n - 1)
            is_few_EE[a, b] = variance < MANY
            sd = np.sqrt(max(variance, MANY) - 1 / 12)  # rounding adds a twelfth
            bend = (1 - 2 * share) * (1 - 2 * other) / 6
            drawn_EE[a, b] = np.rint(here_E[a] * other + sd * z + bend * (z * z - 1))
    return is_few_EE
