"""The definitions of the experts against a float64 loop, torch's grouped_mm, and transformers' loop over experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expert_layers import assert_near, grouped_rows, layer, loop_rows

from prefetch.errors import ConfigError
from prefetch.kernels.experts import apply_experts, combine, combine_torch, moe, moe_torch
from prefetch.kernels.shipped import DECODE, PATHS, Config, Tiles, config_of, path_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 8, 8), (7, 3, 129, 37, 29), (40, 5, 5, 64, 48), (3, 2, 4, 2880, 24)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "has_bias"), [("silu", False), ("gelu", True), ("clamped_swiglu", True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_two_oracles(
    shape: tuple[int, ...], activation: str, has_bias: bool, dtype: torch.dtype
) -> None:
    of = layer(*shape, dtype, activation, has_bias)
    of = dataclasses.replace(of, x_TD=of.x_TD * 4)
    rows_TKD = of.poisoned
    apply_experts(*of.operands, rows_TKD)
    assert_near(rows_TKD, loop_rows(of), dtype)
    assert_near(grouped_rows(of), loop_rows(of), dtype)
    assert_near(moe(*of.operands), loop_rows(of).sum(1), dtype)
    assert torch.equal(moe(*of.operands), combine(rows_TKD, of.ids_TK, dtype=dtype))


def test_late_experts_get_the_same_numbers_and_absent_ones_are_left_alone() -> None:
    of = layer(9, 3, 6, 40, 24)
    here_E = torch.tensor([True, False, True, True, False, False])
    at_once, in_two = of.poisoned, of.poisoned
    apply_experts(*of.operands, at_once)
    apply_experts(*of.operands[:-1], torch.where(here_E, of.slot_E, -1), in_two)
    assert torch.equal(~in_two.isnan().any(2), here_E[of.ids_TK.long()])
    apply_experts(*of.operands[:-1], torch.where(here_E, -1, of.slot_E), in_two)
    assert torch.equal(in_two, at_once)


def test_nobody_and_absent_experts_add_nothing() -> None:
    of = layer(9, 3, 6, 40, 24)
    ids_TK = of.ids_TK.clone()
    ids_TK[::2, 1] = -1
    of = dataclasses.replace(of, ids_TK=ids_TK)
    assert_near(moe(*of.operands), loop_rows(of).sum(1), torch.float32)
    absent = torch.where(torch.arange(6) == 2, -1, of.slot_E)
    without = dataclasses.replace(of, ids_TK=torch.where(ids_TK == 2, -1, ids_TK))
    assert torch.equal(moe(*of.operands[:-1], absent), moe(*without.operands))


def test_a_sum_is_by_expert_or_by_choice_and_reads_no_row_of_nobody() -> None:
    big = 2.0**30
    rows_TKD = torch.tensor([[[big], [1.0], [-big]]])
    assert combine(rows_TKD).item() == 0.0  # 1 is lost in the large number
    assert combine(rows_TKD, torch.tensor([[0, 2, 1]])).item() == 1.0
    assert combine(rows_TKD, torch.tensor([[0, 1, 2]])).item() == 0.0
    rows_TKD[0, 0] = float("nan")
    assert combine(rows_TKD, torch.tensor([[-1, 1, 0]])).item() == -big
    slot_E = torch.tensor([5, -1, 3])
    assert combine(rows_TKD, torch.tensor([[1, 0, -1]]), slot_E=slot_E).item() == 1.0
    assert combine_torch(rows_TKD[:, 1:], dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("n_tokens", [1, 2, 17])
@pytest.mark.parametrize("inner", [48, 96])
def test_float32_equals_an_eager_loop_over_experts_to_the_bit(n_tokens: int, inner: int) -> None:
    """transformers' experts, whose gates and ups are one matrix after the other, not in turn."""
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    from transformers import Qwen3MoeConfig

    of = layer(n_tokens, 3, 8, 64, inner)
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=inner, num_experts=8)
    config._experts_implementation = "eager"
    peer = modeling.Qwen3MoeExperts(config)
    peer.gate_up_proj.data = torch.cat([of.gate_EFD, of.up_EFD], 1)
    peer.down_proj.data = of.down_EDF
    with torch.no_grad():
        expected_TD = peer(of.x_TD, of.ids_TK.long(), of.weights_TK)
    assert torch.equal(moe_torch(*of.operands), expected_TD)


def test_every_size_has_a_path_and_its_tiles() -> None:
    layout = layer(1, 1, 1, 8, 8, torch.bfloat16).layout
    assert [path_of(*shape) for shape in ((2, 8), (3, 8), (64, 8), (65, 1))] == [
        "decode", "swapped", "swapped", "grouped"
    ]  # fmt: skip
    for path in PATHS:
        for n_rows in (1, 100, 10_000, 1_000_000):
            assert config_of(path, layout, n_rows, 64).up.rows >= (1 if path == "decode" else 16)
    with pytest.raises(ValueError, match="one tile height; found 1, 2"):
        Config(DECODE.up, Tiles(2, 8, 8, 1, 1))


def test_what_does_not_fit_is_refused() -> None:
    of = layer(4, 2, 3, 16, 8)
    x, ids, weights, pool, layout, slots = of.operands
    for operands, message in (
        ((x[:, :8], ids, weights, pool, layout, slots), r"x must be \[tokens, 16\]"),
        (
            (x.half(), ids, weights, pool, layout, slots),
            "of torch.float32; found .* of torch.float16",
        ),
        ((x, ids[:3], weights, pool, layout, slots), r"must be \[4, choices\]"),
        ((x, ids, weights, pool[:, :-1], layout, slots), "the pool must be"),
        ((x, ids.float(), weights, pool, layout, slots), "integers"),
    ):
        with pytest.raises(ConfigError, match=message):
            moe(*operands)
    with pytest.raises(ConfigError, match=r"rows must be \[4, 2, 16\]"):
        apply_experts(*of.operands, of.poisoned[:, :1])
    with pytest.raises(ConfigError, match="one device; found cpu, meta"):
        moe(x, ids.to("meta"), weights, pool, layout, slots)
    with pytest.raises(ConfigError, match="path 'fast' is not known"):
        moe(*of.operands, path="fast")
    with pytest.raises(ConfigError, match="pass ids_TK too"):
        combine(of.poisoned, slot_E=slots)
