"""One MoE layer as tests draw it, and two oracles that share nothing with the kernels: a loop in float64, grouped_mm.

Weights are kept as they were drawn, beside the pool they were packed into; slots that belong to nobody hold NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.kernels.layout import ExpertLayout

# of the largest element: float32 sums in another order; half and bfloat16 round what is between the matrices
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Layer:
    layout: ExpertLayout
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    pool_SN: Tensor
    slot_E: Tensor
    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, ExpertLayout, Tensor]:
        """What the experts' functions take, in their order."""
        return self.x_TD, self.ids_TK, self.weights_TK, self.pool_SN, self.layout, self.slot_E

    @property
    def poisoned(self) -> Tensor:
        """Rows that nobody has written yet."""
        T, K = self.ids_TK.shape
        return torch.full((T, K, self.layout.hidden), float("nan"), device=self.x_TD.device)


def layer(
    n_tokens: int,
    top_k: int,
    n_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    has_bias: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Layer:
    """Distinct experts of every token, drawn; slots in a drawn order among some of nobody."""
    draw = torch.Generator().manual_seed(seed)
    layout = ExpertLayout(hidden, inner, dtype, activation, has_bias)
    E, D, I = n_experts, hidden, inner  # noqa: E741
    shapes = ((E, I, D), (E, I, D), (E, D, I))
    weights = [(torch.randn(of, generator=draw) * of[2] ** -0.5).to(dtype) for of in shapes]
    biases = tuple((torch.randn(E, n, generator=draw) * 0.3).to(dtype) for n in (I, I, D))
    slot_E = torch.randperm(E + 3, generator=draw)[:E].int()
    pool_SN = torch.full((E + 3, layout.numel), float("nan"), dtype=dtype)
    for e in range(E):
        own = [bias[e] for bias in biases] if has_bias else []
        pool_SN[int(slot_E[e])] = layout.pack(*(of[e] for of in weights), *own)
    ids_TK = torch.rand(n_tokens, E, generator=draw).argsort(1)[:, :top_k].int()
    x_TD = torch.randn(n_tokens, D, generator=draw).to(dtype)
    weights_TK = torch.rand(n_tokens, top_k, generator=draw)
    tensors = [pool_SN, slot_E, x_TD, ids_TK, weights_TK]
    return Layer(layout, *weights, biases if has_bias else None, *(of.to(device) for of in tensors))  # type: ignore[arg-type]


def loop_rows(of: Layer) -> Tensor:
    """Every choice by itself, in float64: rows [T, K, D]. Zero where the id is nobody's."""
    x_TD, ids_TK, weights_TK = of.x_TD.cpu(), of.ids_TK.cpu(), of.weights_TK.cpu()
    rows_TKD = torch.zeros(*ids_TK.shape, of.layout.hidden, dtype=torch.float64)
    for t, k in torch.cartesian_prod(*map(torch.arange, ids_TK.shape)).reshape(-1, 2).tolist():
        e = int(ids_TK[t, k])
        if e >= 0:
            gate, up = of.gate_EFD[e].double(), of.up_EFD[e].double()
            gate, up = gate @ x_TD[t].double(), up @ x_TD[t].double()
            if of.biases:
                gate, up = gate + of.biases[0][e].double(), up + of.biases[1][e].double()
            y = of.down_EDF[e].double() @ activated(of.layout.activation, gate, up)
            y = y + of.biases[2][e].double() if of.biases else y
            rows_TKD[t, k] = float(weights_TK[t, k]) * y
    return rows_TKD


def activated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        return gate * 0.5 * (1 + torch.special.erf(gate / 2**0.5)) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


def grouped_rows(of: Layer) -> Tensor:
    """The same by torch.nn.functional.grouped_mm: rows sorted by expert, one call per matrix. A bias is the weight of
    one more input, which is 1; then zeros up to a multiple of 8, as its strides must be."""
    T, K = of.ids_TK.shape
    n = len(of.gate_EFD)
    order_R = of.ids_TK.flatten().cpu().argsort(stable=True)
    ends_E = of.ids_TK.flatten().cpu().bincount(minlength=n).cumsum(0).int()
    matrices = [of.gate_EFD, of.up_EFD, of.down_EDF]
    biases = of.biases or tuple(torch.zeros(n, m.shape[1], dtype=m.dtype) for m in matrices)
    gate, up, down = (
        padded(torch.cat([m, bias[:, :, None]], 2))
        for m, bias in zip(matrices, biases, strict=True)
    )
    x_RD = with_one(of.x_TD.cpu()[order_R // K])
    gate_RF = F.grouped_mm(x_RD, gate.mT, offs=ends_E)[:, : of.layout.inner]
    up_RF = F.grouped_mm(x_RD, up.mT, offs=ends_E)[:, : of.layout.inner]
    h_RF = activated(of.layout.activation, gate_RF.float(), up_RF.float()).to(of.layout.dtype)
    y_RD = F.grouped_mm(with_one(h_RF), down.mT, offs=ends_E)[:, : of.layout.hidden].float()
    rows_RD = torch.empty_like(y_RD)
    rows_RD[order_R] = y_RD * of.weights_TK.cpu().flatten()[order_R, None]
    return rows_RD.reshape(T, K, -1)


def with_one(x_RD: Tensor) -> Tensor:
    return padded(torch.cat([x_RD, torch.ones(len(x_RD), 1, dtype=x_RD.dtype)], 1), rows=False)


def padded(matrix: Tensor, *, rows: bool = True) -> Tensor:
    """Zeros up to multiples of 8 along the last axis, and the one before."""
    right, below = -matrix.shape[-1] % 8, -matrix.shape[-2] % 8
    return F.pad(matrix, (0, right, 0, below if rows else 0))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the type's tolerance of the largest element."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape and not found.isnan().any()
    if expected.numel():
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        assert error <= TOLERANCE[dtype], f"off by {error:.1e} of the largest element"
