"""What may be known before a replay: counted on requests other than those replayed.

It knows no cache. T tokens, L layers, E experts, C = 0 to E experts that a layer's cache holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.stacks import LruStacks, OptimalStacks, first_uses
from prefetch.trace.routing import RoutingTrace, no_expert

NEVER = np.int32(2**31 - 1)


def uses_of(others: RoutingTrace) -> NDArray[np.int64]:
    """[L, E] choices of every expert, in rows that ran."""
    ids_TLK, n_experts = others.ids_TLK[others.executed_T], others.card.n_experts
    uses_LE = np.zeros((others.card.n_layers, n_experts), np.int64)
    for layer in range(others.card.n_layers):
        ids = ids_TLK[:, layer].ravel()
        uses_LE[layer] = np.bincount(ids[ids != no_expert(n_experts)], minlength=n_experts)
    return uses_LE


def most_used(uses_LE: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entries, layer * E + expert, by their use."""
    return np.argsort(-uses_LE.ravel(), kind="stable")


def most_used_of_each(uses_LE: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The entries of the `n` most used experts of every layer, the most used first."""
    entries = most_used(uses_LE)
    place_LE = np.argsort(np.argsort(-uses_LE, axis=1, kind="stable"), axis=1)
    return entries[place_LE.ravel()[entries] < n]


def misses_of(others: RoutingTrace, by: str = "lru") -> NDArray[np.int64]:
    """[L, C] of LRU, or of the optimum, in every layer's own cache, token by token (exact from k experts on)."""
    ids_TLK, card = others.ids_TLK[others.executed_T], others.card
    nobody, class_T = no_expert(card.n_experts), np.zeros(len(ids_TLK), np.uint8)
    layers = [np.ascontiguousarray(ids_TLK[:, layer]) for layer in range(card.n_layers)]
    if by == "lru":
        lru = LruStacks(card.n_layers, card.n_experts, card.top_k, 1)
        for layer, ids_TK in enumerate(layers):
            lru.replay(layer, ids_TK, class_T, nobody)
        hist_LD = lru.hist_LCD[:, 0]
    else:
        first_LE = np.stack([first_uses(ids_TK, card.n_experts, nobody) for ids_TK in layers])
        optimum, never_E = OptimalStacks(first_LE, 1), np.full(card.n_experts, NEVER, np.int32)
        for layer, ids_TK in enumerate(layers):
            optimum.replay(layer, ids_TK, class_T, nobody, first_event=0, coming_E=never_E)
        hist_LD = optimum.hist_LCD[:, 0]
    hits_LC = np.zeros_like(hist_LD)
    hits_LC[:, 1:] = hist_LD[:, :-1].cumsum(axis=1)
    misses_LC: NDArray[np.int64] = hist_LD.sum(axis=1, keepdims=True) - hits_LC
    return misses_LC
