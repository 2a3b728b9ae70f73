"""A module's experts in the kernels' layout: gate and up rows interleaved, one block, whatever the module's own order.

It knows no cache. Sums are in float32 there, so that results are close to the module's and not the same to the bit.
M numbers of a module's own block, N of the kernels'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefetch.engine.parts import Blocks, eager, probe
from prefetch.errors import ConfigError
from prefetch.kernels.experts import moe_torch
from prefetch.kernels.layout import ACTIVATIONS, ExpertLayout

CLOSE = 1e-3  # relative, in float32: another order of sums, not another function


@dataclass(frozen=True, eq=False)
class Repacked:
    """How one module's experts lie for the kernels."""

    blocks: Blocks
    layout: ExpertLayout

    @property
    def numbers(self) -> int:
        return self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def bytes(self) -> int:
        return self.layout.bytes

    @torch.no_grad()
    def pack(self) -> Tensor:
        """[E, N]"""
        module, blocks = self.blocks.module, self.blocks
        held_EN = torch.zeros(blocks.n_experts, self.layout.numel, dtype=self.layout.dtype)
        views = self.layout.views(held_EN)
        views.w13_SGD.copy_(self._interleaved(_rows(module, module.gate_up_proj)))
        views.w2_SDF.copy_(_rows(module, module.down_proj))
        if views.b13_SG is not None and views.b2_SD is not None:
            views.b13_SG.copy_(self._interleaved(module.gate_up_proj_bias))
            views.b2_SD.copy_(module.down_proj_bias)
        return held_EN

    def unpack(self, held_EN: Tensor) -> dict[str, Tensor]:
        """The module's parameters again."""
        module, views = self.blocks.module, self.layout.views(held_EN)
        found = {"gate_up_proj": self._apart(views.w13_SGD), "down_proj": views.w2_SDF}
        if module.is_transposed:
            found = {name: weight.transpose(1, 2) for name, weight in found.items()}
        if views.b13_SG is not None and views.b2_SD is not None:
            found |= {"gate_up_proj_bias": self._apart(views.b13_SG), "down_proj_bias": views.b2_SD}
        return {
            name: weight.clone(memory_format=torch.contiguous_format)
            for name, weight in found.items()
        }

    def _interleaved(self, rows_EG: Tensor) -> Tensor:
        """Gates first and ups behind them, or one after the other as it is."""
        if not self.blocks.module.is_concatenated:
            return rows_EG
        n_inner = self.layout.inner
        return torch.stack((rows_EG[:, :n_inner], rows_EG[:, n_inner:]), 2).flatten(1, 2)

    def _apart(self, rows_EG: Tensor) -> Tensor:
        if not self.blocks.module.is_concatenated:
            return rows_EG
        return torch.cat((rows_EG[:, 0::2], rows_EG[:, 1::2]), 1)


def repacked(blocks: Blocks, where: str) -> Repacked:
    """With the activation under which the definition says what the module says."""
    module = blocks.module
    _n_experts, hidden, inner = _rows(module, module.down_proj).shape
    has_bias = any(part.name.endswith("_bias") for part in blocks.parts)
    for activation in ACTIVATIONS:
        packing = Repacked(blocks, ExpertLayout(hidden, inner, blocks.dtype, activation, has_bias))
        if _is_close(packing):
            return packing
    raise ConfigError(
        f"{where}: {type(module).__name__} does not compute what a kernel here computes ({', '.join(ACTIVATIONS)}); "
        "OffloadedMoE serves it on the CPU alone, with its own experts"
    )


def _is_close(packing: Repacked) -> bool:
    x_ND, ids_NK, weights_NK = probe(packing.blocks)
    slot_E = torch.arange(packing.blocks.n_experts, dtype=torch.int32)
    with torch.no_grad():
        expected = eager(packing.blocks, x_ND, ids_NK, weights_NK).float()
        told = (x_ND, ids_NK.int(), weights_NK, packing.pack(), packing.layout, slot_E)
        found = moe_torch(*told).float()
    least = CLOSE if packing.dtype == torch.float32 else 0.05
    return bool((found - expected).norm() <= least * expected.norm())


def _rows(module: Any, weight: Tensor) -> Tensor:
    """[E, out, in]"""
    return weight.detach().transpose(1, 2) if module.is_transposed else weight.detach()
