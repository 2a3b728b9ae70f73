"""All numbers that sentences and recommendations are made from, and what is computed from several of them.

It measures nothing and says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from prefetch.engine.profiling.copies import CopyFit
from prefetch.engine.profiling.operations import BESIDE, OURS, WITHIN
from prefetch.engine.profiling.rows import CELL, Rows
from prefetch.engine.profiling.utilisation import DRAWN
from prefetch.engine.profiling.work import COMBINE, DISPATCH, EXPERTS, LAYER, ROUTER
from prefetch.models.hf import DTYPES


@dataclass(frozen=True)
class Told:
    """Everything that sentences are made from."""

    rows: Rows
    limits: pd.DataFrame
    utilisation: pd.DataFrame
    copy: CopyFit
    copy_kind: str
    room_bytes: int
    device: str
    skew: float

    @property
    def expert_bytes(self) -> int:
        sizes = self.rows.sizes
        item_bytes = getattr(torch, DTYPES[sizes["dtype"]]).itemsize
        return int(3 * sizes["hidden"] * sizes["inner"] * item_bytes)


def of_headline(told: Told) -> pd.DataFrame:
    """The limits of the headline's layer."""
    here = told.limits
    for name, value in told.rows.sizes.items():
        here = here[here[name] == value]
    return here


def drawn_of_headline(told: Told) -> pd.DataFrame:
    """What was drawn for the headline's experts, at the most tokens: of few, hardly anybody is chosen twice."""
    sizes, drawn = told.rows.sizes, told.utilisation[told.utilisation.kind == DRAWN]
    is_here = (drawn.experts == sizes["experts"]) & (drawn.top_k == sizes["top_k"])
    return drawn[is_here & (drawn.tokens == told.rows.large)]


def skewed(rows: Rows) -> pd.DataFrame:
    """Our layers under Zipf routing beside the same ones under uniform routing."""
    keys = [name for name in CELL if name != "routing"]
    ours = rows.of(LAYER, OURS)[[*keys, "routing", "median_ns"]]
    even, uneven = (ours[ours.routing == name] for name in ("uniform", "zipf"))
    pairs = even.merge(uneven, on=keys, suffixes=("_uniform", "_zipf"))
    return pairs.assign(ratio=(pairs.median_ns_zipf / pairs.median_ns_uniform).astype(float))


def shares(rows: Rows, tokens: int) -> dict[str, float]:
    """Of our layer's time at so many tokens. Dispatch is told apart where it runs within the experts' call."""
    whole = rows.one(LAYER, tokens)
    if whole is None:
        return {}
    found = {part: rows.one(part, tokens) for part in (ROUTER, DISPATCH, EXPERTS, COMBINE)}
    ns = {
        part: float(row.median_ns)
        for part, row in found.items()
        if row is not None and row.place in (BESIDE, WITHIN)
    }
    if EXPERTS in ns and DISPATCH in ns:
        ns[EXPERTS] = max(0.0, ns[EXPERTS] - ns[DISPATCH])
    return {part: part_ns / float(whole.median_ns) for part, part_ns in ns.items()}


def weight_share(told: Told, layer_row: pd.Series) -> float:
    return float(layer_row.distinct_experts * told.expert_bytes / layer_row.bytes)


def layers_per_copy(told: Told) -> float:
    """How many of our layers, at the fewest tokens, run while one expert is copied."""
    one = told.rows.one(LAYER, told.rows.small)
    return float("nan") if one is None else told.copy.ns(told.expert_bytes) / float(one.median_ns)
