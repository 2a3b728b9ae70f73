"""In what order rows are computed: sorted by expert, cut into tiles, each tile with the slot where its expert lies.

It knows no weights. `plan_torch` is the definition; nothing here waits for the device, so a CUDA graph can hold it.
T tokens, K choices, R = T*K rows, E experts, B tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefetch.errors import ConfigError
from prefetch.kernels.twins import check_together, on_device_of, runs_triton

MOST_SORTED = 2048  # rows that one program sorts; a longer list goes through torch's own sort


class Plan(NamedTuple):
    """All int32 and on the device of the ids. Row r of the order is choice `perm_R[r]` of the flat [T*K] choices."""

    starts_E1: Tensor  # the order's rows of expert e are starts[e] to starts[e + 1]
    perm_R: Tensor  # rows of one expert in the order of their tokens; choices of nobody (id < 0) come last
    tile_expert_B: Tensor  # -1 = no tile; a tile never holds rows of two experts
    tile_slot_B: Tensor  # -1 = no tile, or its expert is absent
    tile_row_B: Tensor  # its first row of the order
    n_tiles_1: Tensor
    missing_E: Tensor  # needed and absent, by rising id, then -1
    n_missing_1: Tensor
    block: int  # rows of a full tile


def most_tiles(n_rows: int, n_experts: int, block: int) -> int:
    """No routing needs more: every expert may have one tile that is not full."""
    return min(n_rows, n_experts) + n_rows // block


def plan(ids_TK: Tensor, slot_E: Tensor, block: int) -> Plan:
    """`plan_torch`, by one kernel on a GPU where one program can sort all rows."""
    _check(ids_TK, slot_E, block)
    if not runs_triton(ids_TK) or not 0 < ids_TK.numel() <= MOST_SORTED:
        return _plan(ids_TK, slot_E, block)
    from prefetch.kernels.plan_kernel import launch_plan

    with on_device_of(ids_TK):
        return Plan._make((*launch_plan(ids_TK, slot_E, block), block))


def plan_torch(ids_TK: Tensor, slot_E: Tensor, block: int) -> Plan:
    """The definition."""
    _check(ids_TK, slot_E, block)
    return _plan(ids_TK, slot_E, block)


def _plan(ids_TK: Tensor, slot_E: Tensor, block: int) -> Plan:
    E, device = slot_E.numel(), ids_TK.device
    id_R = ids_TK.flatten().long()
    sorted_R, perm_R = torch.where(id_R < 0, E, id_R).sort(stable=True)
    starts_E1 = torch.searchsorted(sorted_R, torch.arange(E + 1, device=device))
    count_E = starts_E1.diff()
    end_E = ((count_E + block - 1) // block).cumsum(0)  # tiles up to and with expert e
    tile_B = torch.arange(most_tiles(id_R.numel(), E, block), device=device)
    is_tile_B = tile_B < end_E[-1]
    expert_B = torch.searchsorted(end_E, tile_B, right=True).clamp(max=E - 1)
    first_B = (end_E - (count_E + block - 1) // block)[expert_B]
    row_B = starts_E1[expert_B] + (tile_B - first_B) * block
    missing_E = (count_E > 0) & (slot_E < 0)
    e_E = torch.arange(E, device=device)
    listed_E = torch.where(missing_E, e_E, E).sort().values
    return Plan(
        starts_E1.int(),
        perm_R.int(),
        torch.where(is_tile_B, expert_B, -1).int(),
        torch.where(is_tile_B, slot_E.long()[expert_B], -1).int(),
        torch.where(is_tile_B, row_B, 0).int(),
        end_E[-1:].int(),
        torch.where(listed_E < E, listed_E, -1).int(),
        missing_E.sum().int().reshape(1),
        block,
    )


def _check(ids_TK: Tensor, slot_E: Tensor, block: int) -> None:
    check_together(ids_TK, slot_E)
    if slot_E.ndim != 1 or not slot_E.numel():
        raise ConfigError(f"slot_E needs one entry per expert; found {list(slot_E.shape)}")
    if ids_TK.ndim != 2:
        raise ConfigError(f"ids must be [tokens, choices]; found {list(ids_TK.shape)}")
    if ids_TK.is_floating_point() or slot_E.is_floating_point():
        raise ConfigError(f"ids and slots are integers; found {ids_TK.dtype}, {slot_E.dtype}")
    if block < 1:
        raise ConfigError(f"a tile needs at least one row; found {block}")
