"""What a cache of every size would hit, layer by layer: least recently used, and the best that any cache could do.

It knows no time and no bytes. One cache per layer serves all requests in turn; an event is one token at one layer,
whose K experts are looked up together (see prefetch.sim.limits.stacks). Prefill rows are replayed token by token
("teacher-forced"), although a real prefill needs the union over its tokens.
L layers, E experts, C capacities, B batches, D distances.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from prefetch.errors import MissingData
from prefetch.sim.limits.stacks import (
    MOST_EVENTS,
    NEVER,
    LruStacks,
    OptimalStacks,
    first_uses,
    fit_eight,
)
from prefetch.trace.blocks import BLOCK_ROWS, Traceable
from prefetch.trace.routing import PHASES

FIRST_USE = -1  # the distance in a table of an access that nothing came before
ROUNDING = 1e-9  # 0.55 * 100 is a little over 55


class ReuseDistances:
    """How many other experts a layer used since an expert's last use: an LRU cache of more than that many hits."""

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        self.plan = plan
        self.stacks = LruStacks(card.n_layers, card.n_experts, card.top_k, len(PHASES))

    def add(self, batch: Batch) -> None:
        ids_LTK, phase_T, nobody = batch.ids_LTK, batch.block.phase_T, batch.nobody
        for_layers(
            lambda layer: self.stacks.replay(layer, ids_LTK[layer], phase_T, nobody), len(ids_LTK)
        )

    def merge(self, later: ReuseDistances) -> None:
        self.stacks.merge(later.stacks)


