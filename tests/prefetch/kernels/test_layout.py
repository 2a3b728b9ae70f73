"""A block holds one expert, its parts are views, and nothing on the way to a CPU's answer imports triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from prefetch.errors import ConfigError
from prefetch.kernels.layout import ALIGNMENT, DTYPES, ExpertLayout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (37, 29), (64, 48), (2880, 8)])
def test_a_block_gives_back_what_was_packed(
    hidden: int, inner: int, has_bias: bool, dtype: torch.dtype
) -> None:
    layout = ExpertLayout(hidden, inner, dtype, has_bias=has_bias)
    draw = torch.Generator().manual_seed(0)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    shapes += [(inner,), (inner,), (hidden,)] if has_bias else []
    given = [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]
    block_N = layout.pack(*given)
    parts = layout.views(block_N[None])
    found = [parts.w13_SGD[0, 0::2], parts.w13_SGD[0, 1::2], parts.w2_SDF[0]]
    if parts.b13_SG is not None and parts.b2_SD is not None:
        found += [parts.b13_SG[0, 0::2], parts.b13_SG[0, 1::2], parts.b2_SD[0]]
    assert len(found) == len(given) and all(map(torch.equal, found, given))
    assert block_N.numel() == layout.numel and not block_N[layout.used :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_begin_aligned_and_parts_are_views(dtype: torch.dtype) -> None:
    layout = ExpertLayout(37, 29, dtype, has_bias=True)
    assert layout.bytes % ALIGNMENT == 0 and layout.bytes - ALIGNMENT < layout.used * dtype.itemsize
    pool_SN = layout.random(3, seed=0)
    for part in layout.views(pool_SN):
        assert part is not None
        assert part.untyped_storage().data_ptr() == pool_SN.untyped_storage().data_ptr()
        part.zero_()
    assert not pool_SN.any()


def test_drawn_experts_are_the_same_for_a_seed_and_keep_sizes() -> None:
    layout = ExpertLayout(256, 128, torch.float32, has_bias=True)
    assert torch.equal(layout.random(2, seed=1), layout.random(2, seed=1))
    assert not torch.equal(layout.random(2, seed=1), layout.random(2, seed=2))
    from prefetch.kernels.experts import moe

    x_TD = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    ids_TK, slot_E = torch.zeros(64, 1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    out_TD = moe(x_TD, ids_TK, torch.ones(64, 1), layout.random(2, seed=1), layout, slot_E)
    assert 0.3 < float(out_TD.std()) < 3


def test_what_does_not_fit_is_refused() -> None:
    layout, matrix = ExpertLayout(4, 2, torch.float32), torch.zeros(2, 4)
    with pytest.raises(ConfigError, match=r"found \[\(2, 4\), \(2, 4\), \(2, 4\)\]"):
        layout.pack(matrix, matrix, matrix)
    with pytest.raises(ConfigError, match="no room for biases"):
        layout.pack(matrix, matrix, matrix.T, torch.zeros(2))
    with pytest.raises(ConfigError, match=r"must be \(2,\); found \(3,\)"):
        biased = ExpertLayout(4, 2, torch.float32, has_bias=True)
        biased.pack(matrix, matrix, matrix.T, torch.zeros(3))
    with pytest.raises(ConfigError, match=r"is \[slots, 256\]"):
        layout.views(torch.zeros(2, 255))
    with pytest.raises(ConfigError, match="sizes above 0"):
        ExpertLayout(0, 2, torch.float32)
    with pytest.raises(ConfigError, match="use one of silu, gelu, clamped_swiglu"):
        ExpertLayout(4, 2, torch.float32, "relu")
    with pytest.raises(ConfigError, match=r"float64 cannot be computed"):
        ExpertLayout(4, 2, torch.float64)


def test_the_definitions_need_no_triton() -> None:
    """A machine without it, macOS for one, has the CPU path."""
    code = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
from prefetch.kernels import dense, experts, layout, plan, routing
of = layout.ExpertLayout(8, 4, torch.float32)
ids, weights = routing.route(torch.randn(3, 5), 2)
slots = torch.arange(5)
plan.plan(ids, slots, 16)
assert experts.moe(torch.randn(3, 8), ids, weights, of.random(5, 0), of, slots).shape == (3, 8)
dense.dense_moe(torch.randn(3, 8), ids, weights, of.random(5, 0), of)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
