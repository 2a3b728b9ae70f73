"""How evenly experts are used: in the routing that was drawn for the grid, and in a trace, where the store holds one.

It times nothing, and never collects a trace.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefetch import leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.profiling.grid import Cell
from prefetch.engine.profiling.measure import dropped_share
from prefetch.errors import PrefetchError
from prefetch.trace.parquet import TraceReader

log = logging.getLogger(__name__)
DRAWN, TRACE = "drawn", "trace"
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Load:
    """Choices of every expert, of one layer."""

    source: str  # uniform, zipf, or the trace's model
    layer: int | None  # of a trace
    tokens: int
    top_k: int
    counts_E: Counts

    @property
    def shares_E(self) -> NDArray[np.float64]:
        """The most used expert first."""
        return np.sort(self.counts_E)[::-1] / max(1, self.counts_E.sum())

    def row(self) -> dict[str, Any]:
        """An even use is a busiest expert of 1 x the mean, and an entropy of 1."""
        shares = self.shares_E
        used = shares[shares > 0]
        entropy = (
            float(-(used * np.log(used)).sum() / np.log(len(shares))) if len(shares) > 1 else 1.0
        )
        return {
            "source": self.source,
            "layer": self.layer,
            "tokens": self.tokens,
            "experts": len(shares),
            "top_k": self.top_k,
            "busiest_share": float(shares[0]),
            "busiest_times_mean": float(shares[0] * len(shares)),
            "idle_share": float((self.counts_E == 0).mean()),
            "entropy": entropy,
        }


def drawn(counts: Mapping[Cell, Tensor]) -> list[tuple[Cell, Load]]:
    """Of every different routing that was timed: number types and sizes do not change it."""
    found = dict[Any, tuple[Cell, Load]]()
    for cell, counts_E in counts.items():
        key = cell.tokens, cell.experts, cell.top_k, cell.routing
        load = Load(cell.routing, None, cell.tokens, cell.top_k, counts_E.numpy())
        found.setdefault(key, (cell, load))
    return list(found.values())


def of_trace(cfg: Config, store: Store) -> list[Load]:
    """Of the trace that the configuration names, if it is there: a load per layer."""
    try:
        recipe = leaves.locate(cfg.makers[TRACE])(cfg)
        if not store.has(recipe):
            return []
        made = store.make(recipe)
    except PrefetchError as error:
        if cfg.trace is not None:
            raise
        log.info("no trace is looked at: %s", error)
        return []
    return _loads(TraceReader(made.folder))


def _loads(reader: TraceReader) -> list[Load]:
    card, n_tokens = reader.card, 0
    counts_LE = np.zeros((card.n_layers, card.n_experts + 1), np.int64)
    for block in reader.batches():
        ids_TLK = block.ids_TLK[block.executed_T]
        n_tokens += len(ids_TLK)
        for layer in range(card.n_layers):
            ids = np.minimum(ids_TLK[:, layer].ravel().astype(np.int64), card.n_experts)
            counts_LE[layer] += np.bincount(ids, minlength=card.n_experts + 1)
    return [
        Load(card.name, number, n_tokens, card.top_k, counts_LE[layer, :-1])
        for layer, number in enumerate(card.layer_numbers)
        if counts_LE[layer, :-1].any()
    ]


def table_of(drawn_: list[tuple[Cell, Load]], traced: list[Load], factor: float) -> pd.DataFrame:
    """A row per load; of what was drawn also which share of its choices finds no seat in the dense baseline."""
    rows = []
    for cell, load in drawn_:
        counts_E = torch.from_numpy(load.counts_E)
        rows.append(
            {**load.row(), "kind": "drawn", "dropped_share": dropped_share(counts_E, cell, factor)}
        )
    rows += [{**load.row(), "kind": TRACE, "dropped_share": None} for load in traced]
    table = pd.DataFrame(rows)
    return table.astype({"layer": "Int64", "dropped_share": "Float64"})
