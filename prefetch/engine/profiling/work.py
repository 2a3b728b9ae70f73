"""The least that an operation must do, and the shortest time in which this machine could: its roofline bound.

It times nothing. The bound is of the task, not of who does it: a baseline that reads what nobody asked for, or
multiplies empty seats, is measured against the same bound. Activations between two kernels are not counted: they need
not leave the chip. Backward: twice the operations, and for every weight that was used a read and a written gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefetch.engine.profiling.grid import Cell
from prefetch.engine.profiling.timing import NS_PER_S

FORWARD, BACKWARD = "forward", "backward"
ROUTER, DISPATCH, EXPERTS, COMBINE, LAYER = "router", "dispatch", "experts", "combine", "layer"
PARTS = (ROUTER, DISPATCH, EXPERTS, COMBINE, LAYER)
MEMORY, COMPUTE = "memory", "compute"
INT32, FLOAT32 = 4, 4  # bytes


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int

    def __post_init__(self) -> None:
        if self.bytes < 0 or self.flops < 0:
            raise ValueError(f"no work is below 0; found {self}")


@dataclass(frozen=True)
class Roofs:
    """Of this device, measured in this run."""

    read_bytes_per_s: int
    flops_per_s: dict[str, int]  # by number type


def work_of(cell: Cell, part: str, direction: str, n_distinct: int) -> Work:
    """`n_distinct`: experts that at least one token chose; only their weights are read."""
    forward = _forward(cell, part, n_distinct)
    if direction == FORWARD:
        return forward
    weights = _weights(cell, part, n_distinct)
    activations = forward.bytes - weights
    return Work(2 * weights + 2 * activations, 2 * forward.flops)


def _forward(cell: Cell, part: str, n_distinct: int) -> Work:
    T, E, D, rows = cell.tokens, cell.experts, cell.hidden, cell.tokens * cell.top_k
    size = cell.torch_dtype.itemsize
    vectors, weights = T * D * size, _weights(cell, part, n_distinct)
    router, experts = 2 * T * D * E, 6 * rows * D * cell.inner
    return {
        ROUTER: Work(vectors + weights + rows * (INT32 + FLOAT32), router),
        DISPATCH: Work((2 * rows + 2 * E) * INT32, 0),
        EXPERTS: Work(vectors + weights + rows * (INT32 + FLOAT32 + D * FLOAT32), experts),
        COMBINE: Work(rows * D * FLOAT32 + vectors, rows * D),
        LAYER: Work(2 * vectors + weights, router + experts + rows * D),
    }[part]


def _weights(cell: Cell, part: str, n_distinct: int) -> int:
    size = cell.torch_dtype.itemsize
    router, experts = (
        cell.experts * cell.hidden * size,
        n_distinct * 3 * cell.hidden * cell.inner * size,
    )
    return {ROUTER: router, EXPERTS: experts, LAYER: router + experts}.get(part, 0)


def bound_ns(work: Work, roofs: Roofs, dtype: str) -> tuple[int, str]:
    """The longer of moving and multiplying, and which it is."""
    moving_ns = math.ceil(work.bytes * NS_PER_S / roofs.read_bytes_per_s)
    multiplying_ns = math.ceil(work.flops * NS_PER_S / roofs.flops_per_s[dtype])
    return max(moving_ns, multiplying_ns), MEMORY if moving_ns >= multiplying_ns else COMPUTE
