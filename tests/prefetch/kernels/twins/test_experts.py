"""Experts by Triton: every path against the definition, torch's grouped_mm and a float64 loop, at odd sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expert_layers import Layer, assert_near, grouped_rows, layer, loop_rows

from prefetch.errors import ConfigError
from prefetch.kernels.experts import (
    apply_experts,
    apply_experts_torch,
    combine,
    combine_torch,
    moe,
    moe_torch,
)
from prefetch.kernels.shipped import Config, Tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, choices, experts, hidden, inner
SHAPES = {
    "decode": [(1, 1, 1, 16, 16), (2, 3, 5, 37, 29), (1, 8, 129, 24, 16), (2, 4, 4, 40, 16)],
    "swapped": [(3, 2, 129, 37, 29), (10, 3, 3, 64, 48), (4, 4, 4, 136, 40)],
    "grouped": [(14, 2, 5, 72, 40), (3, 1, 9, 37, 29), (6, 4, 4, 64, 80)],
}
CASES = [(path, shape, torch.float32) for path, shapes in SHAPES.items() for shape in shapes]
CASES += [(path, shapes[-1], dtype) for path, shapes in SHAPES.items() for dtype in DTYPES[1:]]


def check(of: Layer, path: str, config: Config | None = None) -> None:
    """Rows against three others, their sum, and the whole layer."""
    rows_TKD = of.poisoned
    apply_experts(*of.operands, rows_TKD, path=path, config=config)
    exact_TKD = loop_rows(of)
    assert_near(rows_TKD, exact_TKD, of.layout.dtype)
    assert_near(rows_TKD, grouped_rows(of), of.layout.dtype)
    defined_TKD = of.poisoned
    apply_experts_torch(*of.operands, defined_TKD)
    assert_near(rows_TKD, defined_TKD, of.layout.dtype)
    out_TD = moe(*of.operands, path=path, config=config)
    assert_near(out_TD, exact_TKD.sum(1), of.layout.dtype)
    assert_near(out_TD, moe_torch(*of.operands), of.layout.dtype)


@pytest.mark.parametrize(("path", "shape", "dtype"), CASES)
def test_experts_equal_three_others(
    path: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    check(layer(*shape, dtype, device=device), path)


@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
@pytest.mark.parametrize("path", SHAPES)
def test_activations_and_biases(path: str, activation: str, device: str) -> None:
    of = layer(4, 2, 6, 37, 29, torch.float16, activation, True, device=device)
    check(dataclasses.replace(of, x_TD=of.x_TD * 6), path)  # beyond the clamp


@pytest.mark.parametrize("path", SHAPES)
def test_all_tokens_on_one_expert(path: str, device: str) -> None:
    """In two tiles, where there are tiles."""
    of = layer(18, 1, 7, 24, 16, device=device)
    small = None if path == "decode" else Config(Tiles(16, 8, 16, 4, 2), Tiles(16, 16, 16, 4, 2))
    check(dataclasses.replace(of, ids_TK=torch.full_like(of.ids_TK, 3)), path, small)


@pytest.mark.parametrize("path", SHAPES)
def test_a_hidden_size_that_no_tile_divides(path: str, device: str) -> None:
    """gpt-oss's 2,880. Interpreted, few large programs are quicker than many small ones."""
    wide = Tiles(16, 128, 256, 4, 2)
    config = None if device == "cuda" else Config(wide, wide)
    check(layer(1, 2, 2, 2880, 24, torch.bfloat16, has_bias=True, device=device), path, config)
    check(layer(2, 1, 2, 24, 2880, device=device), path, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", SHAPES)
def test_late_experts_get_the_same_numbers_and_absent_ones_are_left_alone(
    path: str, dtype: torch.dtype, device: str
) -> None:
    of = layer(5, 3, 6, 24, 16, dtype, device=device)
    here_E = torch.tensor([True, False, True, True, False, False], device=device)
    at_once, in_two = of.poisoned, of.poisoned
    apply_experts(*of.operands, at_once, path=path)
    early = (*of.operands[:-1], torch.where(here_E, of.slot_E, -1))
    late = (*of.operands[:-1], torch.where(here_E, -1, of.slot_E))
    apply_experts(*early, in_two, path=path)
    assert torch.equal(~in_two.isnan().any(2), here_E[of.ids_TK.long()])
    kept = in_two.clone()
    apply_experts(*late, in_two, path=path)
    assert torch.equal(in_two, at_once)
    early_TD = moe(*early, path=path)
    assert_near(early_TD, kept.nan_to_num(0).double().sum(1), dtype)


@pytest.mark.parametrize("path", SHAPES)
def test_choices_of_nobody(path: str, device: str) -> None:
    of = layer(5, 3, 6, 40, 24, device=device)
    nobody_TK = torch.arange(15, device=device).reshape(5, 3) % 4 == 0
    of = dataclasses.replace(of, ids_TK=of.ids_TK.masked_fill(nobody_TK, -1))
    rows_TKD = of.poisoned
    apply_experts(*of.operands, rows_TKD, path=path)
    assert torch.equal(rows_TKD.isnan().all(2), nobody_TK)
    assert_near(combine(rows_TKD, of.ids_TK), loop_rows(of).sum(1), torch.float32)
    assert_near(moe(*of.operands, path=path), loop_rows(of).sum(1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "D"), [(1, 5), (8, 513), (33, 3)])
def test_sums_equal_the_definition_to_the_bit(
    K: int, D: int, dtype: torch.dtype, device: str
) -> None:
    draw = torch.Generator().manual_seed(K)
    rows_TKD = torch.randn(3, K, D, generator=draw).to(device)
    ids_TK = torch.rand(3, K, generator=draw).argsort(1).int().to(device)
    ids_TK[0, 0] = -1
    slot_E = torch.arange(K, device=device).int() - 1  # expert 0 is absent
    found, expected = combine(rows_TKD), combine_torch(rows_TKD)
    assert torch.equal(found, expected)
    if dtype == torch.float32:  # the interpreter cuts a bfloat16 off where a GPU rounds
        rows_TKD[0, 0] = float("nan")
        assert torch.equal(combine(rows_TKD, ids_TK), combine_torch(rows_TKD, ids_TK))
        some = combine(rows_TKD, ids_TK, slot_E=slot_E)
        assert torch.equal(some, combine_torch(rows_TKD, ids_TK, slot_E=slot_E))
    else:
        assert_near(combine(rows_TKD, dtype=dtype), expected, dtype)


def test_no_tokens(device: str) -> None:
    of = layer(4, 2, 3, 16, 8, device=device)
    none = dataclasses.replace(
        of, x_TD=of.x_TD[:0], ids_TK=of.ids_TK[:0], weights_TK=of.weights_TK[:0]
    )
    apply_experts(*none.operands, none.poisoned)
    assert moe(*none.operands).shape == (0, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("path", SHAPES)
def test_a_graph_holds_a_layer_and_replays_it_with_other_routings(path: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    of = layer(5, 3, 6, 64, 48, torch.bfloat16, device=device)
    moe(*of.operands, path=path)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = moe(*of.operands, path=path)
    of.ids_TK.copy_((of.ids_TK + 1) % 6)
    graph.replay()
    assert_near(out_TD, loop_rows(of).sum(1), torch.bfloat16)


def test_products_of_bfloat16_are_refused_under_the_interpreter(device: str) -> None:
    """They would be wrong by eleven orders of magnitude, silently."""
    if device == "cuda":
        pytest.skip("a GPU multiplies bfloat16")
    of = layer(3, 2, 4, 32, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="silently wrong"):
        moe(*of.operands, path="swapped", upcast=False)
    with pytest.raises(ConfigError, match="silently wrong"):
        apply_experts(*of.operands, of.poisoned, path="grouped", upcast=False)
    assert_near(
        moe(*of.operands, path="swapped", upcast=True), loop_rows(of).sum(1), torch.bfloat16
    )
