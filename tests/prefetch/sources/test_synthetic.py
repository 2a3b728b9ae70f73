"""The synthetic processes have the properties that they promise, and the promised bound is the true optimum."""

import itertools

import numpy as np
import pytest

from prefetch.errors import ConfigError
from prefetch.sources.synthetic import Synthetic, _expected_top


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(collect):
    a, b, c = (collect(Synthetic(seed=seed, n_requests=5)).load().ids_TLK for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


def test_marked_synthetic_with_prompt_and_decode_rows(collect):
    reader = collect(Synthetic(n_requests=3, prompt_tokens=4, new_tokens=2))
    assert reader.provenance.kind == "synthetic"
    assert reader.load().phase_T.tolist() == [0, 0, 0, 0, 1, 1] * 3


def test_zipf_frequencies_follow_the_weights(collect):
    source = Synthetic(process="zipf", top_k=1, n_experts=8, n_layers=3, n_requests=2000, skew=1.0)
    ids = collect(source).load().ids_TLK
    wanted = np.sort(1 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum())
    for layer in range(3):
        share = np.sort(np.bincount(ids[:, layer, 0], minlength=8) / len(ids))
        np.testing.assert_allclose(share, wanted, atol=0.005)  # 256,000 draws: 5 standard errors


def test_sticky_repeats_as_often_as_it_says(collect):
    source = Synthetic(process="sticky", stickiness=0.7, n_experts=16, top_k=2, n_requests=500)
    ids = np.sort(collect(source).load().ids_TLK, axis=-1)
    same = (ids[1:] == ids[:-1]).all(-1).mean()
    chance = 0.7 + 0.3 / 120  # 16 choose 2 subsets
    assert same == pytest.approx(chance, abs=0.005)  # 512,000 pairs: 8 standard errors


def test_the_bound_equals_enumeration():
    rng = np.random.default_rng(0)
    rows, state = rng.dirichlet(np.ones(4), size=(3, 4)), rng.dirichlet(np.ones(4), size=3)
    for width in (1, 2, 3, 5, 12):
        total = 0.0
        for picked in itertools.product(range(4), repeat=3):
            chance = np.prod([state[j, i] for j, i in enumerate(picked)])
            values = np.concatenate([rows[j, i] for j, i in enumerate(picked)])
            total += chance * np.sort(values)[-width:].sum()
        assert _expected_top(rows, state, width) == pytest.approx(total, rel=1e-12)


def test_the_true_matrix_reaches_the_bound_and_a_fitted_one_does_not_pass_it(collect):
    reader = collect(Synthetic(n_requests=400, n_layers=4, n_experts=12, top_k=2, seed=3))
    ids = reader.load().ids_TLK
    steps_LEE = reader.beside("transitions")["steps_LEE"]
    hits = []
    for layer in range(3):
        score_TE = sum(steps_LEE[layer][ids[:, layer, k]] for k in range(2))
        guess = np.argsort(-score_TE, axis=1)[:, :2]
        hits.append((guess[:, :, None] == ids[:, layer + 1, None, :]).any(1).mean())
    bound = reader.provenance.facts["best_recall_at_k"]
    assert np.mean(hits) == pytest.approx(bound, abs=0.005)  # 307,200 choices: 5 standard errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": "walk"}, "process must be one of"),
        ({"top_k": 33}, "n_experts must be from top_k"),
        ({"n_experts": 33}, "a chain needs n_experts divisible by top_k"),
        ({"prompt_tokens": 0, "new_tokens": 0}, "at least one token"),
        ({"skew": float("nan")}, "skew must be a number"),
        ({"concentration": float("inf")}, "concentration must be a positive number"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"n_layers": 10_001}, "n_layers must be at most 10000"),
        ({"seed": -1}, "seed must not be negative"),
        ({"n_experts": 65534}, "a chain may have 256 experts"),
        ({"stickiness": 1.5}, "stickiness must be from 0 to 1; got stickiness=1.5$"),
        ({"n_experts": 2, "top_k": 8}, "from top_k to 65535; got n_experts=2, top_k=8$"),
        ({"concentration": 0.0}, "concentration must be a positive number"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Synthetic(**change)


@pytest.mark.parametrize("skew", [100.0, -100.0, 12.0])
def test_a_router_that_takes_nearly_always_the_same_expert_is_still_drawn(collect, skew):
    source = Synthetic(
        process="zipf", skew=skew, top_k=8, n_requests=2, prompt_tokens=8, new_tokens=0
    )
    assert collect(source).n_tokens == 16


def test_drawn_routing_may_be_as_even_or_constant_as_it_likes(collect):
    collect(Synthetic(process="sticky", stickiness=1.0, n_experts=4, top_k=1, n_requests=20))
    collect(Synthetic(n_experts=8, top_k=4, concentration=100.0, prompt_tokens=2000, n_requests=2))
