"""Which expert goes with which: joint counts, what they tell in bits, and the same under independence.

It knows no layer and no token order: whoever counts says what stands here and what there.
T tokens, K choices, E experts, C row classes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.special import digamma

from analysis.routing.statistics import entropy_bits
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard

MOST_BYTES = 2 << 30  # dense tables of pair counts; more experts than that fit need fewer horizons
SKIP = 255  # class of a row that is not counted
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


INFORMATION = (
    "entropy_bits",
    "conditional_entropy_bits",
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

    `joint_EE` counts pairs over rows, `here_E` and `there_E` how many of those rows chose each expert.
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
        "conditional_entropy_bits": float(joint - here),
        "mutual_information_bits": float(here + there - joint),
        "entropy_plugin_bits": float(h_there),
        "conditional_entropy_plugin_bits": float(h_joint - h_here),
        "mutual_information_plugin_bits": float(h_here + h_there - h_joint),
    }


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
