"""Locality in time: how many experts a stretch of text needs, how an expert's uses cluster, how usage drifts.

It knows no cache. Working sets and gaps stay within a run: rows of one request whose positions follow each other (of
one phase: a turn). Their clock counts the rows that have an expert at the layer: the rows of the other stack of an
encoder-decoder model are no pauses.
T tokens, L layers, K choices, E experts, R runs, W windows, G gaps, M moments, B bins, S slices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.statistics import entropy_bits
from analysis.routing.sums import ratio
from prefetch.trace.blocks import Traceable

WINDOWS = (1, 4, 16, 64, 256, 1024)
SLICES = 32
ENOUGH_GAPS = 10  # of one expert; the spread of fewer says little
BINS = 40  # [1, 1], [2, 3], [4, 7], ... rows
UNLIKELY = 1e-17  # of the likeliest count; what is rarer adds nothing to a mean of numbers below 1
LOG2_N = np.array([0, *(n.bit_length() - 1 for n in range(1, 4096))], np.uint8)


class WorkingSets:
    """How many different experts a layer uses within w rows in a row of one request, over all such windows.

    An expert is missing from the windows that lie between two of its uses, so gaps tell the sum over all windows (the
    average footprint of Xiang et al. 2011). With g the gaps of an expert used in a run of n rows, the way from
    before the first row and the way to behind the last among them, it is in sum of min(g, w) - min(n + 1, w) windows.
    """

    def __init__(self, plan: Plan, windows: tuple[int, ...] = WINDOWS) -> None:
        card = plan.card
        self.plan = plan
        self.size_W = np.unique(np.array(windows, np.int64))
        if not len(self.size_W) or self.size_W[0] < 1:
            raise ValueError(f"windows must hold at least one row, got {windows}")
        # the last one stands for all that are longer; n + 1 is counted as minus one gap
        self.gaps_LG = np.zeros((card.n_layers, self.size_W[-1] + 1), np.int64)
        self.uses_LE = np.zeros((card.n_layers, card.n_experts), np.int64)
        self.tokens_L = np.zeros(card.n_layers, np.int64)
        self.windows_LW = np.zeros((card.n_layers, len(self.size_W)), np.int64)

    def add(self, batch: Batch) -> None:
        bounds_R = _runs(batch)

        def count(layer: int) -> None:
            self.tokens_L[layer] += _count_gaps(
                batch.ids_LTK[layer],
                bounds_R,
                batch.nobody,
                self.size_W,
                self.gaps_LG[layer],
                self.uses_LE[layer],
                self.windows_LW[layer],
            )

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: WorkingSets) -> None:
        for name in ("gaps_LG", "uses_LE", "tokens_L", "windows_LW"):
            getattr(self, name).__iadd__(getattr(later, name))

    def table(self) -> pd.DataFrame:
        """One row per layer and window size that fits into a run.

        independent_experts: what as many tokens, picked at random from all, use on average.
        """
        gap_G = np.arange(self.gaps_LG.shape[1])
        met_LW = self.gaps_LG @ np.minimum(gap_G[:, None], self.size_W)
        layer, w = np.nonzero(self.windows_LW)
        windows, mean = self.windows_LW[layer, w], met_LW[layer, w] / self.windows_LW[layer, w]
        independent = self._independent_LW()[layer, w]
        return pd.DataFrame(
            {
                **layer_columns(self.plan.card, layer),
                "window": self.size_W[w],
                "windows": windows,
                "mean_experts": mean,
                "share": mean / self.plan.card.n_experts,
                "independent_experts": independent,
                "ratio": ratio(mean, independent),
            }
        )

    def _independent_LW(self) -> NDArray[np.float64]:
        """Sum over experts of 1 - C(T - c, w) / C(T, w), for an expert that c of T tokens use."""
        used_LW = np.zeros(self.windows_LW.shape)
        left_L1 = self.tokens_L[:, None].astype(float)
        missed_LE, others_LE = np.ones(self.uses_LE.shape), left_L1 - self.uses_LE
        size = 0
        for w in np.flatnonzero(self.windows_LW.any(axis=0)):
            for picked in range(size, self.size_W[w]):
                missed_LE *= np.maximum(0, others_LE - picked) / np.maximum(1, left_L1 - picked)
            size = self.size_W[w]
            used_LW[:, w] = (1 - missed_LE).sum(axis=1)
        return used_LW


@njit(cache=True, nogil=True)
def _count_gaps(ids_TK, bounds_R, nobody, size_W, gaps_G, uses_E, windows_W):  # type: ignore[no-untyped-def]
    """The number of rows that have an expert."""
    longest, rows = len(gaps_G) - 1, 0
    last_E = np.full(len(uses_E), -1)
    for r in range(len(bounds_R) - 1):
        now = 0
        for t in range(bounds_R[r], bounds_R[r + 1]):
            is_used = False
            for k in range(ids_TK.shape[1]):
                expert = ids_TK[t, k]
                if expert != nobody:
                    gaps_G[min(now - last_E[expert], longest)] += 1
                    last_E[expert] = now
                    uses_E[expert] += 1
                    is_used = True
            now += is_used
        for expert in range(len(last_E)):
            if last_E[expert] >= 0:
                gaps_G[min(now - last_E[expert], longest)] += 1
                gaps_G[min(now + 1, longest)] -= 1
                last_E[expert] = -1
        for w in range(len(size_W)):
            windows_W[w] += max(0, now - size_W[w] + 1)
        rows += now
    return rows


class Gaps:
    """Rows from one use of an expert to its next in the same layer and run.

    `moments_LEM[l, e]`: uses, gaps, their sum, the sum of their squares. Ends of runs cut long gaps off, of
    independent choices too: where runs are short, burstiness lies below its geometric value without any cause.
    """

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        self.plan = plan
        self.moments_LEM = np.zeros((card.n_layers, card.n_experts, 4), np.int64)
        self.tokens_L = np.zeros(card.n_layers, np.int64)
        self.bins_LB = np.zeros((card.n_layers, BINS), np.int64)

    def add(self, batch: Batch) -> None:
        bounds_R = _runs(batch)

        def count(layer: int) -> None:
            moments_EM, bins_B = self.moments_LEM[layer], self.bins_LB[layer]
            ids_TK = batch.ids_LTK[layer]
            self.tokens_L[layer] += _measure_gaps(
                ids_TK, bounds_R, batch.nobody, moments_EM, bins_B
            )

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: Gaps) -> None:
        self.moments_LEM += later.moments_LEM
        self.tokens_L += later.tokens_L
        self.bins_LB += later.bins_LB

    def table(self) -> pd.DataFrame:
        """One row per layer that was used.

        burstiness: -1 = at regular intervals, 0 = at random in continuous time, towards 1 = in bursts (Goh and
        Barabasi 2008); a mean over experts. geometric_burstiness: of independent choices at the same rates.
        expected_repeat: share of a token's choices that another token, picked at random, made too.
        """
        layers = np.flatnonzero(self.tokens_L)
        uses_LE, gaps_LE, sum_LE, _ = np.moveaxis(self.moments_LEM[layers].astype(float), 2, 0)
        burstiness_L, geometric_L = self._burstiness(layers)
        others_LE = ratio(uses_LE - 1, self.tokens_L[layers, None] - 1)
        return pd.DataFrame(
            {
                **layer_columns(self.plan.card, layers),
                "gaps": self.moments_LEM[layers, :, 1].sum(axis=1),
                "mean_gap": ratio(sum_LE.sum(axis=1), gaps_LE.sum(axis=1)),
                "burstiness": burstiness_L,
                "geometric_burstiness": geometric_L,
                "expected_repeat": ratio((uses_LE * others_LE).sum(axis=1), uses_LE.sum(axis=1)),
            }
        )

    def _burstiness(self, layers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Means over experts, by gaps; NaN where no expert has enough of them."""
        _, gaps_LE, sum_LE, squares_LE = np.moveaxis(self.moments_LEM[layers].astype(float), 2, 0)
        gaps_LE = np.where(gaps_LE >= ENOUGH_GAPS, gaps_LE, 0)
        mean_LE = np.where(gaps_LE > 0, ratio(sum_LE, gaps_LE), 1)
        square_LE = np.where(gaps_LE > 0, ratio(squares_LE, gaps_LE), 1)
        spread_LE = np.sqrt(np.maximum(0, square_LE - mean_LE**2)) / mean_LE
        even_LE = np.sqrt(1 - 1 / mean_LE)  # of a geometric distribution with this mean
        total_L = gaps_LE.sum(axis=1)
        means = [
            ratio((gaps_LE * (x - 1) / (x + 1)).sum(axis=1), total_L) for x in (spread_LE, even_LE)
        ]
        return means[0], means[1]

    def histogram(self) -> pd.DataFrame:
        """Gaps by powers of two: one row per layer and bin that holds any."""
        layer, b = np.nonzero(self.bins_LB)
        return pd.DataFrame(
            {
                **layer_columns(self.plan.card, layer),
                "gap_from": 1 << b,
                "gap_to": (2 << b) - 1,
                "count": self.bins_LB[layer, b],
            }
        )


