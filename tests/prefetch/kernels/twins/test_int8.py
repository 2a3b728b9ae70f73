"""int8 experts by Triton against their definition, at odd sizes, with absent experts and slots of nobody."""

from __future__ import annotations

import pytest
import torch
from expert_layers import assert_near
from int8_layers import of_int8

from prefetch.errors import ConfigError
from prefetch.kernels.int8 import moe_int8, moe_int8_torch

SHAPES = [(1, 1, 1, 16, 16), (2, 3, 5, 37, 29), (1, 8, 129, 24, 16), (2, 4, 4, 40, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_twin_equals_its_definition(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    _, told = of_int8(*shape, dtype=dtype, device=device)
    assert_near(moe_int8(*told), moe_int8_torch(*told), dtype)


@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
def test_activations(activation: str, device: str) -> None:
    _, told = of_int8(3, 2, 6, 37, 29, activation=activation, device=device)
    told = (told[0] * 6, *told[1:])  # beyond the clamp
    assert_near(moe_int8(*told), moe_int8_torch(*told), torch.float32)


def test_absent_experts_and_nobody_add_nothing(device: str) -> None:
    _, told = of_int8(4, 2, 5, 24, 16, device=device)
    x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E = told
    ids_TK[1] = -1
    slot_E[int(ids_TK[0, 0])] = -1
    out_TD = moe_int8(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)
    assert not out_TD[1].any()
    assert_near(out_TD, moe_int8_torch(*told[:5], slot_E), torch.float32)


def test_many_choices_are_refused(device: str) -> None:
    _, told = of_int8(600, 2, 4, 16, 16, device=device)
    with pytest.raises(ConfigError, match="1200 choices are too many"):
        moe_int8(*told)
