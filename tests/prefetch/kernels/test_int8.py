"""The definition of int8 experts: their numbers by hand, their distance from the experts that they were made of."""

from __future__ import annotations

import pytest
import torch
from int8_layers import of_int8, written_out

from prefetch.errors import ConfigError
from prefetch.kernels.experts import moe_torch
from prefetch.kernels.int8 import Int8Layout, moe_int8, moe_int8_torch, rounded
from prefetch.kernels.layout import ExpertLayout


def test_rows_are_at_most_half_a_step_off() -> None:
    matrix = torch.randn(50, 37, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    matrix[4] *= 1e-6  # a row's scale is its own
    steps, scale = rounded(matrix)
    assert steps.dtype == torch.int8 and steps.min() >= -127
    error = (steps.float() * scale[:, None] - matrix).abs()
    assert (error <= scale[:, None] * 0.5001).all() and scale[3] == 0 and not steps[3].any()
    assert (steps.abs().amax(1)[scale > 0] == 127).all()
    with pytest.raises(ConfigError, match="not finite"):
        rounded(torch.tensor([[1.0, float("inf")]]))


@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (3, 2, 5, 37, 29), (2, 4, 4, 40, 16)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "clamped_swiglu"])
def test_the_definition_is_the_layer_of_the_rounded_numbers(
    shape: tuple[int, ...], activation: str
) -> None:
    of, told = of_int8(*shape, activation=activation)
    out_TD = moe_int8_torch(*told)
    torch.testing.assert_close(out_TD, moe_torch(*written_out(of, told)), rtol=2e-5, atol=2e-5)
    exact_TD = moe_torch(*of.operands)
    assert (out_TD - exact_TD).norm() / exact_TD.norm() < 0.03
    assert torch.equal(moe_int8(*told), out_TD)


def test_absent_experts_and_nobody_add_nothing() -> None:
    _, (x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E) = of_int8(4, 2, 5, 24, 16)
    ids_TK[1] = -1
    slot_E[int(ids_TK[0, 0])] = -1
    out_TD = moe_int8_torch(x_TD, ids_TK, weights_TK, pool_SB, layout, slot_E)
    weights_TK[0, 0] = 0
    assert not out_TD[1].any() and not out_TD.isnan().any()
    kept = torch.where(ids_TK == ids_TK[0, 0], -1, ids_TK)
    again = moe_int8_torch(x_TD, kept, weights_TK, pool_SB, layout, slot_E)
    assert torch.equal(out_TD, again)


def test_half_the_bytes_and_clear_refusals() -> None:
    int8, bf16 = Int8Layout(2048, 768, torch.bfloat16), ExpertLayout(2048, 768, torch.bfloat16)
    assert 0.5 <= int8.bytes / bf16.bytes < 0.502 and int8.bytes % 1024 == 0
    with pytest.raises(ConfigError, match=r"of torch.int8; found \[3, 7\]"):
        int8.views(torch.zeros(3, 7, dtype=torch.int8))
    with pytest.raises(ConfigError, match="expected sizes above 0"):
        Int8Layout(0, 5, torch.bfloat16)
    _, told = of_int8(2, 1, 3, 16, 16)
    with pytest.raises(ConfigError, match="x must be"):
        moe_int8(told[0].half(), *told[1:])
    with pytest.raises(ConfigError, match="gate, up and down must be"):
        told[4].pack(torch.zeros(3, 16), torch.zeros(3, 16), torch.zeros(16, 16))
