"""The experts of a MoE layer, from the slots where they lie: rows of every choice, their sum, and both at once.

It knows no cache: `slot_E[e]` says where expert e lies, or -1 while it is absent. Names ending in `_torch` are the
definitions; the others run their Triton twins where there is a GPU. Nothing but the definitions waits for a device.
T tokens, K choices, E experts, S slots, N elements of a block, D hidden, F inner, G = 2F.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.errors import ConfigError
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.shipped import PATHS, Config, path_of
from prefetch.kernels.twins import check_together, on_device_of, runs_triton

LIMIT, SLOPE = 7.0, 1.702  # of gpt-oss's clamped activation


def apply_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    rows_TKD: Tensor,
    *,
    path: str | None = None,
    config: Config | None = None,
    upcast: bool | None = None,
) -> None:
    """`apply_experts_torch`, by Triton on a GPU. `path` and `config` are chosen by the number of rows alone, so that
    experts which come late, in a second call with their slots, get the same numbers."""
    _check(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, path)
    _check_rows(x_TD, ids_TK, rows_TKD)
    if not runs_triton(x_TD):
        _apply(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, rows_TKD)
    elif ids_TK.numel():
        from prefetch.kernels.launch import launch_experts

        path = path or path_of(*ids_TK.shape)
        operands = x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E
        with on_device_of(x_TD):
            launch_experts(path, *operands, rows_TKD, config=config, upcast_wanted=upcast)


def apply_experts_torch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    rows_TKD: Tensor,
) -> None:
    """The definition: row (t, k) becomes the weighted output of expert ids[t, k] for token t, where that expert has a
    slot; every other row is left as it is. An id below 0 is a choice of nobody. Products are summed in float32; what
    is between the two matrices is rounded to the experts' type."""
    _check(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, None)
    _check_rows(x_TD, ids_TK, rows_TKD)
    _apply(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, rows_TKD)


def combine(
    rows_TKD: Tensor,
    ids_TK: Tensor | None = None,
    *,
    slot_E: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`combine_torch`, by one kernel on a GPU."""
    _check_combined(rows_TKD, ids_TK, slot_E)
    if not runs_triton(rows_TKD) or not rows_TKD.numel():
        return _combine(rows_TKD, ids_TK, slot_E, dtype)
    from prefetch.kernels.combine import launch_combine

    with on_device_of(rows_TKD):
        return launch_combine(rows_TKD, ids_TK, slot_E, dtype or rows_TKD.dtype)


def combine_torch(
    rows_TKD: Tensor,
    ids_TK: Tensor | None = None,
    *,
    slot_E: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition: a token's rows one after another onto 0, always in the same order. With `ids_TK` that is by
    rising expert, as a loop over experts adds them, and rows of nobody (or, with `slot_E`, of an absent expert) are
    not read; without, it is by k. The sum is float32 and is rounded once, to `dtype` (the rows' by default)."""
    _check_combined(rows_TKD, ids_TK, slot_E)
    return _combine(rows_TKD, ids_TK, slot_E, dtype)


def moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    *,
    path: str | None = None,
    config: Config | None = None,
    upcast: bool | None = None,
) -> Tensor:
    """`moe_torch`, by Triton on a GPU: up to 16 choices without a plan and with the sum folded in (by k), then weights
    on the wide side of the matrix instruction up to 64 tokens, then tokens."""
    _check(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, path)
    if not runs_triton(x_TD) or not ids_TK.numel():
        return _moe(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E)
    from prefetch.kernels.launch import launch_moe

    path = path or path_of(*ids_TK.shape)
    operands = x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E
    with on_device_of(x_TD):
        return launch_moe(path, *operands, config=config, upcast_wanted=upcast)


def moe_torch(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
) -> Tensor:
    """The definition: rows, then their sum, in the type of x. Absent experts add nothing."""
    _check(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, None)
    return _moe(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E)


def gated(activation: str, a_RG: Tensor) -> Tensor:
    """What goes into the down matrix, from gates and ups in turn along the last axis."""
    # side by side, as models have them: torch's exp rounds differently by how its numbers lie in memory
    gate_RF, up_RF = torch.cat([a_RG[..., 0::2], a_RG[..., 1::2]], -1).chunk(2, -1)
    if activation == "silu":
        return F.silu(gate_RF) * up_RF
    if activation == "gelu":
        return F.gelu(gate_RF) * up_RF
    gate_RF, up_RF = gate_RF.clamp(max=LIMIT), up_RF.clamp(-LIMIT, LIMIT)
    return (up_RF + 1) * (gate_RF * torch.sigmoid(gate_RF * SLOPE))


