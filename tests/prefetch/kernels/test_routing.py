"""Laws of routing, and the routers of transformers as outside judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.kernels.routing import route, route_torch


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 20), st.sampled_from([True, False]))
def test_choices_are_the_best_and_weights_their_scores(
    seed: int, n_tokens: int, n_experts: int, coarse: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(n_tokens, n_experts, generator=draw)
    logits_TE = logits_TE.round() if coarse else logits_TE  # many ties
    k = 1 + seed % n_experts
    for score in ("softmax", "sigmoid"):
        ids_TK, weights_TK = route(logits_TE, k, score=score, renormalise=False)
        exact_TE = logits_TE.double()
        scores_TE = exact_TE.softmax(1) if score == "softmax" else exact_TE.sigmoid()
        for t in range(n_tokens):
            order = sorted(range(n_experts), key=lambda e: (-float(logits_TE[t, e]), e))
            assert ids_TK[t].tolist() == order[:k]
        expected_TK = scores_TE.gather(1, ids_TK.long())
        torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)
        scaled_TK = route(logits_TE, k, score=score, scale=2.5).weights_TK
        torch.testing.assert_close(scaled_TK.sum(1), torch.full((n_tokens,), 2.5))
    assert ids_TK.dtype == torch.int32 and weights_TK.dtype == torch.float32


@given(st.integers(0, 2**31))
def test_only_kept_groups_are_chosen_from_and_a_bias_changes_no_weight(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits_TE, bias_E = torch.randn(5, 24, generator=draw), torch.randn(24, generator=draw)
    options: dict[str, Any] = {"n_groups": 6, "groups_kept": 2, "renormalise": False}
    plain = route(logits_TE, 5, **options)
    groups_TP = logits_TE.unflatten(1, (6, 4)).amax(2).argsort(1, descending=True)[:, :2]
    assert (plain.ids_TK[..., None] // 4 == groups_TP[:, None]).any(2).all()
    biased = route(logits_TE, 5, score="sigmoid", bias_E=bias_E, **options)
    expected_TK = logits_TE.sigmoid().gather(1, biased.ids_TK.long())
    assert torch.equal(biased.weights_TK, expected_TK)
    flat = route(logits_TE, 5, score="sigmoid", bias_E=bias_E, renormalise=False)
    assert ((biased.ids_TK // 4).unique(dim=1).shape[1] <= 24) and flat.ids_TK.shape == (5, 5)
    for ids_K in biased.ids_TK:
        assert len((ids_K // 4).unique()) <= 2 and len(ids_K.unique()) == 5


def peers() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Class of transformers, settings of its model, our options."""
    groups = {"n_groups": 4, "groups_kept": 2}
    v3 = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    v2 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0}
    v2 |= {"topk_method": "group_limited_greedy"}
    return [
        ("qwen3_moe.Qwen3MoeTopKRouter", "num_experts", {"norm_topk_prob": True}, {}),
        ("qwen3_moe.Qwen3MoeTopKRouter", "num_experts", {"norm_topk_prob": False}, {"renormalise": False}),
        ("mixtral.MixtralTopKRouter", "num_local_experts", {}, {}),
        ("gpt_oss.GptOssTopKRouter", "num_local_experts", {}, {}),
        ("deepseek_v2.DeepseekV2TopkRouter", "num_experts", v2, groups | {"renormalise": False}),
        (
            "deepseek_v3.DeepseekV3TopkRouter", "num_local_experts", v3,
            groups | {"score": "sigmoid", "scale": 2.5},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "settings", "options"), peers())
def test_routers_of_transformers_agree(
    name: str, size: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    import importlib
    from types import SimpleNamespace

    module, _, family = name.partition(".")
    found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = SimpleNamespace(hidden_size=8, num_experts_per_tok=3, **{size: 16}, **settings)
    router = getattr(found, family)(config)
    draw = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=draw)
    with torch.no_grad():
        if "sigmoid" in options.values():
            router.e_score_correction_bias.normal_(generator=draw)
            options = options | {"bias_E": router.e_score_correction_bias}
        logits_TE, weights_TK, ids_TK = router(torch.randn(40, 8, generator=draw))
    ours = route_torch(logits_TE, 3, **options)
    order_TK, theirs_TK = ours.ids_TK.argsort(1), ids_TK.argsort(1)
    assert torch.equal(ours.ids_TK.gather(1, order_TK).long(), ids_TK.gather(1, theirs_TK))
    a, b = ours.weights_TK.gather(1, order_TK), weights_TK.gather(1, theirs_TK)
    torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-7)


def test_what_cannot_be_is_refused() -> None:
    logits_TE = torch.zeros(2, 6)
    for k, options, message in (
        (7, {}, "k must be 1 to 6"),
        (0, {}, "k must be 1 to 6"),
        (3, {"n_groups": 3, "groups_kept": 1}, "k must be 1 to 2"),
        (1, {"n_groups": 4}, "6 experts cannot be split into 4 groups"),
        (1, {"groups_kept": 2}, "1 groups of which 2 are kept"),
        (1, {"score": "tanh"}, "use one of softmax, sigmoid"),
        (1, {"bias_E": torch.zeros(5)}, r"bias_E must be \(6,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            route(logits_TE, k, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\[tokens, experts\]"):
        route(torch.zeros(6), 1)
