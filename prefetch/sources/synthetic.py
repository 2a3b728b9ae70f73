"""Routing drawn from a process whose best possible prediction is known: for tests, bounds and loads.

Marked synthetic in the provenance; nothing ever mixes it with real routing. It knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.models.architecture import MOST_LAYERS
from prefetch.progress import Progress
from prefetch.sources.source import Source
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, PREFILL, id_dtype, trace_of
from prefetch.trace.writer import TraceWriter

PROCESSES = ("zipf", "sticky", "chain")
BLOCK_CHOICES = 1 << 22
CHAIN_EXPERTS = 256  # its matrices are dense


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """`chain` splits the experts into K groups; choice j walks through group j from layer to layer."""

    process: str = "chain"
    n_requests: int = 200
    prompt_tokens: int = 64
    new_tokens: int = 64
    n_layers: int = 8
    n_experts: int = 32
    top_k: int = 2
    skew: float = 1.0
    stickiness: float = 0.5
    concentration: float = 0.1
    seed: int = 0
    real: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "numba")

    def __post_init__(self) -> None:
        claims = {
            f"process must be one of {PROCESSES}": self.process in PROCESSES,
            "n_requests, n_layers and top_k must be at least 1": min(
                self.n_requests, self.n_layers, self.top_k
            )
            >= 1,
            f"n_layers must be at most {MOST_LAYERS}": self.n_layers <= MOST_LAYERS,
            "seed must not be negative": self.seed >= 0,
            "a request needs at least one token": self.request_tokens >= 1
            and min(self.prompt_tokens, self.new_tokens) >= 0,
            "n_experts must be from top_k to 65535": self.top_k <= self.n_experts <= 65535,
            "stickiness must be from 0 to 1": 0 <= self.stickiness <= 1,
            "skew must be a number from -100 to 100": abs(self.skew) <= 100,
            "concentration must be a positive number": 0 < self.concentration < float("inf"),
            f"a chain may have {CHAIN_EXPERTS} experts": self.process != "chain"
            or self.n_experts <= CHAIN_EXPERTS,
            "a chain needs n_experts divisible by top_k": self.process != "chain"
            or self.n_experts % max(1, self.top_k) == 0,
        }
        self.refuse(claims)

    @property
    def request_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        card = plain_card(
            f"synthetic {self.process}",
            n_experts=self.n_experts,
            top_k=self.top_k,
            layer_numbers=tuple(range(self.n_layers)),
        )
        writer.begin(card)
        rng = np.random.default_rng(self.seed)
        draw = _PROCESSES[self.process](self, rng, writer)
        per_block = max(1, BLOCK_CHOICES // (self.request_tokens * self.n_layers * self.top_k))
        phase = np.repeat([PREFILL, DECODE], [self.prompt_tokens, self.new_tokens])
        ids_TLK = np.empty((0, self.n_layers, self.top_k), id_dtype(self.n_experts))
        with Progress("drawing", self.n_requests * self.request_tokens, "tokens") as progress:
            for first in range(0, self.n_requests, per_block):
                n = min(per_block, self.n_requests - first)
                rows = n * self.request_tokens
                if len(ids_TLK) != rows:
                    ids_TLK = np.empty((rows, *ids_TLK.shape[1:]), ids_TLK.dtype)
                draw(ids_TLK)
                request = np.repeat(np.arange(first, first + n), self.request_tokens)
                writer.append(
                    trace_of(card, ids_TLK.copy(), request_T=request, phase_T=np.tile(phase, n))
                )
                progress.advance(rows)


class Zipf:
    """Independent draws without replacement: the honest null model, with nothing for a predictor to find."""

    def __init__(self, source: Synthetic, rng: np.random.Generator, writer: TraceWriter) -> None:
        log_weight_E = -source.skew * np.log(np.arange(1, source.n_experts + 1))
        weight_E = np.exp(log_weight_E - log_weight_E.max())
        order_LE = np.stack([rng.permutation(source.n_experts) for _ in range(source.n_layers)])
        self.rng = rng
        self.cdf_LE = np.cumsum((weight_E / weight_E.sum())[order_LE], axis=1)

    def __call__(self, ids_TLK: NDArray[Any]) -> None:
        _draw_rows(ids_TLK, self.cdf_LE, 0.0, self.rng)


class Sticky:
    """A token keeps the last token's experts with probability p, else takes a uniform subset, in every layer alike.

    LRU of C slots a layer hits p + (1 - p) C / E of it, for C >= K.
    """

    def __init__(self, source: Synthetic, rng: np.random.Generator, writer: TraceWriter) -> None:
        uniform = np.arange(1, source.n_experts + 1) / source.n_experts
        self.cdf_LE = np.tile(uniform, (source.n_layers, 1))
        self.stickiness, self.rng = source.stickiness, rng

    def __call__(self, ids_TLK: NDArray[Any]) -> None:
        _draw_rows(ids_TLK, self.cdf_LE, self.stickiness, self.rng)


class Chain:
    """The next layer's expert depends on this layer's alone; the matrices are kept beside the trace."""

    def __init__(self, source: Synthetic, rng: np.random.Generator, writer: TraceWriter) -> None:
        size, k = source.n_experts // source.top_k, source.top_k
        first_KG = rng.dirichlet(np.full(size, 1.0), size=k)
        steps_LKGG = rng.dirichlet(
            np.full(size, source.concentration), size=(source.n_layers - 1, k, size)
        )
        self.rng = rng
        self.first_cdf_KG = np.cumsum(first_KG, axis=1)
        self.cdf_LKGG = np.cumsum(steps_LKGG, axis=3)
        transitions_LEE = np.zeros((source.n_layers - 1, source.n_experts, source.n_experts))
        for j in range(k):
            group = slice(j * size, (j + 1) * size)
            transitions_LEE[:, group, group] = steps_LKGG[:, j]
        writer.beside("transitions", {"first_E": first_KG.ravel(), "steps_LEE": transitions_LEE})
        writer.fact("best_recall_at_k", _best_recall(first_KG, steps_LKGG))

    def __call__(self, ids_TLK: NDArray[Any]) -> None:
        _draw_chain(ids_TLK, self.first_cdf_KG, self.cdf_LKGG, self.rng)


_PROCESSES: dict[str, Any] = {"zipf": Zipf, "sticky": Sticky, "chain": Chain}


@njit(cache=True, nogil=True)
def _pick(cdf_E, u):  # type: ignore[no-untyped-def]
    """The first index whose cumulative probability exceeds u."""
    low, high = 0, len(cdf_E) - 1
    while low < high:
        middle = (low + high) // 2
        if cdf_E[middle] > u:
            high = middle
        else:
            low = middle + 1
    return low


@njit(cache=True, nogil=True)
def _is_taken(row_K, j, expert):  # type: ignore[no-untyped-def]
    for i in range(j):  # noqa: SIM110 - numba compiles no generator
        if row_K[i] == expert:
            return True
    return False


@njit(cache=True, nogil=True)
def _pick_among_rest(cdf_E, row_K, j, u):  # type: ignore[no-untyped-def]
    """The same draw without rejection: over the weights that are left, or evenly where none is."""
    weights_E = np.empty(len(cdf_E))
    for expert in range(len(cdf_E)):
        weight = cdf_E[expert] - (cdf_E[expert - 1] if expert else 0.0)
        weights_E[expert] = 0.0 if _is_taken(row_K, j, expert) else weight
    if weights_E.sum() <= 0.0:
        for expert in range(len(cdf_E)):
            weights_E[expert] = 0.0 if _is_taken(row_K, j, expert) else 1.0
    return _pick(np.cumsum(weights_E) / weights_E.sum(), u)


@njit(cache=True, nogil=True)
def _draw_rows(ids_TLK, cdf_LE, stickiness, rng):  # type: ignore[no-untyped-def]
    """Successive draws without replacement; a row repeats the last one with the given chance."""
    n_tokens, n_layers, k = ids_TLK.shape
    for t in range(n_tokens):
        for layer in range(n_layers):
            if t and stickiness > 0.0 and rng.random() < stickiness:
                ids_TLK[t, layer] = ids_TLK[t - 1, layer]
                continue
            for j in range(k):
                for _ in range(16):  # rejection is exact, and fast where no expert takes nearly all
                    expert = _pick(cdf_LE[layer], rng.random())
                    if not _is_taken(ids_TLK[t, layer], j, expert):
                        break
                else:
                    expert = _pick_among_rest(cdf_LE[layer], ids_TLK[t, layer], j, rng.random())
                ids_TLK[t, layer, j] = expert


@njit(cache=True, nogil=True)
def _draw_chain(ids_TLK, first_cdf_KG, cdf_LKGG, rng):  # type: ignore[no-untyped-def]
    n_tokens, n_layers, k = ids_TLK.shape
    size = first_cdf_KG.shape[1]
    for t in range(n_tokens):
        for j in range(k):
            state = _pick(first_cdf_KG[j], rng.random())
            ids_TLK[t, 0, j] = j * size + state
            for layer in range(1, n_layers):
                state = _pick(cdf_LKGG[layer - 1, j, state], rng.random())
                ids_TLK[t, layer, j] = j * size + state


def _best_recall(first_KG: NDArray[np.float64], steps_LKGG: NDArray[np.float64]) -> float:
    """Expected recall@K of the best guess for the next layer, mean over layer pairs: exact, no sampling."""
    k, state_KG, recalls = len(first_KG), first_KG, []
    for rows_KGG in steps_LKGG:
        recalls.append(_expected_top(rows_KGG, state_KG, k) / k)
        state_KG = np.einsum("kg,kgh->kh", state_KG, rows_KGG)
    return float(np.mean(recalls)) if recalls else 0.0


def _expected_top(
    rows_KGG: NDArray[np.float64], state_KG: NDArray[np.float64], width: int
) -> float:
    """E[sum of the `width` largest of K independently chosen rows' values] = ∫ E[min(width, N(x))] dx.

    N(x), the number of values above x, is a sum of K independent counts, so its distribution is a convolution.
    """
    values = np.unique(np.append(rows_KGG.ravel(), 0.0))
    size = rows_KGG.shape[2]
    total_VN = np.ones((len(values), 1))  # N is clamped at `width`: more above x does not matter
    for rows_GG, state_G in zip(rows_KGG, state_KG, strict=True):
        one_VN = np.zeros((len(values), width + 1))
        for row, chance in zip(rows_GG, state_G, strict=True):
            above_V = size - np.searchsorted(np.sort(row), values, side="right")
            one_VN[np.arange(len(values)), np.minimum(above_V, width)] += chance
        both_VN = np.zeros((len(values), width + 1))
        for n in range(width + 1):
            for m in range(total_VN.shape[1]):
                both_VN[:, min(n + m, width)] += one_VN[:, n] * total_VN[:, m]
        total_VN = both_VN
    expected_V = total_VN @ np.arange(width + 1)
    return float(expected_V[:-1] @ np.diff(values))
