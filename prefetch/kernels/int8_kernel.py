"""int8 experts for few choices: as `decode`, with a scale per row of a matrix. Half the bytes are read.

`scales_SM` is the pool seen as float32; M = N / 4.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefetch.errors import ConfigError
from prefetch.kernels.activation_kernel import gated
from prefetch.kernels.decode import _slot, _times, _times_all
from prefetch.kernels.int8 import UP, Int8Layout, constants
from prefetch.kernels.launch import options
from prefetch.kernels.shipped import sum_tiles


@triton.jit
def up_int8(
    x_TD, pool_SN, scales_SM, h_RF, ids_R, slots_E,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, N: tl.constexpr, SCALES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """h[r] of BN inner places: gates and ups together, then the activation."""
    r = tl.program_id(0)
    slot = _slot(ids_R, slots_E, r)
    if slot >= 0:
        block = pool_SN + slot.to(tl.int64) * N
        g_G = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)
        a_G = _times(block, x_TD + (r // K).to(tl.int64) * D, g_G, 2 * F, D, 2 * BN, BK)
        scale = scales_SM + slot.to(tl.int64) * (N // 4) + SCALES + g_G
        a_G *= tl.load(scale, mask=g_G < 2 * F, other=0.0)
        gate_F, up_F = tl.split(tl.reshape(a_G, [BN, 2]))
        f_F = tl.program_id(1) * BN + tl.arange(0, BN)
        h_F = gated(gate_F, up_F, ACT).to(h_RF.dtype.element_ty)
        tl.store(h_RF + r.to(tl.int64) * F + f_F, h_F, mask=f_F < F)


@triton.jit
def down_int8(
    h_RF, pool_SN, scales_SM, out_TD, ids_R, weights_R, slots_E,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    SCALES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[t]: all experts of a token at once, as `decode.down_sum`."""
    t = tl.program_id(0)
    k_K = tl.arange(0, K_PAD)
    d_D = tl.program_id(1) * BN + tl.arange(0, BN)
    r_K = t * K + k_K
    id_K = tl.load(ids_R + r_K, mask=k_K < K, other=-1)
    slot_K = tl.load(slots_E + id_K, mask=id_K >= 0, other=-1)
    here_K = slot_K >= 0
    at_K = tl.where(here_K, slot_K, 0).to(tl.int64)
    w_KD = (pool_SN + at_K * N)[:, None] + 2 * F * D + d_D[None, :] * F
    y_KD = _times_all(w_KD, h_RF + r_K.to(tl.int64) * F, here_K, d_D, D, F, K_PAD, BN, BK)
    scale = (scales_SM + at_K * (N // 4))[:, None] + SCALES + 2 * F + d_D[None, :]
    y_KD *= tl.load(scale, mask=here_K[:, None] & (d_D[None, :] < D), other=0.0)
    weight_K = tl.load(weights_R + r_K, mask=here_K, other=0.0)
    out_D = tl.sum(y_KD * weight_K[:, None], 0)
    tl.store(out_TD + t.to(tl.int64) * D + d_D, out_D.to(out_TD.dtype.element_ty), mask=d_D < D)


def launch_int8(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SB: Tensor,
    layout: Int8Layout,
    slot_E: Tensor,
) -> Tensor:
    """Two launches."""
    if not pool_SB.is_contiguous():
        raise ConfigError("the pool must lie in one piece: its slots are found by multiplication")
    (T, K), x_TD, ids_TK = ids_TK.shape, x_TD.contiguous(), ids_TK.contiguous()
    slot_E, scales_SM = slot_E.contiguous(), pool_SB.view(torch.float32)
    h_RF = torch.empty(T * K, layout.inner, dtype=layout.dtype, device=x_TD.device)
    up_int8[(T * K, triton.cdiv(layout.inner, UP.columns))](
        x_TD, pool_SB, scales_SM, h_RF, ids_TK, slot_E,
        **constants(layout, K, down=False), **options(UP),
    )  # fmt: skip
    out_TD, tiles = torch.empty_like(x_TD), sum_tiles(K)
    down_int8[(T, triton.cdiv(layout.hidden, tiles.columns))](
        h_RF, pool_SB, scales_SM, out_TD, ids_TK, weights_TK.float().contiguous(), slot_E,
        **constants(layout, K, down=True), **options(tiles),
    )  # fmt: skip
    return out_TD
