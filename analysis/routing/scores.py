"""A row of scores as probabilities, and what they say of its choices: loops that round alike in every batch.

It knows no layer and no sum. T tokens, E experts, K choices, M recorded scores, N values.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from analysis.routing.sums import add_to

LOGITS, PROBABILITIES, SHARES = "logits", "probabilities", "shares"  # what scores are read as
OVERRULED, LOST = 6, 7  # columns of the values of a row


def probabilities(scores_TM: NDArray[np.float64], reading: str) -> NDArray[np.float64]:
    probability_TM = np.full(scores_TM.shape, np.nan)
    if reading == "softmax":
        _softmax(scores_TM, probability_TM)
    elif reading == "sigmoid":
        _divide_by_sum(_sigmoid(scores_TM), probability_TM)
    elif reading == SHARES:
        _divide_by_sum(scores_TM, probability_TM)
    elif reading == PROBABILITIES:
        probability_TM[:] = scores_TM
    return probability_TM


# numpy rounds exp by where a value stands in its array: these loops do not, so that batches cannot matter
@njit(cache=True, nogil=True)
def _softmax(scores_TM, probability_TM):  # type: ignore[no-untyped-def]
    for t in range(scores_TM.shape[0]):
        top, total = scores_TM[t].max(), 0.0
        for m in range(scores_TM.shape[1]):
            probability_TM[t, m] = np.exp(scores_TM[t, m] - top)
            total += probability_TM[t, m]
        probability_TM[t] /= total


@njit(cache=True, nogil=True)
def _sigmoid(scores_TM):  # type: ignore[no-untyped-def]
    return 1 / (1 + np.exp(-scores_TM))


@njit(cache=True, nogil=True)
def _divide_by_sum(scores_TM, probability_TM):  # type: ignore[no-untyped-def]
    for t in range(scores_TM.shape[0]):
        total = 0.0
        for m in range(scores_TM.shape[1]):
            total += scores_TM[t, m]
        if total > 0:
            probability_TM[t] = scores_TM[t] / total


@njit(cache=True, nogil=True)
def z_loss(logits_TE, loss_T):  # type: ignore[no-untyped-def]
    """Zoph et al. 2022, equation 5."""
    for t in range(logits_TE.shape[0]):
        top, total = logits_TE[t].max(), 0.0
        for e in range(logits_TE.shape[1]):
            total += np.exp(logits_TE[t, e] - top)
        loss_T[t] = (top + np.log(total)) ** 2


@njit(cache=True, nogil=True)
def entropy(probability_TE, bits_T):  # type: ignore[no-untyped-def]
    for t in range(probability_TE.shape[0]):
        bits_T[t] = 0.0
        for e in range(probability_TE.shape[1]):
            p = probability_TE[t, e]
            if p != 0:
                bits_T[t] -= p * np.log2(p)


@njit(cache=True, nogil=True)
def best(probability_TM, best_TN):  # type: ignore[no-untyped-def]
    """The largest of every row in descending order; a row of NaN stays NaN."""
    last = best_TN.shape[1] - 1
    for t in range(probability_TM.shape[0]):
        if not np.isnan(probability_TM[t, 0]):
            best_TN[t] = -1
        for m in range(probability_TM.shape[1]):
            p, n = probability_TM[t, m], last
            if not p > best_TN[t, last]:
                continue
            while n > 0 and best_TN[t, n - 1] < p:
                best_TN[t, n] = best_TN[t, n - 1]
                n -= 1
            best_TN[t, n] = p


@njit(cache=True, nogil=True)
def compare(  # type: ignore[no-untyped-def]
    scores_TM, who_TM, probability_TM, best_TN, ids_TK, nobody, has_all, values_TN
):
    """Did a better score lose to one that was chosen? Equal scores are no difference: float16 makes many."""
    for t in range(ids_TK.shape[0]):
        worst, other, kept, found = np.inf, -np.inf, 0.0, 0
        for m in range(scores_TM.shape[1]):
            if _stands_in(who_TM[t, m], ids_TK[t]):
                worst, kept = min(worst, scores_TM[t, m]), kept + probability_TM[t, m]
                found += who_TM[t, m] != nobody
            else:
                other = max(other, scores_TM[t, m])
        n_chosen = 0
        for k in range(ids_TK.shape[1]):
            n_chosen += ids_TK[t, k] != nobody
        if n_chosen:
            is_overruled = found < n_chosen or worst < other
            values_TN[t, OVERRULED] = is_overruled
            if has_all:
                values_TN[t, LOST] = (best_TN[t, :n_chosen].sum() - kept) * is_overruled


@njit(cache=True, nogil=True)
def _stands_in(expert, ids_K):  # type: ignore[no-untyped-def]
    found = False
    for k in range(ids_K.shape[0]):
        found |= ids_K[k] == expert
    return found


@njit(cache=True, nogil=True)
def add_choices(  # type: ignore[no-untyped-def]
    ids_TK, weights_TK, phase_T, nobody, choices_GE, total_GN, carry_GN
):
    n_experts = choices_GE.shape[1]
    for t in range(ids_TK.shape[0]):
        group = phase_T[t]
        for k in range(ids_TK.shape[1]):
            expert, weight = ids_TK[t, k], weights_TK[t, k]
            if expert != nobody:
                choices_GE[group, expert] += 1
                add_to(total_GN[group], carry_GN[group], expert, weight)
                add_to(total_GN[group], carry_GN[group], n_experts + expert, weight * weight)
