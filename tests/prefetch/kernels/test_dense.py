"""The dense baseline computes the same layer, loses what has no seat, and allocates what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from expert_layers import assert_near, layer, loop_rows
from torch.profiler import ProfilerActivity, profile

from prefetch.errors import ConfigError
from prefetch.kernels.dense import dense_bytes, dense_moe, moe_bytes, most_tokens, seats_of
from prefetch.kernels.experts import apply_experts, combine
from prefetch.kernels.layout import ExpertLayout


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at one time, as torch's profiler recorded it."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        out = run()
    del out
    events = recorded.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in memory))


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_with_seats_for_all_the_layer_is_the_same(product: bool, activation: str) -> None:
    of = layer(11, 3, 6, 24, 16, torch.float32, activation, activation != "silu")
    pool_EN = of.pool_SN[of.slot_E.long()]
    x_TD, ids_TK, weights_TK = of.operands[:3]
    found = dense_moe(x_TD, ids_TK, weights_TK, pool_EN, of.layout, factor=6 / 3, product=product)
    assert found.n_dropped == 0
    assert_near(found.out_TD, loop_rows(of).sum(1), torch.float32)


def test_who_finds_no_seat_is_dropped_and_counted() -> None:
    """Three seats per expert, first choices before second ones, earlier tokens before later."""
    of = layer(6, 2, 4, 24, 16)
    ids_TK = torch.tensor([[0, 1], [0, 1], [2, 0], [0, 3], [3, 0], [0, 2]])
    found = dense_moe(
        of.x_TD, ids_TK, of.weights_TK, of.pool_SN[of.slot_E.long()], of.layout, factor=1.0
    )
    assert seats_of(6, 2, 4, 1.0) == 3 and found.n_dropped == 3
    weights_TK = of.weights_TK.clone()
    for t, k in ((5, 0), (2, 1), (4, 1)):
        weights_TK[t, k] = 0
    rows_TKD = of.poisoned
    apply_experts(of.x_TD, ids_TK, weights_TK, *of.operands[3:], rows_TKD)
    assert_near(found.out_TD, combine(rows_TKD), torch.float32)


def test_gradients_are_those_of_a_plain_loop() -> None:
    of = layer(5, 2, 3, 8, 6)
    ours = [
        t.clone().requires_grad_() for t in (of.x_TD, of.weights_TK, of.pool_SN[of.slot_E.long()])
    ]
    x_TD, weights_TK, pool_EN = ours
    dense_moe(
        x_TD, of.ids_TK, weights_TK, pool_EN, of.layout, factor=3
    ).out_TD.square().sum().backward()
    x, weights, pool = (t.detach().double().requires_grad_() for t in ours)
    layout, total = of.layout, torch.zeros((), dtype=torch.float64)
    w13_EGD = pool[:, : layout.down_start].unflatten(1, (12, 8))
    w2_EDF = pool[:, layout.down_start : layout.bias_start].unflatten(1, (8, 6))
    for t in range(5):
        out_D = torch.zeros(8, dtype=torch.float64)
        for k, e in enumerate(of.ids_TK[t].tolist()):
            a_G = w13_EGD[e] @ x[t]
            h_F = torch.nn.functional.silu(a_G[0::2]) * a_G[1::2]
            out_D = out_D + weights[t, k] * (w2_EDF[e] @ h_F)
        total = total + out_D.square().sum()
    total.backward()
    for found, expected in zip(ours, (x, weights, pool), strict=True):
        assert found.grad is not None and expected.grad is not None
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 4, 16, 32, 64), (512, 2, 8, 128, 64)])
def test_memory_is_what_was_predicted(shape: tuple[int, ...]) -> None:
    """The prediction is the least; torch's copies of permuted operands come on top, unless one tensor dwarfs them."""
    of = layer(*shape)
    pool_EN = of.pool_SN[of.slot_E.long()].requires_grad_()
    for product, most in ((False, 2.0), (True, 1.1)):
        predicted = sum(dense_bytes(*shape[:3], of.layout, factor=1.25, product=product).values())

        def run(product: bool = product) -> object:
            operands = of.x_TD, of.ids_TK, of.weights_TK, pool_EN, of.layout
            return dense_moe(*operands, factor=1.25, product=product)

        assert predicted <= peak_bytes(run) <= most * predicted


def test_where_memory_ends_is_known_before() -> None:
    """Qwen3-30B-A3B's layer in 80 GB: the broadcast product ends it four orders of magnitude before our path."""
    layout, room = ExpertLayout(2048, 768, torch.bfloat16), 80 * 10**9

    def dense(product: bool) -> int:
        return most_tokens(
            lambda T: sum(dense_bytes(T, 8, 128, layout, product=product).values()), room
        )

    ours = most_tokens(lambda T: sum(moe_bytes(T, 8, 128, layout).values()), room)
    assert dense(True) < 1600 < 40_000 < dense(False) < 60_000 < 800_000 < ours
    assert most_tokens(lambda T: T * 10, 9) == 0 and most_tokens(lambda T: T * 10, 10) == 1
    for T in (1, 2, 3, 64, 65, 4096):
        assert sum(moe_bytes(T, 8, 128, layout).values()) < sum(
            dense_bytes(T, 8, 128, layout).values()
        )
    with pytest.raises(ConfigError, match="above 0"):
        seats_of(4, 2, 4, 0)
