"""Whether every expert carries its part: load with significance, health, hotspots.

It knows no router scores and no time. An expert counts as dead only where so many tokens cannot have missed it by
chance. T tokens, L layers, K choices, E experts, U quantiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import chdtr
from scipy.stats import binom

from analysis.routing.batch import accumulate, layer_columns, plan_of
from analysis.routing.significance import q_values
from analysis.routing.statistics import Usage, entropy_bits, gini
from analysis.routing.sums import ratio, share_of
from analysis.routing.windows import (
    FACTORS_F,
    MOST_DROPPED,
    WINDOW_TOKENS,
    Windows,
    dropped_share,
    fano,
)
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts

SIGNIFICANCE = 0.01
TOO_FEW = "unused: too few tokens"
QUANTILES_U = (np.arange(256) + 0.5) / 256  # their mean is an expectation to 1 in 1000


def load(
    counts_LE: NDArray[np.int64],
    tokens_L: NDArray[np.int64],
    top_k: int,
    card: ModelCard,
    *,
    significance: float = SIGNIFICANCE,
    under: float = 0.5,
    over: float = 2.0,
) -> pd.DataFrame:
    """One row per layer and expert, in the order of the counts.

    z, p_value: against every expert being equally likely, tokens taken as independent; z describes, the p-value is
    exact (binomial, two-sided). q_value: Benjamini-Hochberg within the layer. Under- or overused is what is
    significant and beyond the threshold of share x E.
    """
    z_LE = _z_values(counts_LE, tokens_L, top_k)
    p_LE = _p_values(counts_LE, tokens_L, top_k)
    q_LE, share_LE = q_values(p_LE), share_of(counts_LE)
    ratio_LE, is_sure_LE = share_LE * card.n_experts, q_LE <= significance
    enough_L = tokens_L >= tokens_for_dead(counts_LE, tokens_L, top_k, significance)
    states = {
        "dead": (counts_LE == 0) & enough_L[:, None],
        TOO_FEW: counts_LE == 0,
        "underused": is_sure_LE & (ratio_LE < under),
        "overused": is_sure_LE & (ratio_LE > over),
    }
    state_LE = np.select(list(states.values()), list(states), "balanced")
    columns = {"count": counts_LE, "share": share_LE, "ratio": ratio_LE, "z": z_LE}
    columns |= {"p_value": p_LE, "q_value": q_LE, "state": state_LE}
    layer, expert = np.indices(counts_LE.shape).reshape(2, -1)
    flat = {name: values.ravel() for name, values in columns.items()}
    return pd.DataFrame({**layer_columns(card, layer), "expert": expert, **flat})


def _made(counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """Choices per token: fewer than k where some name no expert."""
    made_L = ratio(counts_LE.sum(axis=1), tokens_L)
    return np.where(np.isnan(made_L), top_k, np.minimum(top_k, made_L))


def _z_values(counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """0 where nothing can vary (k = E), NaN where nothing was chosen."""
    p_L = _made(counts_LE, tokens_L, top_k) / counts_LE.shape[1]
    spread_L1 = np.sqrt(tokens_L * p_L * np.maximum(0, 1 - p_L))[:, None]
    off_LE = counts_LE - counts_LE.mean(axis=1, keepdims=True)
    z_LE = np.divide(off_LE, spread_L1, out=np.zeros(off_LE.shape), where=spread_L1 > 0)
    return np.where(counts_LE.any(axis=1, keepdims=True), z_LE, np.nan)


def _p_values(counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """Twice the smaller tail: where an expert's even part is a few tokens, a normal law calls one token too many."""
    chance_L1 = _made(counts_LE, tokens_L, top_k)[:, None] / counts_LE.shape[1]
    even = binom(tokens_L[:, None], chance_L1)
    p_LE = np.minimum(1, 2 * np.minimum(even.cdf(counts_LE), even.sf(counts_LE - 1)))
    return np.where(counts_LE.any(axis=1, keepdims=True), p_LE, np.nan)


