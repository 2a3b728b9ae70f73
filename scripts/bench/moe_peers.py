"""One MoE layer by everybody who can compute it: ours, torch's grouped_mm, transformers' three, Liger's. Same weights.

Each is a function of a routing. Not a benchmark: `bench_kernels.py` times them. Who is not installed is left out.
T tokens, K choices, E experts, D hidden, F inner, G = 2F; all with SiLU and without biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.kernels.experts import moe, moe_torch
from prefetch.kernels.layout import ExpertLayout

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_TD, ids_TK, weights_TK -> out_TD


@dataclass(frozen=True)
class Peer:
    name: str
    compute: Compute
    waits: bool  # for the device, on its way: no CUDA graph can hold it
    bytes_of: Callable[
        [int], int
    ]  # what it allocates for so many choices, beside rows: weights that it copies


@dataclass(frozen=True)
class Weights:
    """One layer, twice: as our pool, and as everybody else keeps it."""

    layout: ExpertLayout
    pool_EN: Tensor
    slot_E: Tensor
    w13_EGD: Tensor  # gates, then ups
    w2_EDF: Tensor


def drawn(n_experts: int, layout: ExpertLayout, seed: int, device: str) -> Weights:
    pool_EN = layout.random(n_experts, seed, device)
    parts = layout.views(pool_EN)
    w13_EGD = torch.cat([parts.w13_SGD[:, 0::2], parts.w13_SGD[:, 1::2]], 1)
    slot_E = torch.arange(n_experts, dtype=torch.int32, device=device)
    return Weights(layout, pool_EN, slot_E, w13_EGD, parts.w2_SDF.contiguous())


def peers(of: Weights) -> Iterator[Peer]:
    """Ours first. On a CPU ours is the torch definition, and there is no second name for it."""
    on_gpu = of.pool_EN.is_cuda

    def ours(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe(x_TD, ids_TK, weights_TK, of.pool_EN, of.layout, of.slot_E)

    def definition(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe_torch(x_TD, ids_TK, weights_TK, of.pool_EN, of.layout, of.slot_E)

    yield Peer("ours" if on_gpu else "ours (torch definition)", ours, not on_gpu, nothing)
    if on_gpu:
        yield Peer("torch definition", definition, True, nothing)
    yield Peer("torch grouped_mm", grouped_mm(of), False, nothing)
    yield from of_transformers(of)
    if on_gpu and find_spec("liger_kernel"):
        yield Peer("liger", liger(of), True, nothing)


def nothing(n_choices: int) -> int:
    return 0


def grouped_mm(of: Weights) -> Compute:
    """Rows sorted by expert, two products, sum by choice: what a user writes with torch alone."""

    def compute(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        T, K = ids_TK.shape
        sorted_R, order_R = ids_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_R, of.slot_E, right=True).int()
        a_RG = F.grouped_mm(x_TD[order_R // K], of.w13_EGD.mT, offs=ends_E)
        gate_RF, up_RF = a_RG.chunk(2, -1)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, of.w2_EDF.mT, offs=ends_E)
        rows_RD = torch.empty_like(y_RD)
        rows_RD[order_R] = y_RD * weights_TK.flatten()[order_R, None].to(y_RD.dtype)
        return rows_RD.reshape(T, K, -1).sum(1)

    return compute


def of_transformers(of: Weights) -> Iterator[Peer]:
    if not find_spec("transformers"):
        return
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, G, D = of.w13_EGD.shape
    a_pair = (
        (3 * G // 2) * D * of.layout.dtype.itemsize
    )  # weights that batched_mm gathers per choice
    for name in ("eager", "batched_mm", "grouped_mm"):
        config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=G // 2, num_experts=E)
        config._experts_implementation = name
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config).requires_grad_(False)
        experts.gate_up_proj = torch.nn.Parameter(of.w13_EGD, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(of.w2_EDF, requires_grad=False)

        def compute(
            x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, e: object = experts
        ) -> Tensor:
            out: Tensor = e(x_TD, ids_TK.long(), weights_TK.to(x_TD.dtype))  # type: ignore[operator]
            return out

        copied = (lambda n: n * a_pair) if name == "batched_mm" else nothing
        yield Peer(f"transformers {name}", compute, name == "eager", copied)


def liger(of: Weights) -> Compute:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def compute(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out: Tensor = LigerFusedMoEFunction.apply(
            x_TD, of.w13_EGD, of.w2_EDF, ids_TK, weights_TK.to(x_TD.dtype)
        )
        return out

    return compute