def _apply(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    rows_TKD: Tensor,
) -> None:
    parts, slots, start = layout.views(pool_SN), slot_E.tolist(), 0
    # by expert, then by k: rows of a product come in the order of an eager loop
    id_R, place_R = ids_TK.T.flatten().sort(stable=True)
    t_R, k_R = place_R % max(1, len(x_TD)), place_R // max(1, len(x_TD))
    expert_X, n_X = id_R.unique_consecutive(return_counts=True)
    for expert, n in zip(expert_X.tolist(), n_X.tolist(), strict=True):
        t, k = t_R[start : start + n], k_R[start : start + n]
        start += n
        slot = slots[expert] if expert >= 0 else -1
        if slot < 0:
            continue
        a_RG = F.linear(x_TD[t].float(), parts.w13_SGD[slot].float())
        a_RG = a_RG if parts.b13_SG is None else a_RG + parts.b13_SG[slot].float()
        h_RF = gated(layout.activation, a_RG).to(layout.dtype).float()
        y_RD = F.linear(h_RF, parts.w2_SDF[slot].float())
        y_RD = y_RD if parts.b2_SD is None else y_RD + parts.b2_SD[slot].float()
        rows_TKD[t, k] = y_RD * weights_TK[t, k, None].float()


def _combine(
    rows_TKD: Tensor, ids_TK: Tensor | None, slot_E: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    dtype = dtype or rows_TKD.dtype
    out_TD = torch.zeros(len(rows_TKD), rows_TKD.shape[2], device=rows_TKD.device)
    if ids_TK is None:
        for row_TD in rows_TKD.unbind(1):
            out_TD += row_TD
        return out_TD.to(dtype)
    counted_TK = ids_TK >= 0
    if slot_E is not None:
        counted_TK = counted_TK & (slot_E[ids_TK.clamp(min=0).long()] >= 0)
    order_TK = ids_TK.sort(dim=1, stable=True).indices
    counted_TK = counted_TK.gather(1, order_TK)
    rows_TKD = rows_TKD.gather(1, order_TK[..., None].expand_as(rows_TKD)).float()
    for row_TD in torch.where(counted_TK[..., None], rows_TKD, 0.0).unbind(1):
        out_TD += row_TD
    return out_TD.to(dtype)


def _moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
) -> Tensor:
    rows_TKD = torch.empty(*ids_TK.shape, layout.hidden, dtype=torch.float32, device=x_TD.device)
    _apply(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E, rows_TKD)
    return _combine(rows_TKD, ids_TK, slot_E, x_TD.dtype)


def _check(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    path: str | None,
) -> None:
    check_together(x_TD, ids_TK, weights_TK, pool_SN, slot_E)
    if x_TD.ndim != 2 or x_TD.shape[1] != layout.hidden or x_TD.dtype != layout.dtype:
        raise ConfigError(
            f"x must be [tokens, {layout.hidden}] of {layout.dtype}; found {list(x_TD.shape)} of {x_TD.dtype}"
        )
    if ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape or len(ids_TK) != len(x_TD):
        raise ConfigError(
            f"ids and weights must be [{len(x_TD)}, choices]; "
            f"found {list(ids_TK.shape)} and {list(weights_TK.shape)}"
        )
    if slot_E.ndim != 1 or slot_E.is_floating_point() or ids_TK.is_floating_point():
        raise ConfigError("ids and slots are integers, and there is one slot per expert")
    if pool_SN.dtype != layout.dtype or pool_SN.ndim != 2 or pool_SN.shape[1] != layout.numel:
        raise ConfigError(
            f"the pool must be [slots, {layout.numel}] of {layout.dtype}; "
            f"found {list(pool_SN.shape)} of {pool_SN.dtype}"
        )
    if path is not None and path not in PATHS:
        raise ConfigError(f"path {path!r} is not known; use one of {', '.join(PATHS)}")


def _check_rows(x_TD: Tensor, ids_TK: Tensor, rows_TKD: Tensor) -> None:
    check_together(x_TD, rows_TKD)
    expected = (*ids_TK.shape, x_TD.shape[1])
    if (
        rows_TKD.shape != expected
        or rows_TKD.dtype != torch.float32
        or not rows_TKD.is_contiguous()
    ):
        raise ConfigError(
            f"rows must be {list(expected)} of torch.float32 in one piece; "
            f"found {list(rows_TKD.shape)} of {rows_TKD.dtype}"
        )


def _check_combined(rows_TKD: Tensor, ids_TK: Tensor | None, slot_E: Tensor | None) -> None:
    check_together(rows_TKD, ids_TK, slot_E)
    if rows_TKD.ndim != 3 or (ids_TK is not None and ids_TK.shape != rows_TKD.shape[:2]):
        found = None if ids_TK is None else list(ids_TK.shape)
        raise ConfigError(f"rows are [T, K, D], ids [T, K]; found {list(rows_TKD.shape)}, {found}")
    if slot_E is not None and ids_TK is None:
        raise ConfigError("which experts are absent is only known with their ids: pass ids_TK too")
