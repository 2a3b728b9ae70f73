"""Puts the experts' kernels on the device: grids, constants and scratch memory of each of the three paths.

It knows no arithmetic. The constants of every launch are made here, by functions that the compile checks call too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prefetch.errors import ConfigError
from prefetch.kernels.combine import launch_combine
from prefetch.kernels.decode import down_row, down_sum, up_row
from prefetch.kernels.grouped import down_grouped, up_grouped
from prefetch.kernels.layout import ACTIVATIONS, ExpertLayout
from prefetch.kernels.plan import Plan, plan
from prefetch.kernels.shipped import MOST_DECODED, Config, Tiles, config_of, next_power, sum_tiles
from prefetch.kernels.swapped import down_swapped, up_swapped
from prefetch.kernels.twins import upcast

TMA_PIECE = 16  # bytes of which a row must be a multiple


def up_constants(
    path: str, layout: ExpertLayout, top_k: int, tiles: Tiles, upcast_: bool
) -> dict[str, Any]:
    constants = _constants(path, layout, tiles, upcast_, layout.hidden)
    return {"K": top_k, "ACT": ACTIVATIONS.index(layout.activation), **constants}


def down_constants(path: str, layout: ExpertLayout, tiles: Tiles, upcast_: bool) -> dict[str, Any]:
    return _constants(path, layout, tiles, upcast_, layout.inner)


def _constants(
    path: str, layout: ExpertLayout, tiles: Tiles, upcast_: bool, size: int
) -> dict[str, Any]:
    of = {"D": layout.hidden, "F": layout.inner, "N": layout.numel, "HAS_BIAS": layout.has_bias}
    of |= {"BN": tiles.columns, "BK": tiles.depth}
    if path == "decode":
        return of | {"BK": min(tiles.depth, next_power(size))}
    of |= {"BM": tiles.rows, "UPCAST": upcast_}
    return of | {"TMA": by_tma(layout, size)} if path == "grouped" else of


def sum_constants(layout: ExpertLayout, top_k: int) -> dict[str, Any]:
    """Of the down product that sums over a token's experts."""
    of = _constants("decode", layout, sum_tiles(top_k), False, layout.inner)
    return of | {"K": top_k, "K_PAD": next_power(top_k)}


def by_tma(layout: ExpertLayout, size: int) -> bool:
    """Whether a matrix with rows of `size` may be read by the tensor copy engine. float32 needs other boxes."""
    return layout.dtype != torch.float32 and size * layout.dtype.itemsize % TMA_PIECE == 0


def options(tiles: Tiles) -> dict[str, Any]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}


def launch_experts(
    path: str,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    rows_TKD: Tensor,
    *,
    config: Config | None,
    upcast_wanted: bool | None,
) -> None:
    """Weighted rows of every choice whose expert has a slot."""
    wide = upcast(layout.dtype, upcast_wanted)
    x_TD, pool_SN = x_TD.contiguous(), _whole(pool_SN)
    ids_TK, slot_E = ids_TK.contiguous(), slot_E.contiguous()
    weights_TK = weights_TK.float().contiguous()
    config = config or config_of(path, layout, ids_TK.numel(), slot_E.numel())
    if path == "decode":
        h_RF = _up_rows(x_TD, ids_TK, pool_SN, layout, slot_E, config.up)
        grid = (ids_TK.numel(), triton.cdiv(layout.hidden, config.down.columns))
        down_row[grid](
            h_RF, pool_SN, rows_TKD, ids_TK, weights_TK, slot_E,
            **down_constants(path, layout, config.down, wide), **options(config.down),
        )  # fmt: skip
        return
    of = plan(ids_TK, slot_E, config.up.rows)
    h_RF = torch.empty(ids_TK.numel(), layout.inner, dtype=layout.dtype, device=x_TD.device)
    k = ids_TK.shape[1]
    _planned_up(path, x_TD, pool_SN, h_RF, of, layout, k, config.up, wide)
    _planned_down(path, h_RF, pool_SN, rows_TKD, weights_TK, of, layout, config.down, wide)