@njit(cache=True, nogil=True)
def _measure_gaps(ids_TK, bounds_R, nobody, moments_EM, bins_B):  # type: ignore[no-untyped-def]
    """The number of rows that have an expert."""
    rows = 0
    last_E = np.full(len(moments_EM), -1)
    for r in range(len(bounds_R) - 1):
        now = 0
        last_E[:] = -1
        for t in range(bounds_R[r], bounds_R[r + 1]):
            is_used = False
            for k in range(ids_TK.shape[1]):
                expert = ids_TK[t, k]
                if expert != nobody:
                    if last_E[expert] >= 0:
                        gap = now - last_E[expert]
                        moments_EM[expert, 1] += 1
                        moments_EM[expert, 2] += gap
                        moments_EM[expert, 3] += gap * gap
                        bins_B[_log2(gap)] += 1
                    moments_EM[expert, 0] += 1
                    last_E[expert] = now
                    is_used = True
            now += is_used
        rows += now
    return rows


@njit(cache=True, nogil=True)
def _log2(gap):  # type: ignore[no-untyped-def]
    more = 0
    while gap >= len(LOG2_N):
        gap >>= 1
        more += 1
    return more + LOG2_N[gap]


class Drift:
    """`counts_SLE[s, l, e]`: choices in the s-th of equal slices of the whole trace."""

    def __init__(self, plan: Plan, slices: int = SLICES) -> None:
        if slices < 1:
            raise ValueError(f"slices must be at least 1, got {slices}")
        card = plan.card
        self.plan, self.slices = plan, slices
        self.counts_SLE = np.zeros((slices, card.n_layers, card.n_experts), np.int64)
        self.tokens_SL = np.zeros((slices, card.n_layers), np.int64)

    def add(self, batch: Batch) -> None:
        slice_T = batch.row_T * self.slices // self.plan.n_rows

        def count(layer: int) -> None:
            counts_SE, tokens_S = self.counts_SLE[:, layer], self.tokens_SL[:, layer]
            _count_slices(batch.ids_LTK[layer], slice_T, batch.nobody, counts_SE, tokens_S)

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: Drift) -> None:
        self.counts_SLE += later.counts_SLE
        self.tokens_SL += later.tokens_SL

    def table(self) -> pd.DataFrame:
        """One row per layer and slice with tokens; divergences are Jensen-Shannon's, 0 to 1 bit.

        divergence: between the slice's usage and that of all others; NaN where there is no other.
        divergence_even: its mean over all orders of the trace's tokens: what is left where nothing drifts. Exact where
        every token makes as many choices; where some are missing, a slice has its even part of the choices.
        """
        measured = for_layers(self._divergences, self.plan.card.n_layers)
        layer, s = np.nonzero(self.tokens_SL.T)
        return pd.DataFrame(
            {
                **layer_columns(self.plan.card, layer),
                "slice": s,
                "tokens": self.tokens_SL[s, layer],
                "divergence": np.stack([of_S for of_S, _ in measured])[layer, s],
                "divergence_even": np.stack([even_S for _, even_S in measured])[layer, s],
            }
        )

    def _divergences(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Computed, because the chi-square approximation exceeds 1 bit where a slice has fewer choices than experts."""
        counts_SE, tokens_S = self.counts_SLE[:, layer], self.tokens_SL[:, layer]
        even_S = np.full(self.slices, np.nan)
        for tokens in np.unique(tokens_S[(tokens_S > 0) & (tokens_S < tokens_S.sum())]):
            even = _even_divergence(counts_SE.sum(axis=0), tokens, tokens_S.sum())
            even_S[tokens_S == tokens] = min(1.0, even)
        return _from_others(counts_SE), even_S

    def timeline(self) -> pd.DataFrame:
        """One row per layer, slice and expert that it used."""
        layer, s, expert = np.nonzero(self.counts_SLE.transpose(1, 0, 2))
        columns = {"slice": s, "expert": expert, "count": self.counts_SLE[s, layer, expert]}
        return pd.DataFrame({**layer_columns(self.plan.card, layer), **columns})


@njit(cache=True, nogil=True)
def _count_slices(ids_TK, slice_T, nobody, counts_SE, tokens_S):  # type: ignore[no-untyped-def]
    for t in range(ids_TK.shape[0]):
        s, is_used = slice_T[t], False
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody:
                counts_SE[s, ids_TK[t, k]] += 1
                is_used = True
        tokens_S[s] += is_used


def _from_others(counts_SE: NDArray[Any]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of every slice from all the others together, in bits."""
    other_SE = counts_SE.sum(axis=-2, keepdims=True) - counts_SE
    p_SE, q_SE = (ratio(c, c.sum(axis=-1, keepdims=True)) for c in (counts_SE, other_SE))
    mixed_S = entropy_bits(p_SE + q_SE)
    return np.maximum(0, mixed_S - (entropy_bits(counts_SE) + entropy_bits(other_SE)) / 2)


@njit(cache=True, nogil=True)
def _even_divergence(uses_E, picked, tokens):  # type: ignore[no-untyped-def]
    """Mean divergence between `picked` tokens and the rest, over all ways to pick them out of all.

    It is a sum over experts, so how their uses hang together does not matter: the picked tokens that use an expert
    are hypergeometric. The sum over their numbers starts at the likeliest and goes both ways until it is nothing.
    """
    left, total = tokens - picked, 0.0
    choices, others = picked * uses_E.sum() / tokens, left * uses_E.sum() / tokens
    for named in uses_E:
        uses = min(named, tokens)  # if a row of an unchecked trace names an expert twice
        mode = (picked + 1) * (uses + 1) // (tokens + 2)
        more, above = _upwards(mode, uses, picked, left, choices, others)
        fewer, below = _upwards(uses - mode, uses, left, picked, others, choices)
        total += (more + fewer) / (above + below)
    return total


@njit(cache=True, nogil=True)
def _upwards(count, uses, picked, left, choices, others):  # type: ignore[no-untyped-def]
    """An expert's part of the divergence times its weight, and the weights; the first, 1, is halved."""
    weight, weights, total = 1.0, -0.5, -0.5 * _apart(count / choices, (uses - count) / others)
    while weight > UNLIKELY:
        weights += weight
        total += weight * _apart(count / choices, (uses - count) / others)
        weight *= (uses - count) * (picked - count)  # 0 behind the last
        weight /= (count + 1.0) * (left - uses + count + 1.0)
        count += 1
    return total, weights


@njit(cache=True, nogil=True)
def _apart(p, q):  # type: ignore[no-untyped-def]
    """What an expert of these two shares adds to the Jensen-Shannon divergence, in bits."""
    total = 0.0
    for share in (p, q):
        if share > 0:
            total += share * np.log2(2 * share / (p + q)) / 2
    return total


def _runs(batch: Batch) -> NDArray[np.int64]:
    """First row of every run, and the end."""
    block = batch.block
    goes_on_T = (np.diff(block.request_T) == 0) & (np.diff(block.position_T) == 1)
    return np.concatenate([[0], np.flatnonzero(~goes_on_T) + 1, [block.n_tokens]])


def working_sets(trace: Traceable, windows: tuple[int, ...] = WINDOWS) -> pd.DataFrame:
    """How many different experts every layer uses within so many tokens."""
    plan = plan_of(trace)
    counted = WorkingSets(plan, windows)
    accumulate(trace, plan, [counted])
    return counted.table()


def burstiness(trace: Traceable) -> pd.DataFrame:
    """How uses of one expert cluster in time, layer by layer."""
    plan = plan_of(trace)
    counted = Gaps(plan)
    accumulate(trace, plan, [counted])
    return counted.table()


def drift(trace: Traceable, slices: int = SLICES) -> pd.DataFrame:
    """How far the usage in every part of the trace is from that in the rest."""
    plan = plan_of(trace)
    counted = Drift(plan, slices)
    accumulate(trace, plan, [counted])
    return counted.table()
