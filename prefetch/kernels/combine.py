"""The sum over a token's choices, in a fixed order: a program per token and a stretch of outputs, no atomics.

Which order is said where the sum is defined (`experts.combine_torch`). T tokens, K choices, D hidden.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefetch.kernels.shipped import next_power

BLOCK = 256
UNROLL = tl.constexpr(8)
NOBODY = tl.constexpr(2**20)  # as an expert's id: after all others


@triton.jit
def sum_rows(
    rows_TKD, out_TD, ids_TK, slots_E,
    D: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BD: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BD + tl.arange(0, BD)
    k_K = tl.arange(0, K_PAD)
    key_K = k_K
    if HAS_IDS:
        id_K = tl.load(ids_TK + t * K + k_K, mask=k_K < K, other=-1).to(tl.int32)
        counts = id_K >= 0
        if HAS_SLOTS:
            counts = counts & (tl.load(slots_E + id_K, mask=counts, other=-1) >= 0)
        key_K = tl.sort(tl.where(counts, id_K, NOBODY) * K_PAD + k_K)
    out_D = tl.zeros([BD], tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):  # so that loads do not wait for each other
        key = tl.sum(tl.where(k_K == j, key_K, 0), 0)
        row = rows_TKD + (t * K + key % K_PAD) * D
        counted = tl.where(key < NOBODY * K_PAD, D, 0)
        out_D += tl.load(row + d_D, mask=d_D < counted, other=0.0).to(tl.float32)
    tl.store(out_TD + t * D + d_D, out_D.to(out_TD.dtype.element_ty), mask=d_D < D)


def launch_combine(
    rows_TKD: Tensor, ids_TK: Tensor | None, slot_E: Tensor | None, dtype: torch.dtype
) -> Tensor:
    T, K, D = rows_TKD.shape
    rows_TKD = rows_TKD.contiguous()
    out_TD = torch.empty(T, D, dtype=dtype, device=rows_TKD.device)
    ids = rows_TKD if ids_TK is None else ids_TK.contiguous()  # what is not used is not read
    slots = ids if slot_E is None else slot_E.contiguous()
    sum_rows[(T, triton.cdiv(D, BLOCK))](
        rows_TKD, out_TD, ids, slots,
        D=D, K=K, K_PAD=max(2, next_power(K)), BD=BLOCK,
        HAS_IDS=ids_TK is not None, HAS_SLOTS=slot_E is not None, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_TD
