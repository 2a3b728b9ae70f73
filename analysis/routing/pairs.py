"""Which expert goes with which: joint counts, what they tell in bits, and the same under independence.

It knows no layer and no token order: whoever counts says what stands here and what there.
T tokens, K choices, E experts, C row classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from analysis.routing.statistics import entropy_bits

SKIP = 255  # class of a row that is not counted


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
    joint_EE: NDArray[Any], here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int
) -> dict[str, float]:
    """Entropies and mutual information in bits between one choice here and one there, both drawn at random.

    `joint_EE` counts pairs over `n_tokens` rows, `here_E` and `there_E` how many of those rows chose each expert.
    """
    if not joint_EE.any():
        return dict.fromkeys(INFORMATION, np.nan)
    h_here, h_there = entropy_bits(here_E), entropy_bits(there_E)
    h_joint = entropy_bits(joint_EE.ravel())
    bias = _bias(joint_EE, here_E, there_E, n_tokens)
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
    joint_EE: NDArray[Any], here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int
) -> tuple[float, float, float]:
    """Bits to add to the plug-in entropies here, there and of both.

    Miller and Madow's correction (1955) carried over to k choices a row: an expert is in a row or not, so the variance of
    a count over n rows is n p (1 - p), whatever the number of pairs that a row adds.
    """
    k_here, k_there = here_E.sum() / n_tokens, there_E.sum() / n_tokens
    both, nats = k_here * k_there, 2 * n_tokens * np.log(2)
    return (
        float(((here_E > 0).sum() - k_here) / (nats * k_here)),
        float(((there_E > 0).sum() - k_there) / (nats * k_there)),
        float(((joint_EE > 0).sum() - both) / (nats * both)),
    )


def control(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> dict[str, float]:
    """The same estimate where the rows there are shuffled: what is left of the information is the estimator's own error."""
    if not here_E.any() or not there_E.any():
        return dict.fromkeys(CONTROL, np.nan)
    joint_EE = shuffled(here_E, there_E, n_tokens, rng)
    expected_EE = here_E[:, None] * (there_E[None, :] / n_tokens)
    share_EE = np.divide(joint_EE, expected_EE, out=np.ones(joint_EE.shape), where=joint_EE > 0)
    # the deviance: cells are drawn one by one, so their sums vary, which a permutation's do not
    deviance = (joint_EE * np.log(share_EE) - joint_EE + expected_EE).sum()
    plugin = float(deviance / (expected_EE.sum() * np.log(2)))
    here, there, joint = _bias(joint_EE, here_E, there_E, n_tokens)
    return dict(zip(CONTROL, (plugin + here + there - joint, plugin), strict=True))


def shuffled(
    here_E: NDArray[Any], there_E: NDArray[Any], n_tokens: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Joint counts as they would be had the rows there been permuted: each cell's own distribution, exactly.

    Of the n rows, there_b hold b; the rows that hold a here meet here_a of the n at random: a hypergeometric count. Drawn
    cell by cell, so that no row need be kept; a test holds it against real permutations.
    """
    good_EE = np.broadcast_to(there_E[None, :], (len(here_E), len(there_E)))
    drawn: NDArray[np.int64] = rng.hypergeometric(good_EE, n_tokens - good_EE, here_E[:, None])
    return drawn
