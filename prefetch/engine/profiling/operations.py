"""What is timed of one cell: every part of the layer, by every implementation, forward and backward.

It holds no clock. The router's product is really computed, but what it chooses is drawn: logits that were drawn are
added to it, and they are larger, so that "uniform" and "zipf" are what they say. Every layer here begins with logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefetch.engine.profiling import predictions
from prefetch.engine.profiling.grid import Cell, drawn_logits
from prefetch.engine.profiling.peers import (
    grouped_combine,
    grouped_dispatch,
    grouped_experts,
    grouped_moe,
    loop_moe,
    torch_router,
)
from prefetch.engine.profiling.work import (
    BACKWARD,
    COMBINE,
    DISPATCH,
    EXPERTS,
    FORWARD,
    LAYER,
    ROUTER,
)
from prefetch.kernels.dense import dense_moe
from prefetch.kernels.experts import apply_experts, combine, moe
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.plan import plan
from prefetch.kernels.routing import route, route_torch
from prefetch.kernels.shipped import config_of, path_of
from prefetch.kernels.twins import runs_triton

OURS, TORCH, LOOP, GROUPED = "ours", "torch", "loop", "grouped_mm"
DENSE, PRODUCT = "dense", "dense_product"
IMPLEMENTATIONS = (OURS, TORCH, LOOP, GROUPED, DENSE, PRODUCT)
DEFINITION, DECODE = "definition", "decode"  # paths
BESIDE, WITHIN, UNUSED = "a part", "within experts", "not used on this path"
QUIET = 1e-3  # how large a drawn router's own logits are
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, ids, weights, pool


@dataclass(frozen=True, eq=False)
class Operands:
    """Of one cell, on its device. `pool_EN` is shared by cells of the same sizes."""

    cell: Cell
    x_TD: Tensor
    router_ED: Tensor
    drawn_TE: Tensor
    pool_EN: Tensor
    slot_E: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def path(self) -> str:
        """Which of our kernels run."""
        is_triton = runs_triton(self.x_TD)
        return path_of(self.cell.tokens, self.cell.top_k) if is_triton else DEFINITION

    @property
    def block(self) -> int:
        """Rows of a tile, as the path's own plan has them; plans of a CPU are made as a GPU's would be."""
        cell = self.cell
        path = path_of(cell.tokens, cell.top_k)
        path = "swapped" if path == DECODE else path
        return config_of(path, cell.layout, cell.tokens * cell.top_k, cell.experts).up.rows

    @property
    def counts_E(self) -> Tensor:
        return torch.bincount(self.ids_TK.flatten().cpu(), minlength=self.cell.experts)


@dataclass(frozen=True, eq=False)
class Operation:
    part: str
    implementation: str
    direction: str
    make: Callable[[], Callable[[], Any]]  # prepares, outside the time, what is called within it
    place: str = BESIDE  # in our layer
    predicted_bytes: int | None = None  # beside its inputs


def operands(cell: Cell, pool_EN: Tensor, skew: float, seed: int) -> Operands:
    device, dtype = pool_EN.device, cell.torch_dtype
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(cell.tokens, cell.hidden, generator=generator).to(device, dtype)
    router_ED = torch.randn(cell.experts, cell.hidden, generator=generator) * cell.hidden**-0.5
    router_ED = (QUIET * router_ED).to(device, dtype)
    drawn_TE = drawn_logits(cell, skew, seed, device)
    slot_E = torch.arange(cell.experts, dtype=torch.int32, device=device)
    ids_TK, weights_TK = route(torch.addmm(drawn_TE, x_TD, router_ED.T), cell.top_k)
    return Operands(cell, x_TD, router_ED, drawn_TE, pool_EN, slot_E, ids_TK, weights_TK)


def operations(of: Operands, factor: float, direction: str) -> Iterator[Operation]:
    """Ours first: the others are measured against it."""
    if direction == BACKWARD:
        yield from _backward(of, factor)
        return
    yield from _ours(of)
    yield from _grouped(of)
    yield from _layers(of, factor)


N_OPERATIONS = {FORWARD: 13, BACKWARD: 3}


def _logits(of: Operands) -> Tensor:
    return torch.addmm(of.drawn_TE, of.x_TD, of.router_ED.T)


def _ours(of: Operands) -> Iterator[Operation]:
    k, path = of.cell.top_k, of.path
    is_planned = path not in (DEFINITION, DECODE)

    def summed() -> Callable[[], Tensor]:
        return partial(combine, _rows(of), of.ids_TK, slot_E=of.slot_E, dtype=of.x_TD.dtype)

    def planned() -> Callable[[], Any]:
        return partial(plan, of.ids_TK, of.slot_E, of.block)

    yield Operation(ROUTER, OURS, FORWARD, lambda: lambda: route(_logits(of), k))
    yield Operation(DISPATCH, OURS, FORWARD, planned, WITHIN if is_planned else UNUSED)
    yield Operation(EXPERTS, OURS, FORWARD, lambda: partial(_rows, of))
    yield Operation(COMBINE, OURS, FORWARD, summed, UNUSED if path == DECODE else BESIDE)
    predicted = None if path == DEFINITION else sum(predictions.ours(of.cell).values())
    yield Operation(LAYER, OURS, FORWARD, lambda: partial(_layer, of), predicted_bytes=predicted)


def _rows(of: Operands) -> Tensor:
    rows_TKD = torch.empty(*of.ids_TK.shape, of.cell.hidden, device=of.x_TD.device)
    given = of.x_TD, of.ids_TK, of.weights_TK, of.pool_EN, of.cell.layout, of.slot_E
    apply_experts(*given, rows_TKD)
    return rows_TKD


def _layer(of: Operands) -> Tensor:
    ids_TK, weights_TK = route(_logits(of), of.cell.top_k)
    return moe(of.x_TD, ids_TK, weights_TK, of.pool_EN, of.cell.layout, of.slot_E)


def _grouped(of: Operands) -> Iterator[Operation]:
    cell = of.cell

    def sorted_() -> Any:
        return grouped_dispatch(of.x_TD, of.ids_TK, cell.experts)

    def experts() -> Callable[[], Tensor]:
        return partial(grouped_experts, sorted_(), of.pool_EN, cell.layout)

    def summed() -> Callable[[], Tensor]:
        prepared = sorted_()
        y_RD = grouped_experts(prepared, of.pool_EN, cell.layout)
        return partial(grouped_combine, y_RD, prepared, of.weights_TK, cell.tokens)

    yield Operation(DISPATCH, GROUPED, FORWARD, lambda: sorted_)
    yield Operation(EXPERTS, GROUPED, FORWARD, experts)
    yield Operation(COMBINE, GROUPED, FORWARD, summed)


def _layers(of: Operands, factor: float) -> Iterator[Operation]:
    """Others' whole layers, behind the same router."""
    k = of.cell.top_k

    def layer(experts: Experts) -> Callable[[], Tensor]:
        return lambda: experts(of.x_TD, *route(_logits(of), k), of.pool_EN)

    yield Operation(ROUTER, TORCH, FORWARD, lambda: lambda: torch_router(_logits(of), k))
    for name, (experts, predicted) in _experts(of, factor).items():
        make = partial(layer, experts)
        yield Operation(LAYER, name, FORWARD, make, predicted_bytes=predicted)


