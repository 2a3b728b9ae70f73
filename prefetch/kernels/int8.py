"""Experts in int8 with a scale per row: half the bytes of bfloat16, so half the time of a copy. Few choices only.

A first step: gated experts without biases, the decode path (a program per choice), not yet used by the engine. A block
is [gate and up rows in turn, G x D | down, D x F | their scales, float32, G | D], its start aligned as in `layout`.
S slots, B bytes of a block, D hidden, F inner, G = 2F, R = T*K choices, K_PAD as the next power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.errors import ConfigError
from prefetch.kernels.experts import gated
from prefetch.kernels.layout import ACTIVATIONS, ALIGNMENT, DTYPES
from prefetch.kernels.shipped import MOST_DECODED, Tiles, next_power, sum_tiles
from prefetch.kernels.twins import check_together, on_device_of, runs_triton

MOST = 127  # a number is at most so many scales
SCALE_BYTES = 4
UP = Tiles(1, 8, 256, 4, 1)  # not timed on a GPU yet


class Int8Weights(NamedTuple):
    """The parts of all slots, as views of the pool."""

    w13_SGD: Tensor
    w2_SDF: Tensor
    scale13_SG: Tensor
    scale2_SD: Tensor


@dataclass(frozen=True)
class Int8Layout:
    """Sizes of one expert. `dtype` is that of tokens, and of what is between the two matrices."""

    hidden: int
    inner: int
    dtype: torch.dtype
    activation: str = "silu"

    def __post_init__(self) -> None:
        known = self.activation in ACTIVATIONS and self.dtype in DTYPES
        if min(self.hidden, self.inner) < 1 or not known:
            raise ConfigError(
                f"int8 experts of {self.hidden} x {self.inner}, {self.activation}, {self.dtype}: expected sizes "
                f"above 0, one of {', '.join(ACTIVATIONS)} and of {', '.join(map(str, DTYPES))}"
            )

    @property
    def scale_start(self) -> int:
        """Bytes before the scales, which begin at a multiple of 16."""
        return -(-3 * self.inner * self.hidden // 16) * 16

    @property
    def bytes(self) -> int:
        used = self.scale_start + SCALE_BYTES * (2 * self.inner + self.hidden)
        return -(-used // ALIGNMENT) * ALIGNMENT

    def views(self, pool_SB: Tensor) -> Int8Weights:
        if pool_SB.ndim != 2 or pool_SB.shape[1] != self.bytes or pool_SB.dtype != torch.int8:
            raise ConfigError(
                f"a pool of this layout is [slots, {self.bytes}] of torch.int8; found {list(pool_SB.shape)} of "
                f"{pool_SB.dtype}"
            )
        D, G = self.hidden, 2 * self.inner
        scales = pool_SB.view(torch.float32)[:, self.scale_start // SCALE_BYTES :]
        return Int8Weights(
            pool_SB[:, : G * D].unflatten(1, (G, D)),
            pool_SB[:, G * D : 3 * self.inner * D].unflatten(1, (D, self.inner)),
            scales[:, :G],
            scales[:, G : G + D],
        )

    def pack(self, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        """One expert's block: every row by its largest number, in 255 steps."""
        block_B = torch.zeros(1, self.bytes, dtype=torch.int8, device=gate_FD.device)
        part, rows_GD = self.views(block_B), torch.stack((gate_FD, up_FD), 1).flatten(0, 1)
        expected = part.w13_SGD.shape[1:], part.w2_SDF.shape[1:]
        if (rows_GD.shape, down_DF.shape) != expected:
            raise ConfigError(
                f"gate, up and down must be [{self.inner}, {self.hidden}] twice and [{self.hidden}, {self.inner}]; "
                f"found {list(gate_FD.shape)}, {list(up_FD.shape)}, {list(down_DF.shape)}"
            )
        part.w13_SGD[0], part.scale13_SG[0] = rounded(rows_GD)
        part.w2_SDF[0], part.scale2_SD[0] = rounded(down_DF)
        return block_B[0]


