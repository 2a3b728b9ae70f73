"""A drawn layer in int8, beside the layer that it was made of."""

from __future__ import annotations

from typing import Any

import torch
from expert_layers import Layer, layer

from prefetch.kernels.int8 import Int8Layout


def of_int8(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    device: str = "cpu",
) -> tuple[Layer, tuple[Any, ...]]:
    """What `moe_int8` takes; slots of nobody hold numbers that nobody may read."""
    of = layer(*shape, dtype, activation, device=device)
    layout = Int8Layout(of.layout.hidden, of.layout.inner, dtype, activation)
    pool_SB = torch.full((len(of.pool_SN), layout.bytes), 125, dtype=torch.int8)
    layout.views(pool_SB).scale13_SG[:] = float("nan")
    for e, slot in enumerate(of.slot_E.tolist()):
        pool_SB[slot] = layout.pack(of.gate_EFD[e], of.up_EFD[e], of.down_EDF[e])
    tokens = of.x_TD, of.ids_TK, of.weights_TK
    return of, (*tokens, pool_SB.to(device), layout, of.slot_E.clone())


def written_out(of: Layer, told: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in the tokens' own type, as `moe_torch` takes them."""
    *tokens, pool_SB, layout, slot_E = told
    part, pool_SN = layout.views(pool_SB), torch.zeros_like(of.pool_SN)
    wide = of.layout.views(pool_SN)
    wide.w13_SGD[:] = part.w13_SGD * part.scale13_SG[:, :, None].nan_to_num()
    wide.w2_SDF[:] = part.w2_SDF * part.scale2_SD[:, :, None].nan_to_num()
    return (*tokens, pool_SN, of.layout, slot_E)
