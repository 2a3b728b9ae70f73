"""The experts of a transformers model as blocks: what one expert is made of, and what it computes with it.

It knows no cache and imports no transformers: a module that holds `gate_up_proj` and `down_proj` with one entry per
expert is taken, and is asked whether it computes what is computed here. M numbers of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefetch.errors import ConfigError

ALIGNED = 64  # bytes: where a part of a block may begin
PROBED = 3  # tokens that a module is asked about


@dataclass(frozen=True)
class Part:
    """A parameter of one expert within its block."""

    name: str
    shape: tuple[int, ...]
    start: int  # in numbers

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Blocks:
    """How the experts of one module lie in blocks."""

    module: Any
    parts: tuple[Part, ...]
    n_experts: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Of a block, up to where the next may begin."""
        step = max(1, ALIGNED // self.dtype.itemsize)
        return -(-self.parts[-1].stop // step) * step

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    def views(self, block_M: Tensor) -> dict[str, Tensor]:
        return {part.name: block_M[part.start : part.stop].view(part.shape) for part in self.parts}

    def pack(self) -> Tensor:
        """[E, M]"""
        blocks_EM = torch.zeros(self.n_experts, self.numbers, dtype=self.dtype)
        for part in self.parts:
            held = getattr(self.module, part.name).detach().reshape(self.n_experts, -1)
            blocks_EM[:, part.start : part.stop] = held
        return blocks_EM

    def unpack(self, held_EM: Tensor) -> dict[str, Tensor]:
        """The module's parameters again."""
        return {
            part.name: held_EM[:, part.start : part.stop].reshape(len(held_EM), *part.shape).clone()
            for part in self.parts
        }

    def compute(self, x_ND: Tensor, block_M: Tensor) -> Tensor:
        """What this expert makes of some tokens: products, activation and biases of the eager module."""
        held = self.views(block_M)
        up_NG = self._product(x_ND, held, "gate_up_proj")
        return self._product(self.module._apply_gate(up_NG), held, "down_proj")

    def _product(self, x_ND: Tensor, held: dict[str, Tensor], name: str) -> Tensor:
        weight, bias = held[name], held.get(f"{name}_bias")
        if self.module.is_transposed:
            y = x_ND @ weight
            return y if bias is None else y + bias
        return F.linear(x_ND, weight, bias)


def blocks_of(module: Any, where: str) -> Blocks:
    """Parameters in their order, each aligned."""
    params = dict(module.named_parameters(recurse=False))
    weights = {name: param for name, param in params.items() if name.endswith("_proj")}
    n_experts = len(params["gate_up_proj"])
    kinds = {(param.dtype, param.device.type) for param in params.values()}
    wrong = [name for name in weights if name not in ("gate_up_proj", "down_proj")]
    if wrong or len(kinds) > 1 or any(len(param) != n_experts for param in params.values()):
        raise ConfigError(
            f"{where}: {type(module).__name__} holds {', '.join(params)}; expected gate_up_proj and down_proj with one "
            "entry per expert, their biases at most, all of one type on one device"
        )
    parts, start = list[Part](), 0
    dtype = params["gate_up_proj"].dtype
    step = max(1, ALIGNED // dtype.itemsize)
    for name, param in params.items():
        parts.append(Part(name, tuple(param.shape[1:]), start))
        start = -(-parts[-1].stop // step) * step
    return Blocks(module, tuple(parts), n_experts, dtype)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that hold a layer's experts, in the model's order."""
    for name, module in model.named_modules():
        held = [getattr(module, of, None) for of in ("gate_up_proj", "down_proj")]
        if all(isinstance(of, nn.Parameter) and of.dim() == 3 for of in held):
            yield name, module


def need_same_answers(blocks: Blocks, where: str) -> None:
    """The module's own eager forward, against what is computed here from blocks: bit for bit, or it is not taken."""
    with torch.no_grad():
        try:
            told = probe(blocks)
            packed_EM = blocks.pack()
            held = {expert: packed_EM[expert] for expert in told[1].unique().tolist()}
            is_same = torch.equal(eager(blocks, *told), summed(blocks, *told, held))
        except (AttributeError, RuntimeError, TypeError, ValueError):
            is_same = False
    if not is_same:
        raise ConfigError(
            f"{where}: {type(blocks.module).__name__} does not compute its experts one by one as gate and up, "
            "activation, down, weighted sum; OffloadedMoE serves modules that do (Qwen2/3-MoE, DeepSeek, Mixtral, "
            "OLMoE, gpt-oss, ...)"
        )


def probe(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """States, ids and weights of a few tokens that a module is asked about."""
    draw, n_experts = torch.Generator().manual_seed(0), blocks.n_experts
    x_ND = torch.randn(PROBED, _hidden(blocks), generator=draw).to(blocks.dtype)
    ids_N = torch.randint(n_experts, (PROBED,), generator=draw)
    ids_NK = torch.stack((ids_N, (ids_N + 1) % n_experts), 1)[:, : min(2, n_experts)]
    return x_ND, ids_NK, torch.rand(ids_NK.shape, generator=draw).to(blocks.dtype)


def eager(blocks: Blocks, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The module's own loop over experts, whatever implementation its model was told to use."""
    forward = type(blocks.module).forward
    device = next(blocks.module.parameters()).device
    told = (x_ND.to(device), ids_NK.to(device), weights_NK.to(device))
    return getattr(forward, "__wrapped__", forward)(blocks.module, *told).cpu()


def summed(
    blocks: Blocks, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, held: dict[int, Tensor]
) -> Tensor:
    """By rising expert, as the eager loop adds them."""
    out_ND = torch.zeros_like(x_ND)
    for expert in sorted(held):
        token_R, y_RD = weighted(blocks, x_ND, ids_NK, weights_NK, expert, held[expert])
        out_ND.index_add_(0, token_R, y_RD)
    return out_ND


def weighted(
    blocks: Blocks, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, expert: int, block_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one expert: which tokens it serves, and what it adds to each."""
    k_R, token_R = ids_NK.T.eq(expert).nonzero(as_tuple=True)
    y_RD = blocks.compute(x_ND[token_R], block_M) * weights_NK[token_R, k_R, None]
    return token_R, y_RD.to(x_ND.dtype)


def _hidden(blocks: Blocks) -> int:
    down = next(part for part in blocks.parts if part.name == "down_proj")
    return down.shape[1] if blocks.module.is_transposed else down.shape[0]
