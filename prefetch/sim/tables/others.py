"""What may be known before a replay: counted on requests other than those replayed.

It knows no cache. T tokens, L layers, E experts, C = 0 to E experts that a layer's cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.foresight import is_among, keys_of
from prefetch.sim.limits.stacks import LruStacks, OptimalStacks, first_uses
from prefetch.trace.blocks import blocks_of
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader, concat
from prefetch.trace.routing import RoutingTrace, no_expert

NEVER = np.int32(2**31 - 1)


@dataclass(frozen=True, eq=False)
class Others:
    """The rows that are not replayed, read whenever somebody counts them; of the requests in `fitted`, where given."""

    trace: TraceReader | RoutingTrace
    replayed: NDArray[np.int64]  # keys of the rows that are, ascending
    fitted: NDArray[np.int64] | None = None

    @property
    def card(self) -> ModelCard:
        return self.trace.card

    def blocks(self) -> Iterator[RoutingTrace]:
        for block in blocks_of(self.trace):
            is_other_T = ~is_among(keys_of(block.request_T, block.position_T), self.replayed)
            if self.fitted is not None:
                is_other_T &= is_among(block.request_T.astype(np.int64), self.fitted)
            if is_other_T.any():
                yield block.rows(is_other_T)

    def requests(self) -> NDArray[np.int32]:
        numbers = [np.unique(block.request_T) for block in self.blocks()]
        return np.unique(np.concatenate(numbers)) if numbers else np.zeros(0, np.int32)


def replayed_rows(reader: TraceReader, keys: NDArray[np.int64], *recorded: str) -> RoutingTrace:
    """Of a trace the rows with these keys (ascending); the others are read and let go."""
    blocks = list[RoutingTrace]()
    for block in reader.batches(*recorded):
        is_asked_T = is_among(keys_of(block.request_T, block.position_T), keys)
        if is_asked_T.any() or not blocks:  # there may be none at all
            blocks.append(block.rows(is_asked_T))
    return concat(blocks)


def uses_of(others: Others | RoutingTrace) -> NDArray[np.int64]:
    """[L, E] choices of every expert, in rows that ran."""
    card = others.card
    uses_LE = np.zeros((card.n_layers, card.n_experts), np.int64)
    for ids_TLK in _ran(others):
        for layer in range(card.n_layers):
            ids = ids_TLK[:, layer].ravel()
            is_expert = ids != no_expert(card.n_experts)
            uses_LE[layer] += np.bincount(ids[is_expert], minlength=card.n_experts)
    return uses_LE


def most_used(uses_LE: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entries, layer * E + expert, by their use."""
    return np.argsort(-uses_LE.ravel(), kind="stable")


def most_used_of_each(uses_LE: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The entries of the `n` most used experts of every layer, the most used first."""
    entries = most_used(uses_LE)
    place_LE = np.argsort(np.argsort(-uses_LE, axis=1, kind="stable"), axis=1)
    return entries[place_LE.ravel()[entries] < n]


def misses_of(others: Others | RoutingTrace, by: str = "lru") -> NDArray[np.int64]:
    """[L, C] of LRU, or of the optimum, in every layer's own cache, token by token (exact from k experts on)."""
    hist_LD = _lru(others) if by == "lru" else _optimum(others)
    hits_LC = np.zeros_like(hist_LD)
    hits_LC[:, 1:] = hist_LD[:, :-1].cumsum(axis=1)
    misses_LC: NDArray[np.int64] = hist_LD.sum(axis=1, keepdims=True) - hits_LC
    return misses_LC


def _lru(others: Others | RoutingTrace) -> NDArray[np.int64]:
    card = others.card
    lru = LruStacks(card.n_layers, card.n_experts, card.top_k, 1)
    for ids_TLK in _ran(others):
        class_T = np.zeros(len(ids_TLK), np.uint8)
        lru.replay_layers(range(card.n_layers), ids_TLK, class_T, no_expert(card.n_experts))
    return lru.hist_LCD[:, 0]


def _optimum(others: Others | RoutingTrace) -> NDArray[np.int64]:
    """Who knows the future holds it."""
    card, ids_TLK = others.card, np.concatenate(list(_ran(others)))
    nobody, class_T = no_expert(card.n_experts), np.zeros(len(ids_TLK), np.uint8)
    layers = [np.ascontiguousarray(ids_TLK[:, layer]) for layer in range(card.n_layers)]
    first_LE = np.stack([first_uses(ids_TK, card.n_experts, nobody) for ids_TK in layers])
    optimum, never_E = OptimalStacks(first_LE, 1), np.full(card.n_experts, NEVER, np.int32)
    for layer, ids_TK in enumerate(layers):
        optimum.replay(layer, ids_TK, class_T, nobody, first_event=0, coming_E=never_E)
    return optimum.hist_LCD[:, 0]


def _ran(others: Others | RoutingTrace) -> Iterator[NDArray[Any]]:
    """Choices of rows that ran."""
    for block in blocks_of(others) if isinstance(others, RoutingTrace) else others.blocks():
        yield block.ids_TLK[block.executed_T]