def _experts(of: Operands, factor: float) -> dict[str, tuple[Experts, int | None]]:
    """... and the bytes that they are predicted to need."""
    layout = of.cell.layout

    def dense(product: bool) -> tuple[Experts, int]:
        how: dict[str, Any] = {"factor": factor, "product": product}
        predicted = predictions.dense(of.cell, factor, product=product)
        return partial(_dense, layout, how), sum(predicted.values())

    return {
        LOOP: (partial(_last, loop_moe, layout), None),
        GROUPED: (partial(_last, grouped_moe, layout), None),
        DENSE: dense(False),
        PRODUCT: dense(True),
    }


def _last(call: Callable[..., Tensor], layout: ExpertLayout, *given: Tensor) -> Tensor:
    return call(*given, layout)


def _dense(
    layout: ExpertLayout, how: dict[str, Any], x: Tensor, ids: Tensor, weights: Tensor, pool: Tensor
) -> Tensor:
    return dense_moe(x, ids, weights, pool, layout, **how).out_TD


def _backward(of: Operands, factor: float) -> Iterator[Operation]:
    """Ours has none: its kernels are for inference."""
    for name, (experts, _) in _experts(of, factor).items():
        if name == PRODUCT:
            continue
        predicted = predictions.dense_gradient(of.cell, factor) if name == DENSE else None
        make = partial(_gradient, of, experts)
        yield Operation(LAYER, name, BACKWARD, make, predicted_bytes=predicted)


def _gradient(of: Operands, experts: Experts) -> Callable[[], Any]:
    """Of the output with respect to tokens, experts and router; the forward pass is outside of the time."""
    inputs = [t.detach().requires_grad_() for t in (of.x_TD, of.pool_EN, of.router_ED)]
    x_TD, pool_EN, router_ED = inputs
    logits_TE = torch.addmm(of.drawn_TE, x_TD, router_ED.T)
    out_TD = experts(x_TD, *route_torch(logits_TE, of.cell.top_k), pool_EN)
    ones_TD = torch.ones_like(out_TD)
    return lambda: torch.autograd.grad(out_TD, inputs, ones_TD, retain_graph=True)
