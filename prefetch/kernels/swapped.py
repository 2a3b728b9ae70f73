"""Up to 64 tokens: weights take the wide side of the matrix instruction, tokens the narrow one (A and B swapped).

An expert has few rows here; with rows on the wide side (64) most of the instruction would multiply nothing. What is
computed is `grouped`'s product, transposed. M rows of a tile, D hidden, F inner, K choices, N elements of a block.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import triton
import triton.language as tl

from prefetch.kernels.activation_kernel import gated


@triton.jit
def _product(
    weights, out_O, x_M, here_M, n_out: tl.constexpr, SIZE: tl.constexpr,
    OUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[OUT, BM]: rows `out_O` of a matrix [n_out, SIZE] times the rows that `x_M` points at."""
    even: tl.constexpr = SIZE % BK == 0 and n_out % OUT == 0
    i_I = tl.arange(0, BK)
    w_OI = weights + out_O[:, None] * SIZE + i_I[None, :]
    x_IM = x_M[None, :] + i_I[:, None]
    acc = tl.zeros([OUT, BM], tl.float32)
    for at in range(0, SIZE, BK):
        if even:
            w = tl.load(w_OI + at, eviction_policy="evict_first")
            x = tl.load(x_IM + at, mask=here_M[None, :], other=0.0)
        else:
            inside_I = at + i_I < SIZE
            here = (out_O[:, None] < n_out) & inside_I[None, :]
            w = tl.load(w_OI + at, mask=here, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_IM + at, mask=here_M[None, :] & inside_I[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def up_swapped(
    x_TD, pool_SN, h_RF, perm_R, starts_E1, tile_expert, tile_slot, tile_row,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h, in the plan's order, of one tile and BN inner places."""
    slot = tl.load(tile_slot + tl.program_id(0))
    if slot >= 0:
        e = tl.load(tile_expert + tl.program_id(0))
        r_M = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BM)
        here_M = r_M < tl.load(starts_E1 + e + 1)
        t_M = tl.load(perm_R + r_M, mask=here_M, other=0) // K
        block = pool_SN + slot.to(tl.int64) * N
        g_G = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)
        x_M = x_TD + t_M.to(tl.int64) * D
        a_GM = _product(block, g_G, x_M, here_M, 2 * F, D, 2 * BN, BM, BK, UPCAST)
        if HAS_BIAS:
            bias_G = tl.load(block + 3 * F * D + g_G, mask=g_G < 2 * F, other=0.0).to(tl.float32)
            a_GM += bias_G[:, None]
        pairs = tl.permute(tl.reshape(a_GM, [BN, 2, BM]), (0, 2, 1))
        gate_FM, up_FM = tl.split(pairs)
        f_F = tl.program_id(1) * BN + tl.arange(0, BN)
        h_FM = gated(gate_FM, up_FM, ACT).to(h_RF.dtype.element_ty)
        place = h_RF + r_M.to(tl.int64)[None, :] * F + f_F[:, None]
        tl.store(place, h_FM, mask=here_M[None, :] & (f_F[:, None] < F))


@triton.jit
def down_swapped(
    h_RF, pool_SN, rows_RD, weights_R, perm_R, starts_E1, tile_expert, tile_slot, tile_row,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows, weighted and back in the order of the choices."""
    slot = tl.load(tile_slot + tl.program_id(0))
    if slot >= 0:
        e = tl.load(tile_expert + tl.program_id(0))
        r_M = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BM)
        here_M = r_M < tl.load(starts_E1 + e + 1)
        block = pool_SN + slot.to(tl.int64) * N
        d_D = tl.program_id(1) * BN + tl.arange(0, BN)
        h_M = h_RF + r_M.to(tl.int64) * F
        y_DM = _product(block + 2 * F * D, d_D, h_M, here_M, D, F, BN, BM, BK, UPCAST)
        if HAS_BIAS:
            start: tl.constexpr = 3 * F * D + 2 * F
            y_DM += tl.load(block + start + d_D, mask=d_D < D, other=0.0).to(tl.float32)[:, None]
        flat_M = tl.load(perm_R + r_M, mask=here_M, other=0)
        y_DM = y_DM * tl.load(weights_R + flat_M, mask=here_M, other=0.0)[None, :]
        place = rows_RD + flat_M.to(tl.int64)[None, :] * D + d_D[:, None]
        tl.store(place, y_DM, mask=here_M[None, :] & (d_D[:, None] < D))