class FirstUses:
    """The first of the two passes that the optimum takes: which row of every batch first needs each expert.

    Four bytes per batch, layer and expert: a thousandth of the trace at the usual size of a batch.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows_B: list[int] = []
        self.first_BLE: list[NDArray[np.int32]] = []

    def add(self, batch: Batch) -> None:
        ids_LTK, n_experts = batch.ids_LTK, self.plan.card.n_experts
        first_LE = for_layers(
            lambda layer: first_uses(ids_LTK[layer], n_experts, batch.nobody), len(ids_LTK)
        )
        self.rows_B.append(batch.block.n_tokens)
        self.first_BLE.append(np.stack(first_LE))

    def merge(self, later: FirstUses) -> None:
        self.rows_B += later.rows_B
        self.first_BLE += later.first_BLE

    def coming(self) -> NDArray[np.int32]:
        """[B + 1, L, E]: before every batch and after the last, the row that next needs each expert."""
        card, n_batches = self.plan.card, len(self.rows_B)
        coming_BLE = np.full((n_batches + 1, card.n_layers, card.n_experts), NEVER, np.int32)
        first_row = sum(self.rows_B)
        for b in range(n_batches - 1, -1, -1):
            first_row -= self.rows_B[b]
            first_LE = self.first_BLE[b]
            coming_BLE[b] = np.where(first_LE == NEVER, coming_BLE[b + 1], first_LE + first_row)
        return coming_BLE


class OptimalCurve:
    """The second pass, over the same batches: hits of the cache that evicts whoever is needed last.

    It cannot be cut in time, and layers share nothing: a cluster gives every machine some layers of all rows.
    """

    def __init__(self, plan: Plan, first: FirstUses) -> None:
        if sum(first.rows_B) >= MOST_EVENTS:
            raise MissingData(f"the optimum numbers the rows of a trace up to {MOST_EVENTS}")
        self.plan = plan
        self._rows_B = first.rows_B
        self._coming_BLE = first.coming()
        self.stacks = OptimalStacks(self._coming_BLE[0], len(PHASES))
        self._batch = 0
        self._first_row = 0
        self._layers: range | None = None  # None = all

    def of_layers(self, layers: range) -> OptimalCurve:
        """The same about some layers, from the first row on."""
        some = copy.copy(self)
        some._layers = layers
        some._coming_BLE = self._coming_BLE[:, layers.start : layers.stop]
        some.stacks = OptimalStacks(some._coming_BLE[0], len(PHASES))
        return some

    def take(self, layers: range, hist_LCD: NDArray[np.int64]) -> None:
        """What was counted of them elsewhere."""
        self.stacks.hist_LCD[layers.start : layers.stop] = hist_LCD

    def _ids(self, batch: Batch) -> NDArray[Any]:
        if self._layers is None:
            return batch.ids_LTK
        ids_TLK = batch.block.ids_TLK[:, self._layers.start : self._layers.stop]
        return np.ascontiguousarray(ids_TLK.transpose(1, 0, 2))

    def add(self, batch: Batch) -> None:
        b, rows = self._batch, batch.block.n_tokens
        if b >= len(self._rows_B) or rows != self._rows_B[b]:
            raise ValueError(f"batch {b} of {rows} rows is not one of those of the first pass")
        ids_LTK, phase_T, nobody = self._ids(batch), batch.block.phase_T, batch.nobody
        first, coming_LE, n_layers = self._first_row, self._coming_BLE[b + 1], len(ids_LTK)

        def replay(layer: int) -> None:
            one = self.stacks.replay
            one(
                layer, ids_LTK[layer], phase_T, nobody,
                first_event=first, coming_E=coming_LE[layer],
            )  # fmt: skip

        def replay_eight(group: int) -> None:
            at, eight = 8 * group, self.stacks.replay_eight
            eight(at, ids_LTK[at : at + 8], phase_T, nobody, first_event=first, coming_LE=coming_LE)

        if fit_eight(ids_LTK, nobody):
            for_layers(replay_eight, -(-n_layers // 8))
        else:
            for_layers(replay, n_layers)
        self._batch += 1
        self._first_row += rows

    def merge(self, later: OptimalCurve) -> None:
        raise ValueError(
            "the optimum looks ahead: it runs through the trace in order; only its layers can be shared out"
        )


def cache_curves(reuse: ReuseDistances, optimal: OptimalCurve | None = None) -> pd.DataFrame:
    """One row per phase, layer and capacity from K to E experts.

    accesses: choices; cold: those of an expert that the layer had not used before, which no cache without prefetch
    can hit. Rates are hits over accesses, cold ones included: NaN in a layer without any.
    """
    if optimal is not None and not _same_accesses(reuse, optimal):
        raise ValueError("the two curves have not seen the same rows")
    return pd.concat(
        [_curves(reuse, optimal, phase) for phase in reuse.plan.phases], ignore_index=True
    )


def _curves(reuse: ReuseDistances, optimal: OptimalCurve | None, phase: str) -> pd.DataFrame:
    card = reuse.plan.card
    capacity_C = np.arange(card.top_k, card.n_experts + 1)
    hist_LD = _of_phase(reuse.stacks.hist_LCD, phase)
    layers = np.repeat(np.arange(card.n_layers), len(capacity_C))
    accesses = hist_LD.sum(axis=1)[layers]
    columns = {
        "phase": phase,
        **layer_columns(card, layers),
        "capacity": np.tile(capacity_C, card.n_layers),
        "share": np.tile(capacity_C / card.n_experts, card.n_layers),
        "accesses": accesses,
        "cold": hist_LD[layers, -1],
    }
    found = {"lru": hist_LD}
    if optimal is not None:
        found["optimal"] = _of_phase(optimal.stacks.hist_LCD, phase)
    for name, hist_LD in found.items():
        hits = hist_LD.cumsum(axis=1)[:, capacity_C - 1].ravel()
        columns[f"{name}_hits"] = hits
        columns[f"{name}_hit_rate"] = np.where(accesses > 0, hits / np.maximum(accesses, 1), np.nan)
    return pd.DataFrame(columns)


def reuse_distances(reuse: ReuseDistances) -> pd.DataFrame:
    """One row per phase, layer and distance that occurred, with its count; distance -1 is an expert's first use.

    Distance 0 is the choice that the row before listed last. An LRU cache of C >= K experts hits all distances under C.
    """
    return pd.concat([_distances(reuse, phase) for phase in reuse.plan.phases], ignore_index=True)


def _distances(reuse: ReuseDistances, phase: str) -> pd.DataFrame:
    hist_LD = np.roll(_of_phase(reuse.stacks.hist_LCD, phase), 1, axis=1)  # first uses first
    layers, places = np.nonzero(hist_LD)
    return pd.DataFrame(
        {
            "phase": phase,
            **layer_columns(reuse.plan.card, layers),
            "distance": places + FIRST_USE,
            "count": hist_LD[layers, places],
        }
    )


def capacity_for(curves: pd.DataFrame, share: float = 0.9) -> pd.DataFrame:
    """Per phase and layer the fewest experts that hold this share of the accesses, as a count and as a share of all.

    NaN where no capacity does: first uses miss in every cache.
    """
    keys = ["phase", *(name for name in ("stack", "layer") if name in curves)]
    groups = curves.groupby(keys, sort=False)
    found = groups[[]].first().assign(hit_rate=share)
    for name in ("lru", "optimal"):
        if f"{name}_hits" not in curves:
            continue
        enough = curves[f"{name}_hits"] >= (share - ROUNDING) * curves.accesses
        reached = curves[enough & (curves.accesses > 0)].groupby(keys, sort=False)
        found[f"{name}_capacity"] = reached.capacity.min().astype(float)
        found[f"{name}_share"] = reached.share.min()
    return found.reset_index()


def _of_phase(hist_LCD: NDArray[Any], phase: str) -> NDArray[Any]:
    return hist_LCD.sum(axis=1) if phase == "all" else hist_LCD[:, PHASES.index(phase)]


def _same_accesses(reuse: ReuseDistances, optimal: OptimalCurve) -> bool:
    counts = [hist_LCD.sum(axis=2) for hist_LCD in (reuse.stacks.hist_LCD, optimal.stacks.hist_LCD)]
    return np.array_equal(*counts)


def cache_curve(trace: Traceable, *, max_rows: int = BLOCK_ROWS) -> pd.DataFrame:
    """Hit rates of an LRU and of an optimal cache per layer, at every capacity from K to E; two passes over the trace.

    One cache per layer serves all requests in turn. Prefill is teacher-forced: replayed token by token.
    """
    plan = plan_of(trace, max_rows=max_rows)
    reuse, first = ReuseDistances(plan), FirstUses(plan)
    accumulate(trace, plan, [reuse, first], title="reuse distances", max_rows=max_rows)
    optimal = OptimalCurve(plan, first)
    accumulate(trace, plan, [optimal], title="optimal cache", max_rows=max_rows)
    return cache_curves(reuse, optimal)
