"""How often each expert was used, out of a trace, in the shapes in which others keep counts.

JSON as `source=counts` documents it, npz, specMoE's dense and sparse statistics (cyanmishra92/specMoE at 79521e5), and
Expertflow's locality file with its families (crankysmh47/Expertflow at b6b5f45b), which are our domains. All are read
back by `source=counts`. D domains, L layers, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.progress import Progress
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.describe import UNKNOWN
from prefetch.trace.exports.zips import write_arrays
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace, no_expert

Table = dict[str, Any]


@dataclass(frozen=True)
class Counted:
    """The choices of the rows that ran. `events_DL` are the rows that chose an expert at the layer."""

    counts: ExpertCounts
    domains: tuple[str, ...]
    counts_DLE: NDArray[np.int64]
    events_DL: NDArray[np.int64]
    n_not_executed: int = 0


def count_experts(reader: TraceReader) -> Counted:
    """One pass over the choices."""
    card, n_domains = reader.card, len(reader.domains) + 1
    counts_DLE = np.zeros((n_domains, card.n_layers, card.n_experts), np.int64)
    events_DL = np.zeros((n_domains, card.n_layers), np.int64)
    n_not_executed = 0
    with Progress("counting", reader.n_tokens, "tokens") as progress:
        for block in reader.batches():
            n_not_executed += int((~block.executed_T).sum())
            _add(block.rows(block.executed_T), counts_DLE, events_DL)
            progress.advance(block.n_tokens)
    counts = ExpertCounts(card, counts_DLE.sum(axis=0), reader.provenance)
    return Counted(counts, (*reader.domains, UNKNOWN), counts_DLE, events_DL, n_not_executed)


def _add(block: RoutingTrace, counts_DLE: NDArray[Any], events_DL: NDArray[Any]) -> None:
    n_experts = block.card.n_experts
    for d in np.unique(block.domain_T).tolist():  # -1 is the last
        ids_TLK = block.ids_TLK[block.domain_T == d]
        chosen_TLK = ids_TLK != no_expert(n_experts)
        events_DL[d] += chosen_TLK.any(axis=2).sum(axis=0)
        for layer in range(block.card.n_layers):
            ids = ids_TLK[:, layer][chosen_TLK[:, layer]]
            counts_DLE[d, layer] += np.bincount(ids, minlength=n_experts)


def alone(counts: ExpertCounts) -> Counted:
    """Counts that never had an order, nor domains."""
    counts_DLE = counts.counts_LE[None]
    return Counted(counts, (UNKNOWN,), counts_DLE, counts_DLE.sum(axis=2) // counts.card.top_k)


def write_json(counted: Counted, path: Path) -> None:
    card, counts_LE = counted.counts.card, counted.counts.counts_LE
    layers = dict(zip(_layers(card), counts_LE.tolist(), strict=True))
    _dump(
        path,
        {"model": card.name, "num_experts": card.n_experts, "top_k": card.top_k, "counts": layers},
    )


def write_npz(counted: Counted, path: Path) -> None:
    card = counted.counts.card
    numbers = np.array([int(name) for name in _layers(card)], np.int64)
    write_arrays(path, {"counts": counted.counts.counts_LE, "layer_ids": numbers})


def write_specmoe_dense(counted: Counted, path: Path) -> None:
    """`expert_statistics_3d.json` without the time at which it was made."""
    card, counts_LE = counted.counts.card, counted.counts.counts_LE
    usage = {
        name: {str(e): n for e, n in enumerate(row)}
        for name, row in zip(_layers(card), counts_LE.tolist(), strict=True)
    }
    analysis = {
        name: {**_summary(row_E), "entropy": _bits(row_E), "top_5_experts": _top(row_E)}
        for name, row_E in zip(_layers(card), counts_LE, strict=True)
    }
    head = _specmoe_head(card)
    _dump(path, {**head, "expert_usage_by_layer": usage, "layer_analysis": analysis})


def write_specmoe_sparse(counted: Counted, path: Path) -> None:
    """`proper_3d_statistics.json`: zeros are left out."""
    card, counts_LE = counted.counts.card, counted.counts.counts_LE
    statistics = {
        name: {str(e): n for e, n in enumerate(row) if n}
        for name, row in zip(_layers(card), counts_LE.tolist(), strict=True)
    }
    summaries = {
        name: _summary(row_E) for name, row_E in zip(_layers(card), counts_LE, strict=True)
    }
    about = {**_specmoe_head(card), "num_layers": card.n_layers}
    _dump(path, {**about, "statistics": statistics, "layer_summaries": summaries})


def write_locality(counted: Counted, path: Path) -> None:
    """Frequencies, for all rows and for every domain; the other figures of such a file need the order."""
    card = counted.counts.card
    if (counted.counts_DLE.sum(axis=2) != counted.events_DL * card.top_k).any():
        raise FormatError(
            f"{card.name}: some tokens have fewer than k={card.top_k} choices, which a locality file cannot say; "
            "choose the format counts"
        )
    families = {
        name: _locality(card, counted.counts_DLE[d], counted.events_DL[d])
        for d, name in enumerate(counted.domains)
        if counted.counts_DLE[d].any()
    }
    events_L = counted.events_DL.sum(axis=0)
    everything = _locality(card, counted.counts.counts_LE, events_L)
    head = {"model": card.name, "num_experts": card.n_experts}
    _dump(path, {**head, "all_workloads": everything, "by_family": families})


def _locality(card: ModelCard, counts_LE: NDArray[Any], events_L: NDArray[Any]) -> Table:
    return {
        name: {
            "event_count": int(events_L[layer]),
            "expert_demand_count": int(counts_LE[layer].sum()),
            "frequency": {str(e): n for e, n in enumerate(counts_LE[layer].tolist()) if n},
        }
        for layer, name in enumerate(_layers(card))
        if events_L[layer]
    }


def _specmoe_head(card: ModelCard) -> Table:
    return {
        "format": "3D_layer_expert_frequency",
        "dimensions": ["layer", "expert", "frequency"],
        "num_experts": card.n_experts,
        "layers": [int(name) for name in _layers(card)],
    }


def _summary(row_E: NDArray[Any]) -> Table:
    active = int((row_E > 0).sum())
    share = 100.0 * active / len(row_E)
    return {
        "active_experts": active,
        "diversity_percentage": share,
        "total_usage": int(row_E.sum()),
    }


def _bits(row_E: NDArray[Any]) -> float:
    """Zero for a layer that saw no token."""
    shares = row_E[row_E > 0] / max(1, row_E.sum())
    return float(abs(-(shares * np.log2(shares)).sum()))


def _top(row_E: NDArray[Any]) -> list[list[Any]]:
    best = np.argsort(-row_E, kind="stable")[:5]
    return [[str(e), int(row_E[e])] for e in best.tolist()]


def _layers(card: ModelCard) -> list[str]:
    """The model's own layer numbers, which must be enough to tell layers apart."""
    if len(set(card.layer_numbers)) < card.n_layers:
        raise FormatError(
            f"{card.name}: two layers have the same number; take one stack with traces.do=subset traces.layers=..."
        )
    return [str(number) for number in card.layer_numbers]


def _dump(path: Path, about: Table) -> None:
    path.write_text(json.dumps(about, indent=1) + "\n")


def cannot(counted: Counted, format: str) -> list[str]:
    """What the counts do not hold, a line each."""
    card = counted.counts.card
    lines = ["not held: order, requests, phases, weights, tokens: counts say how often, not when"]
    if counted.n_not_executed:
        lines.append(f"left out: {counted.n_not_executed} rows that were not executed")
    reader = "llama_imatrix" if format == "imatrix" else "counts"
    if format != "locality":
        lines.append(f"read back with source={reader} source.top_k={card.top_k}")
        if len(counted.domains) > 1:
            lines.append("domains are added up; format=locality keeps them as families")
    else:
        lines.append("read back with source=counts, one domain of it with source.family=NAME")
    if format.startswith("specmoe") and card.top_k > 1:
        lines.append(
            f"specMoE counts the best expert of a token alone; these are all k={card.top_k} choices"
        )
    return lines
