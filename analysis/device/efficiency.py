"""How well the expert products use the device as a whole: operations, memory per expert, tokens per expert.

It reads judged operations and knows no file. Where a number is missing its field is None: it is not computable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from analysis.device.operations import Operation
from analysis.device.roofline import BYTES, PRODUCTS, Peaks
from prefetch.sim.hardware import NS_PER_S


@dataclass(frozen=True)
class Efficiency:
    """Of one rank."""

    flops_utilisation: float | None = (
        None  # operations over what the peaks of their types allow in that time
    )
    bandwidth_utilisation: float | None = None
    expert_bytes: float | None = None  # of one expert's matrices here
    resident_experts: int | None = None
    active_experts: float | None = None  # per call
    is_exact: bool = False
    tokens_per_expert: float | None = None  # of those that were needed

    @property
    def resident_use(self) -> float | None:
        """Share of the experts' memory that a call reads."""
        if self.active_experts is None or not self.resident_experts:
            return None
        return self.active_experts / self.resident_experts


def efficiency_of(operations: Sequence[Operation], peaks: Peaks | None) -> Efficiency:
    """An anomaly is left out: its time or its shape is not what it seems."""
    products = [op for op in operations if op.role in PRODUCTS and op.judged and not op.anomaly]
    sized = [op for op in operations if not op.shape.missing("experts") and op.cost is not None]
    told = _of_memory(sized[0]) if sized else Efficiency()
    if peaks is None or not products:
        return told
    possible = spent_s = moved = done = 0.0
    for op in products:
        rate = peaks.rate(op.cost.arithmetic) if op.cost else None
        if op.cost is None or rate is None:
            continue
        done += op.cost.flops * op.calls
        moved += op.cost.n_bytes * op.calls
        spent_s += op.time_ns / NS_PER_S
        possible += rate[0] * op.time_ns / NS_PER_S
    if not spent_s:
        return told
    return replace(
        told,
        flops_utilisation=done / possible,
        bandwidth_utilisation=moved / (spent_s * peaks.bytes_per_s),
    )


def _of_memory(op: Operation) -> Efficiency:
    shape, cost = op.shape, op.cost
    assert shape.hidden and shape.inner and cost is not None
    active = cost.active_experts
    return Efficiency(
        expert_bytes=shape.hidden
        * shape.inner
        * (3 if shape.gated else 2)
        * (BYTES[shape.weight or "bf16"] + shape.scale_bytes),
        resident_experts=shape.local_experts or shape.experts,
        active_experts=active,
        is_exact=op.is_exact,
        tokens_per_expert=shape.choices / active if active else None,
    )
