"""What a launch computes for a model that runs: its own experts on the CPU, or the kernels, from the slots.

It knows no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prefetch.engine.kernel_body import ABSENT, KernelBody
from prefetch.engine.parts import Blocks, weighted


class LiveBody:
    """`take` an event's tokens, let the engine launch, `give` the sum."""

    def __init__(self, blocks_L: Sequence[Blocks], pool_SM: Tensor) -> None:
        self.blocks_L, self.pool_SM = blocks_L, pool_SM
        self.outs: dict[int, tuple[Tensor, Tensor]] = {}  # of an expert: its tokens, what it adds

    def take(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, needed: int) -> None:
        self.x_TD, self.ids_TK, self.weights_TK = x_TD, ids_TK, weights_TK
        self.outs.clear()

    def before(self, step: int, layer: int) -> None:
        """The model itself has done it."""

    def launch(self, layer: int, tokens: Mapping[int, int], slots: Mapping[int, int]) -> None:
        told = (self.blocks_L[layer], self.x_TD, self.ids_TK, self.weights_TK)
        for expert in tokens:
            self.outs[expert] = weighted(*told, expert, self.pool_SM[slots[expert]])

    def combine(self, layer: int) -> None:
        """`give` sums: an event without experts has no launch."""

    def give(self) -> Tensor:
        """By rising expert, as the eager loop adds them."""
        out_TD = torch.zeros_like(self.x_TD)
        for expert in sorted(self.outs):
            out_TD.index_add_(0, *self.outs[expert])
        return out_TD


class LiveKernels(KernelBody):
    """The same by the project's kernels."""

    def take(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, needed: int) -> None:
        ids_TK = ids_TK.int()
        nobody_TK = ids_TK >= self.rows.host_RE.shape[1]
        super().take(x_TD, ids_TK.masked_fill(nobody_TK, ABSENT), weights_TK.float(), needed)

    def give(self) -> Tensor:
        return torch.zeros_like(self.x_TD) if self.out_TD is None else self.out_TD