def launch_moe(
    path: str,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    *,
    config: Config | None,
    upcast_wanted: bool | None,
) -> Tensor:
    """The layer's output: rows and their sum, in one launch less on the decode path."""
    T, K = ids_TK.shape
    if path != "decode":
        rows_TKD = torch.empty(T, K, layout.hidden, dtype=torch.float32, device=x_TD.device)
        operands = x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E
        launch_experts(path, *operands, rows_TKD, config=config, upcast_wanted=upcast_wanted)
        return launch_combine(rows_TKD, ids_TK, slot_E, x_TD.dtype)
    x_TD, pool_SN = x_TD.contiguous(), _whole(pool_SN)
    ids_TK, slot_E = ids_TK.contiguous(), slot_E.contiguous()
    config = config or config_of(path, layout, T * K, slot_E.numel())
    h_RF = _up_rows(x_TD, ids_TK, pool_SN, layout, slot_E, config.up)
    out_TD, tiles = torch.empty_like(x_TD), sum_tiles(K)
    down_sum[(T, triton.cdiv(layout.hidden, tiles.columns))](
        h_RF, pool_SN, out_TD, ids_TK, weights_TK.float().contiguous(), slot_E,
        **sum_constants(layout, K), **options(tiles),
    )  # fmt: skip
    return out_TD


def _up_rows(
    x_TD: Tensor,
    ids_TK: Tensor,
    pool_SN: Tensor,
    layout: ExpertLayout,
    slot_E: Tensor,
    tiles: Tiles,
) -> Tensor:
    R, K = ids_TK.numel(), ids_TK.shape[1]
    if R > 64 * MOST_DECODED:
        raise ConfigError(
            f"the decode path reads an expert once per choice; {R} choices are too many for it"
        )
    h_RF = torch.empty(R, layout.inner, dtype=layout.dtype, device=x_TD.device)
    up_row[(R, triton.cdiv(layout.inner, tiles.columns))](
        x_TD, pool_SN, h_RF, ids_TK, slot_E,
        **up_constants("decode", layout, K, tiles, False), **options(tiles),
    )  # fmt: skip
    return h_RF


def _planned_up(
    path: str, x_TD: Tensor, pool_SN: Tensor, h_RF: Tensor, of: Plan,
    layout: ExpertLayout, top_k: int, tiles: Tiles, wide: bool,
) -> None:  # fmt: skip
    constants = up_constants(path, layout, top_k, tiles, wide)
    grid = (len(of.tile_slot_B), triton.cdiv(layout.inner, tiles.columns))
    planned = of.perm_R, of.starts_E1, of.tile_expert_B, of.tile_slot_B, of.tile_row_B
    if path == "swapped":
        up_swapped[grid](x_TD, pool_SN, h_RF, *planned, **constants, **options(tiles))
        return
    box = [1, 2 * tiles.columns, tiles.depth]
    matrix = _matrix(pool_SN, 0, 2 * layout.inner, layout.hidden, box) if constants["TMA"] else None
    up_grouped[grid](matrix, x_TD, pool_SN, h_RF, *planned, **constants, **options(tiles))


def _planned_down(
    path: str, h_RF: Tensor, pool_SN: Tensor, rows_TKD: Tensor, weights_TK: Tensor, of: Plan,
    layout: ExpertLayout, tiles: Tiles, wide: bool,
) -> None:  # fmt: skip
    constants = down_constants(path, layout, tiles, wide)
    grid = (len(of.tile_slot_B), triton.cdiv(layout.hidden, tiles.columns))
    planned = of.perm_R, of.starts_E1, of.tile_expert_B, of.tile_slot_B, of.tile_row_B
    operands = h_RF, pool_SN, rows_TKD, weights_TK, *planned
    if path == "swapped":
        down_swapped[grid](*operands, **constants, **options(tiles))
        return
    start, box = layout.down_start, [1, tiles.columns, tiles.depth]
    tma = constants["TMA"]
    matrix = _matrix(pool_SN, start, layout.hidden, layout.inner, box) if tma else None
    down_grouped[grid](matrix, *operands, **constants, **options(tiles))


def _matrix(pool_SN: Tensor, start: int, rows: int, size: int, box: list[int]) -> TensorDescriptor:
    """One matrix of every slot, as the copy engine sees it: the slot is a coordinate."""
    flat = pool_SN.view(-1)[start:]
    shape, strides = [len(pool_SN), rows, size], [pool_SN.stride(0), size, 1]
    return TensorDescriptor(flat, shape=shape, strides=strides, block_shape=box)


def _whole(pool_SN: Tensor) -> Tensor:
    if not pool_SN.is_contiguous():
        raise ConfigError("the pool must lie in one piece: its slots are found by multiplication")
    return pool_SN