def tokens_for_dead(
    counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int, significance: float
) -> NDArray[np.float64]:
    """So many even choices leave none of E experts out but with this chance: E (1 - k/E)^T."""
    n_experts = counts_LE.shape[1]
    missed_L = 1 - _made(counts_LE, tokens_L, top_k) / n_experts
    with np.errstate(divide="ignore"):
        return np.maximum(1, np.ceil(np.log(significance / n_experts) / np.log(missed_L)))


def health(
    counts_LE: NDArray[np.int64],
    tokens_L: NDArray[np.int64],
    top_k: int,
    card: ModelCard,
    windows: Windows | None,
    *,
    significance: float = SIGNIFICANCE,
    collapse: float = 0.5,
) -> pd.DataFrame:
    """One row per layer.

    max_violation and min_violation: load over the mean, minus 1 (arXiv 2408.15664); max_violation_windows: its mean
    over full windows. noise_floor: max_over_mean that even choices show on average. too_even_p_value: the chance that
    even choices of independent tokens would be as even as these. unused_experts: never chosen, but too few tokens to
    call them dead. spread: entropy on the scale from log2 k, the least that k different experts per token can have,
    to log2 E; a layer below `collapse` is collapsed. Without windows, what they tell is NaN.
    """
    made_L = _made(counts_LE, tokens_L, top_k)
    rows = load(counts_LE, tokens_L, top_k, card, significance=significance)
    state_LE = rows.state.to_numpy().reshape(counts_LE.shape)
    columns = {
        **_loads(rows.ratio.to_numpy().reshape(counts_LE.shape)),
        "gini": gini(counts_LE),
        "dead_experts": (state_LE == "dead").sum(axis=1),
        "unused_experts": (state_LE == TOO_FEW).sum(axis=1),
        "tokens_for_dead": tokens_for_dead(counts_LE, tokens_L, top_k, significance),
        "underused": (state_LE == "underused").sum(axis=1),
        "overused": (state_LE == "overused").sum(axis=1),
        "noise_floor": _noise_floor(tokens_L, made_L, card.n_experts),
        "too_even_p_value": _too_even(counts_LE, tokens_L, top_k),
        **_concentration(counts_LE, made_L),
        **_health_in_windows(windows, len(counts_LE)),
    }
    # few tokens use few experts, whatever the router
    enough_L = tokens_L >= columns["tokens_for_dead"]
    columns["is_collapsed"] = enough_L & (columns["spread"] < collapse)
    names = layer_columns(card, np.arange(len(counts_LE)))
    return pd.DataFrame({**names, "tokens": tokens_L, **columns})


