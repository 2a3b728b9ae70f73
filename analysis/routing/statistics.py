"""How unevenly every layer uses its experts: moments, entropy, coverage, over all choices and over the first.

It knows usage counts only, so it works for `ExpertCounts` as for a trace. Conventions, stated in `SCHEMA` beside every
file: population moments (ddof 0), biased skewness and excess kurtosis, base-2 entropy, experts never used included.
C row classes, L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.sums import ratio
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.routing import PHASES

CHOICES = ("all", "first")
COVERAGES = (50, 80, 90, 95)  # per cent of the choices
# The fields that specMoE's expert analysis guide names; tests hold them equal to its committed files.
GUIDE_FIELDS = (
    "mean",
    "std",
    "coefficient_of_variation",
    "entropy_bits",
    "min_usage",
    "max_usage",
    "skewness",
    "kurtosis",
    "median",
    "q25",
    "q75",
    "iqr",
    "active_experts",
    "expert_diversity",
    "total_usage",
    "zero_usage_experts",
)
SCHEMA = {
    "std": "population, ddof = 0",
    "skewness": "biased, ddof = 0",
    "kurtosis": "excess (Fisher: normal = 0), biased, ddof = 0",
    "entropy": "base 2; its maximum is log2(num_experts)",
    "quartiles": "linear interpolation",
    "expert_diversity": "fraction of experts used at least once, 0 to 1",
    "zero_usage_experts": "included in every field",
}


class Usage:
    """`counts_CLE[c, l, e]`: choices of expert e at layer l by rows of class c = part, phase, template or not."""

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        self.plan = plan
        self.counts_CLE = np.zeros((12, card.n_layers, card.n_experts), np.int64)
        self.first_CLE = np.zeros_like(self.counts_CLE)
        self.tokens_CL = np.zeros((12, card.n_layers), np.int64)  # rows with an expert there

    def add(self, batch: Batch) -> None:
        class_T = classes(batch)
        first_LT = batch.first_choice_LT

        def count(layer: int) -> None:
            _count_usage(
                batch.ids_LTK[layer],
                first_LT[layer],
                class_T,
                batch.nobody,
                self.counts_CLE[:, layer],
                self.first_CLE[:, layer],
                self.tokens_CL[:, layer],
            )

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: Usage) -> None:
        self.counts_CLE += later.counts_CLE
        self.first_CLE += later.first_CLE
        self.tokens_CL += later.tokens_CL

    def counts(
        self, phase: str = "all", *, part: int | None = None, first: bool = False
    ) -> NDArray[np.int64]:
        """[L, E] over the rows of a phase and a part."""
        counts_CLE = self.first_CLE if first else self.counts_CLE
        return counts_CLE[_chosen(phase, part)].sum(axis=0)

    def tokens(self, phase: str = "all", *, part: int | None = None) -> NDArray[np.int64]:
        """[L]: rows with an expert at that layer."""
        return self.tokens_CL[_chosen(phase, part)].sum(axis=0)

    def table(self) -> pd.DataFrame:
        """One row per phase, choices (all k, or the first) and layer."""
        frames = [
            layer_statistics(self.counts(phase, first=choices == "first"), self.plan.card).assign(
                phase=phase, choices=choices, tokens=self.tokens(phase)
            )
            for phase in self.plan.phases
            for choices in CHOICES
        ]
        return leading(pd.concat(frames, ignore_index=True), "phase", "choices")


def classes(batch: Batch) -> NDArray[np.uint8]:
    """Part (train, test, left out), then phase, then template or not, as one number from 0 to 11."""
    flag_T = 2 * batch.block.phase_T + batch.is_template_T
    return (4 * batch.part_T + flag_T).astype(np.uint8)


def _chosen(phase: str, part: int | None) -> NDArray[np.bool_]:
    class_C = np.arange(12)
    chosen = np.ones(12, bool) if part is None else class_C // 4 == part
    return chosen if phase == "all" else chosen & (class_C // 2 % 2 == PHASES.index(phase))


@njit(cache=True, nogil=True)
def _count_usage(ids_TK, first_T, class_T, nobody, counts_CE, first_CE, tokens_C):  # type: ignore[no-untyped-def]
    for t in range(ids_TK.shape[0]):
        c = class_T[t]
        is_used = False
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[t, k]
            if expert != nobody:
                counts_CE[c, expert] += 1
                is_used = True
        tokens_C[c] += is_used
        if first_T[t] != nobody:
            first_CE[c, first_T[t]] += 1


def layer_statistics(counts_LE: NDArray[np.int64], card: ModelCard) -> pd.DataFrame:
    """The sixteen fields of the guide and what they lack: one row per layer."""
    x_LE = counts_LE.astype(float)
    n_experts, total_L = x_LE.shape[1], x_LE.sum(axis=1)
    used_L = total_L > 0
    mean_L = x_LE.mean(axis=1)
    off_LE = x_LE - mean_L[:, None]
    std_L = np.sqrt((off_LE**2).mean(axis=1))
    q25_L, median_L, q75_L = np.percentile(x_LE, [25, 50, 75], axis=1)
    active_L = (counts_LE > 0).sum(axis=1)
    entropy_L = entropy_bits(counts_LE)
    columns = {
        **layer_columns(card, np.arange(len(counts_LE))),
        "mean": mean_L,
        "std": std_L,
        "coefficient_of_variation": np.nan_to_num(ratio(std_L, mean_L)),
        "entropy_bits": np.where(used_L, entropy_L, 0.0),
        "min_usage": counts_LE.min(axis=1),
        "max_usage": counts_LE.max(axis=1),
        "skewness": ratio((off_LE**3).mean(axis=1), std_L**3),
        "kurtosis": ratio((off_LE**4).mean(axis=1), std_L**4) - 3,
        "median": median_L,
        "q25": q25_L,
        "q75": q75_L,
        "iqr": q75_L - q25_L,
        "active_experts": active_L,
        "expert_diversity": active_L / n_experts,
        "total_usage": counts_LE.sum(axis=1),
        "zero_usage_experts": n_experts - active_L,
        "normalized_entropy": ratio(entropy_L, np.log2(n_experts)),
        "effective_experts": np.exp2(entropy_L),
        "gini": gini(counts_LE),
        "max_over_mean": ratio(x_LE.max(axis=1), mean_L),
        "max_violation": ratio(x_LE.max(axis=1), mean_L) - 1,
        **{f"coverage_{share}": coverage(counts_LE, share) for share in COVERAGES},
    }
    return pd.DataFrame(columns)


def entropy_bits(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Plug-in entropy over the last axis, base 2; NaN where there is nothing."""
    total = counts.sum(axis=-1, keepdims=True).astype(float)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    terms = share * np.log2(share, out=np.zeros(counts.shape), where=share > 0)
    return np.where(total[..., 0] > 0, np.abs(terms.sum(axis=-1)), np.nan)


