"""At which place guesses from counts have what was chosen, row by row, in compiled loops.

It knows no trace and no table. T tokens, K choices, E experts, C row classes, P predictors, R requests.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def rank_known(there_TK, follows_T, rank_E, class_T, number_T, nobody, ranks_PCE, request_PR):  # type: ignore[no-untyped-def]
    """Popularity (p = 0), and the previous token's experts, then the most popular others (p = 1)."""
    n_choices = there_TK.shape[1]
    for t in range(there_TK.shape[0]):
        c, request = class_T[t], number_T[t]
        if c >= ranks_PCE.shape[1]:
            continue
        for j in range(n_choices):
            b = there_TK[t, j]
            if b == nobody:
                continue
            request_PR[-1, request] += 1
            rank = rank_E[b]
            ranks_PCE[0, c, rank] += 1
            request_PR[0, request] += rank < n_choices
            if follows_T[t]:
                known, found, more_popular = 0, -1, 0
                for i in range(n_choices):
                    a = there_TK[t - 1, i]
                    if a == nobody:
                        continue
                    if a == b:
                        found = known
                    more_popular += rank_E[a] < rank_E[b]
                    known += 1
                rank = found if found >= 0 else known + rank - more_popular
            ranks_PCE[1, c, rank] += 1
            request_PR[1, request] += rank < n_choices


@njit(cache=True, nogil=True)
def rank_markov(here_TK, there_TK, chance_EE, class_T, number_T, nobody, ranks_CE, hits_R):  # type: ignore[no-untyped-def]
    n_choices = there_TK.shape[1]
    score_E = np.zeros(chance_EE.shape[0], np.float32)
    for t in range(here_TK.shape[0]):
        c = class_T[t]
        if c >= ranks_CE.shape[0] or not _add_up(score_E, chance_EE, here_TK[t], nobody):
            continue
        for j in range(n_choices):
            if there_TK[t, j] != nobody:
                rank = _rank(score_E, np.int64(there_TK[t, j]))
                ranks_CE[c, rank] += 1
                hits_R[number_T[t]] += rank < n_choices


@njit(cache=True, nogil=True)
def rank_drawn(  # type: ignore[no-untyped-def]
    here_TK, there_TK, chance_EE, cdf_E, guide, row_T, seed, share, class_T, nobody, ranks_CE
):
    """The same for experts drawn from a cdf, which have nothing to do with this row; it ends with 1.

    A share of the rows will do; of few rows, each counts `share` times.
    """
    score_E = np.zeros(chance_EE.shape[0], np.float32)
    for t in range(here_TK.shape[0]):
        c = class_T[t]
        if c >= ranks_CE.shape[0]:
            continue
        state = _mix(seed ^ (np.uint64(row_T[t]) * np.uint64(0x9E3779B97F4A7C15)))
        if _unit(state) >= share or not _add_up(score_E, chance_EE, here_TK[t], nobody):
            continue
        for _ in range(max(1, int(share))):
            for j in range(there_TK.shape[1]):
                if there_TK[t, j] == nobody:
                    continue
                state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
                u = _unit(state)
                b = guide[int(u * len(guide))]
                while cdf_E[b] <= u:
                    b += 1
                ranks_CE[c, _rank(score_E, b)] += 1


@njit(cache=True, nogil=True)
def _unit(bits):  # type: ignore[no-untyped-def]
    return (bits >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def _add_up(score_E, chance_EE, here_K, nobody):  # type: ignore[no-untyped-def]
    """Is there an expert to go by?"""
    is_known = False
    if here_K.shape[0] == 8 and (here_K != nobody).all():
        return _add_eight(score_E, chance_EE, here_K)
    for e in range(score_E.shape[0]):
        score_E[e] = 0
    for i in range(here_K.shape[0]):
        if here_K[i] != nobody:
            is_known = True
            chance_E = chance_EE[here_K[i]]
            for e in range(score_E.shape[0]):  # spelt out: so it compiles to vector instructions
                score_E[e] += chance_E[e]
    return is_known


@njit(cache=True, nogil=True)
def _add_eight(score_E, chance_EE, here_K):  # type: ignore[no-untyped-def]
    """The usual number in one sweep, in the same order: two thirds of the time."""
    a_E, b_E, c_E, d_E = (
        chance_EE[here_K[0]],
        chance_EE[here_K[1]],
        chance_EE[here_K[2]],
        chance_EE[here_K[3]],
    )
    e_E, f_E, g_E, h_E = (
        chance_EE[here_K[4]],
        chance_EE[here_K[5]],
        chance_EE[here_K[6]],
        chance_EE[here_K[7]],
    )
    for e in range(score_E.shape[0]):
        score_E[e] = a_E[e] + b_E[e] + c_E[e] + d_E[e] + e_E[e] + f_E[e] + g_E[e] + h_E[e]
    return True


@njit(cache=True, nogil=True)
def _rank(score_E, b):  # type: ignore[no-untyped-def]
    """How many experts come before b: those with a better score, and of equal ones those with a lower id."""
    better, as_good, score = np.int32(0), np.int32(0), score_E[b]
    for e in range(
        score_E.shape[0]
    ):  # numba widens a sum to 64 bits, and halves the vectors, unless told
        better = np.int32(better + np.int32(score_E[e] > score))
        as_good = np.int32(as_good + np.int32(score_E[e] >= score))
    if as_good - better > 1:
        for e in range(b):
            better = np.int32(better + np.int32(score_E[e] == score))
    return better


@njit(cache=True, nogil=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """SplitMix64 (Steele et al. 2014): random bits that depend on the row alone, whatever the batch."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
