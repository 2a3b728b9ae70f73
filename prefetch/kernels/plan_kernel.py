"""The Triton twin of the plan: one program sorts up to 2,048 rows and writes everything that the experts need.

It knows no weights. Sorting expert * BLOCK + place is stable, because no two keys are equal, and needs no table of rows
by experts, which would not fit into shared memory. R rows, E experts (padded), B tiles.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefetch.kernels.plan import most_tiles
from prefetch.kernels.shipped import next_power, plan_warps


@triton.jit
def _tiles(
    e_E, count_E, start_E, slot_E, tile_expert, tile_slot, tile_row, n_tiles, B,
    BM: tl.constexpr, B_PAD: tl.constexpr,
):  # fmt: skip
    """Tile j of every expert in one store; entries past the last tile are -1."""
    tiles_E = (count_E + BM - 1) // BM
    first_E = tl.cumsum(tiles_E, 0) - tiles_E
    total = tl.sum(tiles_E, 0)
    tl.store(n_tiles, total)
    most = tl.max(tiles_E, 0)
    j = 0
    while j < most:
        has = tiles_E > j
        tl.store(tile_expert + first_E + j, e_E, mask=has)
        tl.store(tile_slot + first_E + j, slot_E, mask=has)
        tl.store(tile_row + first_E + j, start_E + j * BM, mask=has)
        j += 1
    b_B = tl.arange(0, B_PAD)
    unused = (b_B >= total) & (b_B < B)
    nothing_B = tl.full([B_PAD], -1, tl.int32)
    tl.store(tile_expert + b_B, nothing_B, mask=unused)
    tl.store(tile_slot + b_B, nothing_B, mask=unused)
    tl.store(tile_row + b_B, nothing_B + 1, mask=unused)


@triton.jit(do_not_specialize=["R", "B"])
def plan_rows(
    ids_R, slots_E, starts_E1, perm_R, tile_expert, tile_slot, tile_row, n_tiles, missing_E, n_missing, R, B,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, B_PAD: tl.constexpr,
):  # fmt: skip
    """One program. A choice of nobody (id < 0) is sorted last and counted nowhere.

    How many rows and tiles there are is told at run time: else every length of a prompt were a kernel of its own.
    """
    r_R = tl.arange(0, BLOCK)
    id_R = tl.load(ids_R + r_R, mask=r_R < R, other=-1).to(tl.int32)
    chosen_R = id_R >= 0
    key_R = tl.where(chosen_R, id_R, tl.where(r_R < R, E_PAD, E_PAD + 1)) * BLOCK + r_R
    tl.store(perm_R + r_R, tl.sort(key_R) % BLOCK, mask=r_R < R)
    e_E = tl.arange(0, E_PAD)
    count_E = tl.histogram(tl.where(chosen_R, id_R, 0), E_PAD, mask=chosen_R).to(tl.int32)
    start_E = tl.cumsum(count_E, 0) - count_E
    tl.store(starts_E1 + e_E, start_E, mask=e_E < E)
    tl.store(starts_E1 + E, tl.sum(count_E, 0))
    slot_E = tl.load(slots_E + e_E, mask=e_E < E, other=-1).to(tl.int32)
    _tiles(e_E, count_E, start_E, slot_E, tile_expert, tile_slot, tile_row, n_tiles, B, BM, B_PAD)
    is_missing = ((count_E > 0) & (slot_E < 0)).to(tl.int32)
    n = tl.sum(is_missing, 0)
    tl.store(n_missing, n)
    tl.store(missing_E + tl.cumsum(is_missing, 0) - 1, e_E, mask=is_missing == 1)
    tl.store(missing_E + e_E, tl.full([E_PAD], -1, tl.int32), mask=(e_E >= n) & (e_E < E))


def tiles_padded(most_rows: int, n_experts: int, block: int) -> int:
    """Of every list that is sorted in the same block: as many tiles as the longest of them may have."""
    return next_power(most_tiles(most_rows, n_experts, block))


def launch_plan(ids_TK: Tensor, slot_E: Tensor, block: int) -> tuple[Tensor, ...]:
    """The tensors of a `Plan`, in its order. The whole list is one allocation."""
    R, E = ids_TK.numel(), slot_E.numel()
    B = most_tiles(R, E, block)
    sizes = (E + 1, R, B, B, B, 1, E, 1)
    padded = [
        -(-size // 4) * 4 for size in sizes
    ]  # 16 bytes: else every start would be a kernel of its own
    whole = torch.empty(sum(padded), dtype=torch.int32, device=ids_TK.device)
    parts = [part[:size] for part, size in zip(whole.split(padded), sizes, strict=True)]
    BLOCK = max(16, next_power(R))
    plan_rows[(1,)](
        ids_TK.contiguous(), slot_E.contiguous(), *parts, R, B,
        E=E, E_PAD=max(16, next_power(E)), BLOCK=BLOCK, BM=block, B_PAD=tiles_padded(BLOCK, E, block),
        num_warps=plan_warps(BLOCK), enable_fp_fusion=False,
    )  # fmt: skip
    return tuple(parts)
