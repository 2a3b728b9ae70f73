"""What a diagnosis has beside the profile: peaks, recorded routing, remedies; and whether the routing can be its own.

It reads no file. A routing of other experts or choices is refused, one of other layers is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.device.offload import Offloaded
from analysis.device.operations import Active, Operation
from analysis.device.roofline import Peaks
from analysis.device.shapes import Known, Shape
from analysis.device.step_routing import (
    Imbalance,
    StepRouting,
    fits,
    imbalance,
    ranks_to_show,
    rate_of,
)
from prefetch.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Beside:
    """What a diagnosis has beyond the profile."""

    peaks: Peaks | None = None
    routing: StepRouting | None = None
    remedies: pd.DataFrame = field(default_factory=pd.DataFrame)
    offload: Offloaded | None = None
    sections: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    doubts: Sequence[str] = ()
    notes: Sequence[str] = ()


def layer_shape(operations: Sequence[Operation]) -> Shape | None:
    """Of the longest expert product whose sizes are known."""
    return next((op.shape for op in operations if not op.shape.missing("experts")), None)


def active_of(routing: StepRouting | None) -> Active | None:
    """Experts that a recorded step needed; of experts that are cut over ranks, the ranks' mean."""
    if routing is None:
        return None

    def active(shape: Shape) -> float | None:
        """None for a call of another model or of another number of tokens than the steps have."""
        is_other = fits(routing.card, shape.experts, shape.top_k)
        rows = routing.tokens * routing.card.top_k
        told = (shape.tokens, routing.tokens) if shape.rows is None else (shape.rows, rows)
        return None if is_other or told[0] != told[1] else routing.active * shape.local_share

    return active


def check_routing(
    beside: Beside, known: Known, operations: Sequence[Operation], n_layers: int | None
) -> list[str]:
    """What a reader must know of the routing; an error where it cannot be that of the profiled model."""
    routing = beside.routing
    if routing is None:
        return []
    shapes = [op.shape for op in operations]
    if known.card is not None:
        shapes.append(Shape(experts=known.card.n_experts, top_k=known.card.top_k))
    for shape in shapes:
        if reason := fits(routing.card, shape.experts, shape.top_k):
            raise ConfigError(f"trace={routing.source}: {reason}; pass the routing of that model")
    return _doubts(routing, shapes, n_layers)


def _doubts(routing: StepRouting, shapes: Sequence[Shape], n_layers: int | None) -> list[str]:
    told, layers = [], routing.card.n_layers
    for name, key in (("experts", "experts"), ("choices per token", "top_k")):
        if all(getattr(shape, key) is None for shape in shapes):
            told.append(f"The profile does not tell its {name}: not compared with the routing's.")
    if n_layers is not None and n_layers != layers:
        told.append(
            f"The routing has {layers} MoE layers, the profile {n_layers}: what is said of a layer is the mean of the "
            "routing's; make sure that both are of one model."
        )
    return told + _doubts_of_steps(routing)


def _doubts_of_steps(routing: StepRouting) -> list[str]:
    told, steps = [], routing.steps
    mine, other = ("generated", "a prompt's") if routing.is_decode else ("a prompt's", "generated")
    if not steps.is_phase_recorded:
        told.append(f"The routing has no tokens marked as {mine}: steps are made of {other} ones.")
    if routing.is_decode and steps.requests < steps.tokens:
        told.append(
            f"The routing has too few requests for steps of {steps.tokens:,} tokens: a step holds tokens of "
            f"{steps.requests:.1f} requests, and neighbours of one request need fewer experts than strangers."
        )
    return told


def imbalances_of(
    shape: Shape | None, known: Known, beside: Beside, operations: Sequence[Operation]
) -> list[Imbalance]:
    """Experts that are cut over ranks are computed by every rank: then there is nothing to spread."""
    routing, peaks = beside.routing, beside.peaks
    if routing is None or shape is None or peaks is None or rate_of(shape, peaks) is None:
        return []
    tile = next((op.tile for op in operations if op.tile), None) or 1
    given = known.given
    ranks = (
        [1] if given.cuts_experts else ranks_to_show(routing.card.n_experts, given.expert_parallel)
    )
    return [imbalance(routing, shape, peaks, n, tile) for n in ranks]
