"""Few choices (up to 16): matrix times vector, a program per choice and a few outputs. No plan, and the sum comes free.

Weights stream from memory once, in 16-byte loads, and are multiplied on the plain cores in float32; nothing here is a
matrix instruction. D hidden, F inner, K choices, N elements of a block; R = T*K rows in the order of their choices.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import triton
import triton.language as tl

from prefetch.kernels.activation_kernel import gated


@triton.jit
def _slot(ids_R, slots_E, r):
    """Where the expert of choice r lies; -1 for an absent one and for nobody."""
    e = tl.load(ids_R + r)
    return tl.load(slots_E + e, mask=e >= 0, other=-1)


@triton.jit
def _times(
    weights, x, out_O, n_out: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows `out_O` of a matrix [n_out, SIZE] times a vector."""
    even: tl.constexpr = SIZE % BK == 0 and n_out % OUT == 0
    i_I = tl.arange(0, BK)
    acc = tl.zeros([OUT, BK], tl.float32)
    for at in range(0, SIZE, BK):
        place = weights + out_O[:, None] * SIZE + at + i_I[None, :]
        if even:
            x_I = tl.load(x + at + i_I)
            w_OI = tl.load(place, eviction_policy="evict_first")
        else:
            inside_I = at + i_I < SIZE
            here = (out_O[:, None] < n_out) & inside_I[None, :]
            x_I = tl.load(x + at + i_I, mask=inside_I, other=0.0)
            w_OI = tl.load(place, mask=here, other=0.0, eviction_policy="evict_first")
        acc += w_OI.to(tl.float32) * x_I.to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def up_row(
    x_TD, pool_SN, h_RF, ids_R, slots_E,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """h[r] of BN inner places: gates and ups together, then the activation."""
    r = tl.program_id(0)
    slot = _slot(ids_R, slots_E, r)
    if slot >= 0:
        block = pool_SN + slot.to(tl.int64) * N
        g_G = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)
        a_G = _times(block, x_TD + (r // K).to(tl.int64) * D, g_G, 2 * F, D, 2 * BN, BK)
        if HAS_BIAS:
            a_G += tl.load(block + 3 * F * D + g_G, mask=g_G < 2 * F, other=0.0).to(tl.float32)
        gate_F, up_F = tl.split(tl.reshape(a_G, [BN, 2]))
        f_F = tl.program_id(1) * BN + tl.arange(0, BN)
        h_F = gated(gate_F, up_F, ACT).to(h_RF.dtype.element_ty)
        tl.store(h_RF + r.to(tl.int64) * F + f_F, h_F, mask=f_F < F)


@triton.jit
def down_row(
    h_RF, pool_SN, rows_RD, ids_R, weights_R, slots_E,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """rows[r], weighted, of the experts that are here."""
    r = tl.program_id(0)
    slot = _slot(ids_R, slots_E, r)
    if slot >= 0:
        block = pool_SN + slot.to(tl.int64) * N
        d_D = tl.program_id(1) * BN + tl.arange(0, BN)
        y_D = _times(block + 2 * F * D, h_RF + r.to(tl.int64) * F, d_D, D, F, BN, BK)
        if HAS_BIAS:
            start: tl.constexpr = 3 * F * D + 2 * F
            y_D += tl.load(block + start + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        y_D = y_D * tl.load(weights_R + r)
        tl.store(rows_RD + r.to(tl.int64) * D + d_D, y_D, mask=d_D < D)


@triton.jit
def _times_all(
    w_KD, h_K, here_K, d_D,
    D: tl.constexpr, F: tl.constexpr, K_PAD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[K_PAD, BN]: the matrix rows that `w_KD` points at times the vectors at `h_K`; 0 of who is not here."""
    i_I = tl.arange(0, BK)
    w_KDI = w_KD[:, :, None] + i_I[None, None, :]
    h_KI = h_K[:, None] + i_I[None, :]
    here_KDI = here_K[:, None, None] & (d_D[None, :, None] < D)
    acc_KDI = tl.zeros([K_PAD, BN, BK], tl.float32)
    for at in range(0, F, BK):
        inside_I = at + i_I < F
        h = tl.load(h_KI + at, mask=here_K[:, None] & inside_I[None, :], other=0.0).to(tl.float32)
        here = here_KDI & inside_I[None, None, :] if F % BK else here_KDI
        w = tl.load(w_KDI + at, mask=here, other=0.0, eviction_policy="evict_first")
        acc_KDI += w.to(tl.float32) * h[:, None, :]
    return tl.sum(acc_KDI, 2)


@triton.jit
def down_sum(
    h_RF, pool_SN, out_TD, ids_R, weights_R, slots_E,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[t]: all experts of a token at once, because one after another too few bytes are on their way. The sum over
    them is a tree of one shape, and nothing is added by two programs."""
    t = tl.program_id(0)
    k_K = tl.arange(0, K_PAD)
    d_D = tl.program_id(1) * BN + tl.arange(0, BN)
    r_K = t * K + k_K
    id_K = tl.load(ids_R + r_K, mask=k_K < K, other=-1)
    slot_K = tl.load(slots_E + id_K, mask=id_K >= 0, other=-1)
    here_K = slot_K >= 0
    block_K = pool_SN + tl.where(here_K, slot_K, 0).to(tl.int64) * N
    w_KD = block_K[:, None] + 2 * F * D + d_D[None, :] * F
    y_KD = _times_all(w_KD, h_RF + r_K.to(tl.int64) * F, here_K, d_D, D, F, K_PAD, BN, BK)
    if HAS_BIAS:
        bias = block_K[:, None] + (3 * F * D + 2 * F) + d_D[None, :]
        there = here_K[:, None] & (d_D[None, :] < D)
        y_KD += tl.load(bias, mask=there, other=0.0).to(tl.float32)
    weight_K = tl.load(weights_R + r_K, mask=here_K, other=0.0)
    out_D = tl.sum(y_KD * weight_K[:, None], 0)
    tl.store(out_TD + t.to(tl.int64) * D + d_D, out_D.to(out_TD.dtype.element_ty), mask=d_D < D)