def _loads(ratio_LE: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    largest_L = ratio_LE.max(axis=1)
    return {
        "max_over_mean": largest_L,
        "max_violation": largest_L - 1,
        "min_violation": ratio_LE.min(axis=1) - 1,
        "top_1_share": largest_L / ratio_LE.shape[1],
    }


def _noise_floor(
    tokens_L: NDArray[Any], made_L: NDArray[np.float64], n_experts: int
) -> NDArray[np.float64]:
    """Expected max/mean of E binomial counts; that they have one sum spreads them by sqrt(E / (E - 1))."""
    largest_U = QUANTILES_U ** (1 / n_experts)
    chance_L = made_L / n_experts
    largest_L = binom.ppf(largest_U, tokens_L[:, None], chance_L[:, None]).mean(axis=1)
    apart = np.sqrt(n_experts / max(1, n_experts - 1))
    return 1 + apart * (ratio(largest_L, tokens_L * chance_L) - 1)


def _too_even(
    counts_LE: NDArray[np.int64], tokens_L: NDArray[Any], top_k: int
) -> NDArray[np.float64]:
    """Lower tail of the chi-square of dispersion, E - 1 degrees of freedom; NaN where nothing can vary.

    Never too small: the counts' distance from even use grows by the farthest that any point lies from whole counts of
    that sum (so that few tokens, spread as evenly as they can be, are no wonder), and where tokens have fewer than k
    choices, these are taken to be spread over the tokens as unevenly as can be.
    """
    n, made_L = counts_LE.shape[1], counts_LE.sum(axis=1)
    off_LE = counts_LE - counts_LE.mean(axis=1, keepdims=True)
    rounding = np.sqrt((n // 2) * (n - n // 2) / n)  # covering radius of the lattice A_(E-1)
    distance_L = np.sqrt((off_LE**2).sum(axis=1)) + rounding
    # over tokens with j of k choices: j**2 <= (k + 1) j - k
    squares_L = (top_k + 1) * made_L - top_k * tokens_L
    variance_L = (made_L - squares_L / n) / max(1, n - 1)  # in every direction that keeps the sum
    return np.asarray(chdtr(n - 1, ratio(distance_L**2, variance_L)))


def _concentration(
    counts_LE: NDArray[np.int64], made_L: NDArray[np.float64]
) -> dict[str, NDArray[Any]]:
    n, entropy_L = counts_LE.shape[1], entropy_bits(counts_LE)
    spread_L = ratio(entropy_L - np.log2(made_L), np.log2(n) - np.log2(made_L))
    return {
        "normalized_entropy": ratio(entropy_L, np.log2(n)),
        "spread": spread_L,
    }


def _health_in_windows(windows: Windows | None, n_layers: int) -> dict[str, NDArray[np.float64]]:
    names = ("max_violation_windows", "capacity_factor_1pct", "fano_max")
    if windows is None:
        return {name: np.full(n_layers, np.nan) for name in names}
    sums = windows.total()
    enough_LF = dropped_share(sums) <= MOST_DROPPED
    smallest_L = np.where(enough_LF.any(axis=1), FACTORS_F[enough_LF.argmax(axis=1)], np.nan)
    worst_L = np.where(np.isnan(fano(sums)), -np.inf, fano(sums)).max(axis=1)
    fano_L = np.where(np.isinf(worst_L), np.nan, worst_L)
    return dict(zip(names, (ratio(sums.violation_L, sums.full_L), smallest_L, fano_L), strict=True))


def hotspots(
    load: pd.DataFrame,
    windows: Windows,
    card: ModelCard,
    most: int = 20,
    *,
    significance: float = SIGNIFICANCE,
) -> pd.DataFrame:
    """The experts with the largest significant load over the mean, and how it varied between full windows."""
    sums, shape = windows.total(), (card.n_layers, card.n_experts)
    worst_LE = np.where(sums.full_L[:, None] > 0, sums.worst_LE, np.nan)
    table = load[[name for name in load if name in (*HOTSPOT, "stack")]].assign(
        largest_window_ratio=worst_LE.ravel(), fano=fano(sums).ravel()
    )
    assert len(load) == math.prod(shape), "the rows of `load`, in its order"
    table = table[(table.q_value <= significance) & (table.ratio > 1)]
    table = table.sort_values("ratio", ascending=False, kind="stable")
    return table.head(most).reset_index(drop=True)


HOTSPOT = ("layer", "expert", "ratio", "z", "q_value")


def expert_load(
    trace: Traceable | ExpertCounts,
    *,
    significance: float = SIGNIFICANCE,
    under: float = 0.5,
    over: float = 2.0,
) -> pd.DataFrame:
    """The load of every expert of a trace, or of counts, and whether it can be chance."""
    counts_LE, tokens_L, card, _ = _counted(trace, None)
    limits = {"significance": significance, "under": under, "over": over}
    return load(counts_LE, tokens_L, card.top_k, card, **limits)


def balance(
    trace: Traceable | ExpertCounts,
    *,
    tokens: int = WINDOW_TOKENS,
    significance: float = SIGNIFICANCE,
    collapse: float = 0.5,
) -> pd.DataFrame:
    """Balance and health of every layer of a trace, or of counts, which have no windows."""
    counts_LE, tokens_L, card, windows = _counted(trace, tokens)
    limits = {"significance": significance, "collapse": collapse}
    return health(counts_LE, tokens_L, card.top_k, card, windows, **limits)


def _counted(
    trace: Traceable | ExpertCounts, window_tokens: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], ModelCard, Windows | None]:
    if isinstance(trace, ExpertCounts):
        counts_LE, card = trace.counts_LE, trace.card
        return counts_LE, counts_LE.sum(axis=1) // card.top_k, card, None
    plan = plan_of(trace)
    usage = Usage(plan)
    windows = None if window_tokens is None else Windows(plan, window_tokens)
    accumulate(trace, plan, [usage] if windows is None else [usage, windows])
    return usage.counts(), usage.tokens(), plan.card, windows
