"""Bytes that a layer is predicted to need beside experts and tokens, tensor by tensor, before anything is run.

It times nothing and allocates nothing. `kernels.dense` says what the baseline's tensors take; what torch copies on the
way is added here, so that what is predicted to fit does.
"""

from __future__ import annotations

from prefetch.engine.profiling.grid import Cell
from prefetch.kernels.dense import dense_bytes, moe_bytes


def ours(cell: Cell) -> dict[str, int]:
    """Of the kernels on a GPU; what their torch definition needs on a CPU is measured, not predicted."""
    return moe_bytes(cell.tokens, cell.top_k, cell.experts, cell.layout)


def dense(cell: Cell, factor: float, *, product: bool) -> dict[str, int]:
    """The last contraction is over two axes, for which torch lays both of its operands out anew."""
    sizes = cell.tokens, cell.top_k, cell.experts, cell.layout
    found = dense_bytes(*sizes, factor=factor, product=product)
    if product:
        return found
    copies = ("combine_TEC", "outputs_ECD")
    return found | {f"{name}_laid_out": found[name] for name in copies}


def dense_gradient(cell: Cell, factor: float) -> int:
    """As much again as what is kept for it; and both matrices of the pool get a gradient of the whole pool, beside
    their sum."""
    forward = sum(dense(cell, factor, product=False).values())
    return 2 * forward + 3 * cell.experts * cell.layout.bytes
