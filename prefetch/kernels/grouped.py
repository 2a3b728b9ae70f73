"""Many tokens (prefill): rows gathered by expert on the wide side, weights by TMA where their rows are 16-byte pieces.

Neighbouring programs take tiles of the same expert and the same weights, which they then find in L2. M rows of a tile,
D hidden, F inner, K choices, N elements of a block.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import triton
import triton.language as tl

from prefetch.kernels.activation_kernel import gated


@triton.jit
def _product(
    matrix, weights, slot, first, out_O, x_M, here_M, n_out: tl.constexpr, SIZE: tl.constexpr,
    OUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BM, OUT]: the rows that `x_M` points at times rows `first` and on of a matrix [n_out, SIZE]."""
    even: tl.constexpr = SIZE % BK == 0
    i_I = tl.arange(0, BK)
    x_MI = x_M[:, None] + i_I[None, :]
    acc = tl.zeros([BM, OUT], tl.float32)
    for at in range(0, SIZE, BK):
        inside_I = at + i_I < SIZE
        if even:
            x = tl.load(x_MI + at, mask=here_M[:, None], other=0.0)
        else:
            x = tl.load(x_MI + at, mask=here_M[:, None] & inside_I[None, :], other=0.0)
        if TMA:  # what is outside of the matrix is 0
            w = matrix.load([slot, first, at]).reshape(OUT, BK).T
        else:
            place = weights + out_O[None, :] * SIZE + at + i_I[:, None]
            w = tl.load(place, mask=(out_O[None, :] < n_out) & inside_I[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def up_grouped(
    matrix, x_TD, pool_SN, h_RF, perm_R, starts_E1, tile_expert, tile_slot, tile_row,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h, in the plan's order, of one tile and BN inner places."""
    slot = tl.load(tile_slot + tl.program_id(0))
    if slot >= 0:
        e = tl.load(tile_expert + tl.program_id(0))
        r_M = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BM)
        here_M = r_M < tl.load(starts_E1 + e + 1)
        t_M = tl.load(perm_R + r_M, mask=here_M, other=0) // K
        block = pool_SN + slot.to(tl.int64) * N
        first = tl.program_id(1) * 2 * BN
        g_G = first + tl.arange(0, 2 * BN)
        x_M = x_TD + t_M.to(tl.int64) * D
        a_MG = _product(
            matrix, block, slot, first, g_G, x_M, here_M, 2 * F, D, 2 * BN, BM, BK, TMA, UPCAST
        )
        if HAS_BIAS:
            bias_G = tl.load(block + 3 * F * D + g_G, mask=g_G < 2 * F, other=0.0).to(tl.float32)
            a_MG += bias_G[None, :]
        gate_MF, up_MF = tl.split(tl.reshape(a_MG, [BM, BN, 2]))
        f_F = tl.program_id(1) * BN + tl.arange(0, BN)
        h_MF = gated(gate_MF, up_MF, ACT).to(h_RF.dtype.element_ty)
        place = h_RF + r_M.to(tl.int64)[:, None] * F + f_F[None, :]
        tl.store(place, h_MF, mask=here_M[:, None] & (f_F[None, :] < F))


@triton.jit
def down_grouped(
    matrix, h_RF, pool_SN, rows_RD, weights_R, perm_R, starts_E1, tile_expert, tile_slot, tile_row,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows, weighted and back in the order of the choices."""
    slot = tl.load(tile_slot + tl.program_id(0))
    if slot >= 0:
        e = tl.load(tile_expert + tl.program_id(0))
        r_M = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BM)
        here_M = r_M < tl.load(starts_E1 + e + 1)
        block = pool_SN + slot.to(tl.int64) * N
        first = tl.program_id(1) * BN
        d_D = first + tl.arange(0, BN)
        h_M = h_RF + r_M.to(tl.int64) * F
        y_MD = _product(
            matrix, block + 2 * F * D, slot, first, d_D, h_M, here_M, D, F, BN, BM, BK, TMA, UPCAST
        )
        if HAS_BIAS:
            start: tl.constexpr = 3 * F * D + 2 * F
            y_MD += tl.load(block + start + d_D, mask=d_D < D, other=0.0).to(tl.float32)[None, :]
        flat_M = tl.load(perm_R + r_M, mask=here_M, other=0)
        y_MD = y_MD * tl.load(weights_R + flat_M, mask=here_M, other=0.0)[:, None]
        place = rows_RD + flat_M.to(tl.int64)[:, None] * D + d_D[None, :]
        tl.store(place, y_MD, mask=here_M[:, None] & (d_D[None, :] < D))
