"""Routing and plan by Triton equal their definitions, ties and all."""

from __future__ import annotations

import pytest
import torch

from prefetch.kernels.plan import MOST_SORTED, plan, plan_torch
from prefetch.kernels.routing import route, route_torch

BIAS = torch.linspace(-0.5, 0.5, 160)


@pytest.mark.parametrize(
    ("n_experts", "k", "options"),
    [
        (8, 2, {}),
        (129, 8, {"renormalise": False, "scale": 2.5}),
        (5, 5, {"score": "sigmoid"}),
        (1, 1, {}),
        (64, 6, {"score": "sigmoid", "bias_E": BIAS[:64]}),
        (160, 6, {"n_groups": 8, "groups_kept": 3, "renormalise": False}),
        (32, 8, {"score": "sigmoid", "bias_E": BIAS[:32], "n_groups": 8, "groups_kept": 4}),
        (8, 3, {"score": "sigmoid", "n_groups": 8, "groups_kept": 3}),
        (16, 4, {"bias_E": BIAS[:16], "n_groups": 4, "groups_kept": 2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_equals_the_definition(
    n_experts: int, k: int, options: dict[str, object], dtype: torch.dtype, device: str
) -> None:
    draw = torch.Generator().manual_seed(n_experts)
    logits_TE = torch.randn(7, n_experts, generator=draw).to(dtype)
    logits_TE[0] = 0.0  # all equal
    logits_TE[1, ::2] = logits_TE[1, 0]  # half of them equal
    logits_TE[2, ::2], logits_TE[2, 1::2] = -0.0, 0.0  # equal too
    if n_experts > k:
        logits_TE[3, 0] = -float("inf")
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    found = route(logits_TE.to(device), k, **options)  # type: ignore[arg-type]
    expected = route_torch(logits_TE.to(device), k, **options)  # type: ignore[arg-type]
    assert torch.equal(found.ids_TK, expected.ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-7)


def test_logits_may_be_a_view_and_may_be_none(device: str) -> None:
    logits_TE = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).to(device)
    for view in (logits_TE[:, 3:11], logits_TE[::2, :8], logits_TE[:, ::2]):
        assert torch.equal(route(view, 3).ids_TK, route_torch(view, 3).ids_TK)
    assert route(logits_TE[:0], 3).ids_TK.shape == (0, 3)


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts", "block"),
    [(1, 1, 1, 16), (1, 8, 129, 16), (7, 2, 5, 4), (33, 3, 3, 16), (16, 8, 129, 64), (5, 2, 40, 1)],
)
def test_plans_equal_the_definition(
    n_tokens: int, top_k: int, n_experts: int, block: int, device: str
) -> None:
    draw = torch.Generator().manual_seed(n_tokens)
    ids_TK = torch.rand(n_tokens, n_experts, generator=draw).argsort(1)[:, :top_k].int()
    slot_E = torch.randperm(n_experts, generator=draw).int()
    absent_E = torch.rand(n_experts, generator=draw) < 0.3
    nobody_TK = torch.rand(n_tokens, top_k, generator=draw) < 0.1
    one_TK = torch.full_like(ids_TK, n_experts - 1)
    for ids in (ids_TK, ids_TK.masked_fill(nobody_TK, -1), one_TK, torch.full_like(ids_TK, -1)):
        for slots in (slot_E, slot_E.masked_fill(absent_E, -1), torch.full_like(slot_E, -1)):
            found = plan(ids.to(device), slots.to(device), block)
            expected = plan_torch(ids.to(device), slots.to(device), block)
            for name, a, b in zip(expected._fields, found, expected, strict=True):
                same = a == b if name == "block" else torch.equal(a, b) and a.dtype == b.dtype
                assert same, f"{name}: {a} is not {b}"


def test_a_list_that_no_program_sorts_has_a_plan(device: str) -> None:
    ids_TK = (torch.arange(MOST_SORTED + 2, device=device) % 7).reshape(-1, 2)
    found = plan(ids_TK, torch.arange(7, dtype=torch.int32, device=device), 64)
    assert found.starts_E1[-1] == MOST_SORTED + 2 and found.n_tiles_1 == 35