def rounded(matrix_RI: Tensor) -> tuple[Tensor, Tensor]:
    """int8, and the scale of each row: at most half a scale off everywhere. A row of zeros has scale 0."""
    wide_RI = matrix_RI.float()
    if not torch.isfinite(wide_RI).all():
        raise ConfigError("a matrix with numbers that are not finite cannot be held in int8")
    scale_R = wide_RI.abs().amax(1) / MOST
    steps_RI = wide_RI / torch.where(scale_R > 0, scale_R, 1.0)[:, None]
    return steps_RI.round().clamp(-MOST, MOST).to(torch.int8), scale_R


def moe_int8(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SB: Tensor,
    layout: Int8Layout,
    slot_E: Tensor,
) -> Tensor:
    """`moe_int8_torch`, by Triton on a GPU, where there are few choices."""
    _check(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)
    if not runs_triton(x_TD) or not ids_TK.numel():
        return _moe(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)
    if ids_TK.numel() > 64 * MOST_DECODED:
        raise ConfigError(
            f"int8 experts are read once per choice; {ids_TK.numel()} choices are too many: give at most "
            f"{64 * MOST_DECODED}"
        )
    from prefetch.kernels.int8_kernel import launch_int8

    with on_device_of(x_TD):
        return launch_int8(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)


def moe_int8_torch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SB: Tensor,
    layout: Int8Layout,
    slot_E: Tensor,
) -> Tensor:
    """The definition: whole numbers times tokens, summed in float32, then a row's scale. What is between the matrices
    is rounded to the tokens' type; a token's experts are added by k. Absent experts and ids below 0 add nothing."""
    _check(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)
    return _moe(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)


def _moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SB: Tensor,
    layout: Int8Layout,
    slot_E: Tensor,
) -> Tensor:
    part, out_TD = layout.views(pool_SB), torch.zeros_like(x_TD, dtype=torch.float32)
    for t, ids_K in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids_K):
            slot = int(slot_E[expert]) if expert >= 0 else -1
            if slot < 0:
                continue
            a_G = F.linear(x_TD[t].float(), part.w13_SGD[slot].float()) * part.scale13_SG[slot]
            h_F = gated(layout.activation, a_G).to(layout.dtype).float()
            y_D = F.linear(h_F, part.w2_SDF[slot].float()) * part.scale2_SD[slot]
            out_TD[t] += y_D * weights_TK[t, k].float()
    return out_TD.to(x_TD.dtype)


def constants(layout: Int8Layout, top_k: int, *, down: bool) -> dict[str, Any]:
    """Of a launch; the compile checks make theirs here too."""
    of: dict[str, Any] = {"D": layout.hidden, "F": layout.inner, "N": layout.bytes, "K": top_k}
    of["SCALES"] = layout.scale_start // SCALE_BYTES
    tiles, size = (sum_tiles(top_k), layout.inner) if down else (UP, layout.hidden)
    of |= {"BN": tiles.columns, "BK": min(tiles.depth, next_power(size))}
    return of | (
        {"K_PAD": next_power(top_k)} if down else {"ACT": ACTIVATIONS.index(layout.activation)}
    )


def _check(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SB: Tensor,
    layout: Int8Layout,
    slot_E: Tensor,
) -> None:
    check_together(x_TD, ids_TK, weights_TK, pool_SB, slot_E)
    layout.views(pool_SB)
    if x_TD.ndim != 2 or x_TD.shape[1] != layout.hidden or x_TD.dtype != layout.dtype:
        raise ConfigError(
            f"x must be [tokens, {layout.hidden}] of {layout.dtype}; found {list(x_TD.shape)} of {x_TD.dtype}"
        )
    if ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape or len(ids_TK) != len(x_TD):
        raise ConfigError(
            f"ids and weights must be [{len(x_TD)}, choices]; found {list(ids_TK.shape)} and {list(weights_TK.shape)}"
        )
