"""Recorded routing in steps as large as the profile's: which experts each step needed, and what unevenness costs.

It knows no profile. S steps, L layers, E experts, R ranks that experts are cut over. The balanced twin
of a step has as many choices, spread as evenly as whole numbers allow, so that every number here can be had by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.device.roofline import BYTES, Peaks, arithmetic_of
from analysis.device.shapes import Shape
from analysis.device.steps import Steps, steps_of
from prefetch.sim.hardware import NS_PER_S
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import no_expert

RANKS = (2, 4, 8)  # that dispatch is counted for


@dataclass(frozen=True, eq=False)
class StepRouting:
    """Choices of every expert in every step, before any capacity."""

    card: ModelCard
    counts_SLE: NDArray[np.int64]
    sent_R: Mapping[
        int, tuple[float, float]
    ]  # ranks -> tokens sent in a step: once per rank, per choice
    steps: Steps
    is_decode: bool  # a step holds one token of as many requests, else consecutive tokens
    source: str

    @property
    def tokens(self) -> int:
        return self.steps.tokens

    @property
    def active(self) -> float:
        """Experts that a layer needed in a step, mean."""
        return float((self.counts_SLE > 0).sum(axis=2).mean())

    @property
    def counts_LE(self) -> NDArray[np.int64]:
        return np.asarray(self.counts_SLE.sum(axis=0))

    def loads(self, ranks: int) -> NDArray[np.float64]:
        """[S, L, R] choices of each rank, where experts lie in blocks of their ids."""
        shape = (*self.counts_SLE.shape[:2], ranks, -1)
        return self.counts_SLE.reshape(shape).sum(axis=3).astype(float)

    def max_over_mean(self, ranks: int) -> float:
        load_SLR = self.loads(ranks)
        mean_SL = load_SLR.mean(axis=2)
        used = mean_SL > 0
        return float((load_SLR.max(axis=2)[used] / mean_SL[used]).mean())

    def sent(self, ranks: int) -> tuple[float, float]:
        """Tokens that leave their rank in a step, over all layers: once per rank that needs them; per choice."""
        return self.sent_R[ranks]

    def padding(self, tile: int) -> float:
        """Rows that a kernel computes over rows that were asked for, where each expert's begin a new tile."""
        padded = -(-self.counts_SLE // tile) * tile
        return float(padded.sum() / self.counts_SLE.sum())


def step_routing(
    trace: Traceable, tokens: int, *, is_decode: bool, source: str = ""
) -> StepRouting:
    """Whole steps only."""
    steps = steps_of(trace, tokens, is_decode=is_decode, source=source)
    card, ids_TLK = steps.rows.card, steps.rows.ids_TLK
    n_steps = len(ids_TLK) // tokens
    counts_SLE = count_steps(ids_TLK, n_steps, card.n_experts)
    sent = {}
    for ranks in (ranks for ranks in RANKS if card.n_experts % ranks == 0):
        once, each = sent_tokens(ids_TLK, card.n_experts, ranks)
        sent[ranks] = once / n_steps, each / n_steps
    return StepRouting(card, counts_SLE, sent, steps, is_decode, source)


def sent_tokens(ids_TLK: NDArray[np.integer], n_experts: int, ranks: int) -> tuple[float, float]:
    """Tokens lie round-robin on the ranks, experts in blocks of their ids: no trace tells where tokens really lie."""
    home_T1 = (np.arange(len(ids_TLK)) % ranks)[:, None]
    once = each = 0
    for layer in range(ids_TLK.shape[1]):
        ids = ids_TLK[:, layer].astype(np.int64)
        rank_TK = np.where(ids == no_expert(n_experts), home_T1, ids // (n_experts // ranks))
        is_away_TK = rank_TK != home_T1
        each += int(is_away_TK.sum())
        for rank in range(ranks):
            once += int(((rank_TK == rank) & is_away_TK).any(axis=1).sum())
    return float(once), float(each)


def count_steps(ids_TLK: NDArray[np.integer], n_steps: int, n_experts: int) -> NDArray[np.int64]:
    n_rows, n_layers, _ = ids_TLK.shape
    step_T = np.arange(n_rows) // (n_rows // n_steps)
    counts = np.zeros((n_layers, n_steps * n_experts), np.int64)
    for layer in range(n_layers):
        ids = ids_TLK[:, layer].astype(np.int64)
        there = ids != no_expert(n_experts)
        place = step_T[:, None] * n_experts + ids
        counts[layer] = np.bincount(place[there], minlength=n_steps * n_experts)
    return counts.reshape(n_layers, n_steps, n_experts).transpose(1, 0, 2)


@dataclass(frozen=True)
class Imbalance:
    """Time of the expert products of one step over all layers, at the roofline, slowest rank."""

    ranks: int
    actual_ns: float
    balanced_ns: float
    max_over_mean: float

    @property
    def cost_ns(self) -> float:
        """Negative where uneven routing is cheaper: fewer experts are read."""
        return self.actual_ns - self.balanced_ns

    @property
    def cost_share(self) -> float:
        return self.cost_ns / self.balanced_ns if self.balanced_ns else 0.0


def imbalance(
    routing: StepRouting, shape: Shape, peaks: Peaks, ranks: int = 1, tile: int = 1
) -> Imbalance:
    """What the recorded routing costs beyond its balanced twin, mean over steps."""
    twin_SLE = balanced_twin(routing.counts_SLE)
    actual, balanced = (
        float(slowest_ns(counts, shape, peaks, ranks, tile).sum(axis=1).mean())
        for counts in (routing.counts_SLE, twin_SLE)
    )
    return Imbalance(ranks, actual, balanced, routing.max_over_mean(ranks))


def balanced_twin(counts_SLE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The remainder goes to experts that are evenly spaced, so that no rank gets all of it."""
    n_experts = counts_SLE.shape[2]
    total_SL1 = counts_SLE.sum(axis=2, keepdims=True)
    place_E = np.arange(n_experts)
    twin: NDArray[np.int64] = (
        place_E + 1
    ) * total_SL1 // n_experts - place_E * total_SL1 // n_experts
    return twin


def slowest_ns(
    counts_SLE: NDArray[np.int64], shape: Shape, peaks: Peaks, ranks: int, tile: int
) -> NDArray[np.float64]:
    """[S, L] the longer of the operations and the weights of both products, of the rank that takes longest."""
    hidden, inner = float(shape.hidden or 0), float(shape.inner or 0)
    weight, matrices = shape.weight or "bf16", 3 if shape.gated else 2
    b_w = BYTES[weight] + shape.scale_bytes
    rate = rate_of(shape, peaks)
    assert rate is not None, "whoever asks has checked"
    padded_SLE = -(-counts_SLE // tile) * tile
    by_rank = (*counts_SLE.shape[:2], ranks, -1)
    rows_SLR = padded_SLE.reshape(by_rank).sum(axis=3)
    active_SLR = (counts_SLE > 0).reshape(by_rank).sum(axis=3)
    compute_SLR = rows_SLR * (2 * hidden * inner * matrices / rate)
    weights_SLR = active_SLR * (hidden * inner * matrices * b_w / peaks.bytes_per_s)
    return np.asarray(np.maximum(compute_SLR, weights_SLR).max(axis=2) * NS_PER_S)


def rate_of(shape: Shape, peaks: Peaks) -> float | None:
    """Operations per second of the expert products; None where the device has no rate for their type."""
    found = peaks.rate(arithmetic_of(shape.weight or "bf16", shape.activation or "bf16"))
    return found[0] if found else None


def fits(trace_card: ModelCard, experts: int | None, top_k: int | None) -> str:
    """Why routing cannot be that of the profiled model; empty where it can."""
    for name, found, wanted in (
        ("experts", trace_card.n_experts, experts),
        ("choices per token", trace_card.top_k, top_k),
    ):
        if wanted is not None and found != wanted:
            return (
                f"the trace's model {trace_card.name} has {found} {name}, the profiled one {wanted}"
            )
    return ""


def ranks_to_show(n_experts: int, given: int | None) -> Sequence[int]:
    wanted = (given,) if given and given > 1 else (1, 2, 4, 8)
    return [ranks for ranks in wanted if n_experts % ranks == 0]