def gini(counts: NDArray[Any]) -> NDArray[np.float64]:
    """0 = every expert alike, (E-1)/E = one expert takes all; NaN where there is nothing."""
    n = counts.shape[-1]
    weighted = (np.sort(counts, axis=-1) * (2.0 * np.arange(1, n + 1) - n - 1)).sum(axis=-1)
    return ratio(weighted, n * counts.sum(axis=-1))


def coverage(counts_LE: NDArray[np.int64], per_cent: int) -> NDArray[np.float64]:
    """The fewest experts of a layer that hold this share of its choices; NaN where there are none."""
    held_LE = np.cumsum(-np.sort(-counts_LE, axis=1), axis=1)
    total_L = counts_LE.sum(axis=1)
    fewest_L = (100 * held_LE < per_cent * total_L[:, None]).sum(axis=1) + 1.0
    return np.where(total_L > 0, fewest_L, np.nan)


def leading(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The same table with these columns first."""
    return frame[[*names, *(name for name in frame.columns if name not in names)]]


def statistics(trace: Traceable | ExpertCounts) -> pd.DataFrame:
    """Per-layer statistics of a trace, all phases, over all choices and over the first; of counts what they have."""
    if isinstance(trace, ExpertCounts):
        return layer_statistics(trace.counts_LE, trace.card)
    plan = plan_of(trace)
    usage = Usage(plan)
    accumulate(trace, plan, [usage], *plan.recorded("weights"))
    return usage.table()
