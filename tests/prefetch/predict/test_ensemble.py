"""An ensemble is no worse than its best member where it was tuned, a probability, and what its members know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_traces import check_restored, check_same_bytes, full_trace, on_disk
from routing_traces import random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.ensemble import Ensemble
from prefetch.predict.guesses import ranked
from prefetch.predict.mixing import LOGIT, PROBABILITY, RANK, Told, hits_of, log_odds, tuned
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import parameter_bytes, state_of
from prefetch.trace.routing import RoutingTrace

SMALL_MLP = {"mlp": {"hidden": 8, "epochs": 2}}
CHEAP = ("markov", "previous_token", "popularity", "markov2", "random")


def parts(trace: RoutingTrace) -> tuple[Part, Part]:
    requests = np.unique(trace.request_T)
    return Part(trace, requests[:-8]), Part(trace, requests[-8:-3])


def drifting(seed: int = 0, n_requests: int = 30) -> RoutingTrace:
    """Half of the choices repeat the token before, half follow the layer before, the rest is noise."""
    rng, tokens, n_layers = np.random.default_rng(seed), 20, 4
    trace = random_trace(seed, n_requests=n_requests, tokens=tokens, n_layers=n_layers)
    ids_TLK = trace.ids_TLK
    for t in range(trace.n_tokens):
        for layer in range(1, n_layers):
            kept = []
            if t % tokens and rng.random() < 0.7:
                kept.append(int(ids_TLK[t - 1, layer, 0]))
            if rng.random() < 0.7:
                kept.append((int(ids_TLK[t, layer - 1, 0]) + 5) % 16)
            others = [e for e in ids_TLK[t, layer].tolist() if e not in kept]
            ids_TLK[t, layer] = [*dict.fromkeys(kept), *others][:3]
    return trace


def hits(scores_TLE: np.ndarray, ids_TLK: np.ndarray) -> int:
    best_TLK, _ = ranked(scores_TLE, ids_TLK.shape[2])
    return int((ids_TLK[..., None] == best_TLK[:, :, None, :]).any(axis=3).sum())


def views(n: int, noise: tuple[float, ...], seed: int = 0) -> Told:
    """Noisy log-odds of two true experts of eight."""
    rng = np.random.default_rng(seed)
    ids_NK = np.argsort(rng.random((n, 8)), axis=1)[:, :2]
    truth_NE = np.full((n, 8), -1.0)
    np.put_along_axis(truth_NE, ids_NK, 1.0, axis=1)
    odds = [truth_NE + size * rng.normal(size=truth_NE.shape) for size in noise]
    return Told(np.stack(odds, axis=1).astype(np.float32), ids_NK)


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9),
    st.sampled_from([PROBABILITY, LOGIT, RANK]),
)
def test_the_scale_keeps_the_order(scores: list[float], kind: int) -> None:
    scores_E = np.round(np.array(scores, np.float32), 4)  # below that a float has too few digits
    order = np.argsort(-scores_E, kind="stable")
    odds_E = log_odds(scores_E[None, None], kind)[0, 0]
    assert (
        np.isfinite(odds_E).all() and np.argsort(-odds_E, kind="stable").tolist() == order.tolist()
    )


@pytest.mark.parametrize("kind", [PROBABILITY, LOGIT, RANK])
def test_what_is_not_guessed_comes_last(kind: int) -> None:
    odds_E = log_odds(np.array([[[0.1, -np.inf, 0.9]]], np.float32), kind)[0, 0]
    assert np.isfinite(odds_E).all() and np.argsort(-odds_E).tolist() == [2, 0, 1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 4))
def test_no_member_alone_has_more_hits_where_it_was_tuned(seed: int, n_members: int) -> None:
    told = views(60, tuple(np.random.default_rng(seed).uniform(0.3, 4, n_members)), seed)
    weight_M = tuned(told).weight_M
    assert (weight_M >= 0).all() and weight_M.any()
    assert hits_of(told, weight_M) >= max(hits_of(told, alone) for alone in np.eye(n_members))


def test_two_views_tell_more_than_one_and_noise_counts_little() -> None:
    told, asked = views(4000, (1.0, 1.5, 50.0)), views(4000, (1.0, 1.5, 50.0), seed=1)
    weight_M = tuned(told).weight_M
    assert weight_M[0] > weight_M[1] > 10 * weight_M[2]
    best = max(hits_of(asked, alone) for alone in np.eye(3))
    assert hits_of(asked, weight_M) > 1.05 * best


def test_it_is_a_probability() -> None:
    """Of the guesses with chances around p a share p is right, on events that it was not tuned on."""
    mix, asked = tuned(views(20_000, (1.0, 2.0))), views(20_000, (1.0, 2.0), seed=1)
    mixed_NE = mix.bias + np.einsum("m,nme->ne", mix.weight_M, asked.odds_NME)
    chance_NE, is_true_NE = 1 / (1 + np.exp(-mixed_NE)), np.zeros(mixed_NE.shape)
    np.put_along_axis(is_true_NE, asked.ids_NK, 1, axis=1)
    for low in np.arange(0, 1, 0.1):
        here = (chance_NE >= low) & (chance_NE < low + 0.1)
        # 160,000 guesses: a bin of a thousand is off by 0.016, one deviation
        assert is_true_NE[here].mean() == pytest.approx(chance_NE[here].mean(), abs=0.04)


def test_no_member_is_better_on_the_validation_tokens() -> None:
    trace = drifting()
    train, validation = parts(trace)
    fitted = Ensemble((1, 3), CHEAP).fit(train, validation)
    block, _ = validation.load()
    for horizon in (1, 3):
        past = Past(block, horizon)
        own = hits(fitted.scores(past), block.ids_TLK)
        alone = [hits(one.scores(past), block.ids_TLK) for one in fitted.made_of.values()]
        assert own > max(alone)  # and here it is better: two members know different things


def test_one_member_keeps_its_order_and_becomes_a_probability() -> None:
    trace = drifting()
    fitted = Ensemble((1,), ("markov2",)).fit(*parts(trace))
    past = Past(trace, 1)
    chance_TLE, own_TLE = fitted.scores(past), fitted.made_of["markov2"].scores(past)
    np.testing.assert_array_equal(ranked(chance_TLE, 3)[0], ranked(own_TLE, 3)[0])
    assert chance_TLE.min() >= 0 and chance_TLE.max() <= 1
    assert chance_TLE.sum(axis=2).mean() == pytest.approx(3, abs=0.1)


def test_scores_equal_their_formula() -> None:
    trace = drifting(n_requests=12)
    fitted = Ensemble((2,), ("markov", "markov2", "previous_token")).fit(*parts(trace))
    fitted.weight_H2M_[:] = [[[0.2, 0.3, 0.4], [0.7, 0.5, 0.1]]]
    past = Past(trace, 2)
    chance, logit, order = (one.scores(past).astype(float) for one in fitted.made_of.values())
    rank_TLE = np.argsort(np.argsort(-order, axis=2, kind="stable"), axis=2, kind="stable")
    odds = [
        np.log((chance + 1e-3) / (1 - chance + 1e-3)),
        np.clip(logit, -30, 30),
        np.log((15.5 - rank_TLE) / (rank_TLE + 0.5)),
    ]
    for region, layers in enumerate((slice(0, 2), slice(2, 4))):
        mixed = fitted.bias_H2_[0, region] + sum(
            weight * one[:, layers]
            for weight, one in zip(fitted.weight_H2M_[0, region], odds, strict=True)
        )
        expected = 1 / (1 + np.exp(-mixed))
        np.testing.assert_allclose(fitted.scores(past)[:, layers], expected, rtol=1e-5)


@pytest.mark.parametrize("horizon", [1, 3])
def test_both_faces_agree(horizon: int) -> None:
    trace = drifting(n_requests=12)
    fitted = Ensemble((1, 3), ("route_memory", SMALL_MLP)).fit(*parts(trace))
    fitted.weight_H2M_[:] = np.maximum(fitted.weight_H2M_, 0.1)  # nobody is left out
    part = trace.rows(slice(200, 240))
    expected, online = fitted.scores(Past(part, horizon)), fitted.online(horizon)
    for t in range(part.n_tokens):
        if t % 20 == 0:
            online.start()
        for layer in range(horizon):
            np.testing.assert_array_equal(online.guess(layer), expected[t, layer])
        for layer in range(4):
            online.observe(layer, part.ids_TLK[t, layer])
            if (ahead := layer + horizon) < 4:
                np.testing.assert_array_equal(online.guess(ahead), expected[t, ahead])


def test_there_is_an_incremental_face_if_every_member_has_one() -> None:
    assert hasattr(Ensemble((1,), ("route_memory", "mlp")), "online")
    assert not hasattr(Ensemble((1,), ("route_memory", "markov")), "online")


def test_same_bytes_and_survives_the_disk(tmp_path: Path) -> None:
    trace = drifting(n_requests=14)
    members = ("markov", SMALL_MLP, {"mlp": {"hidden": 8, "epochs": 1, "seed": 1}}, "route_memory")
    one, two = (Ensemble((1, 2), members).fit(*parts(trace)) for _ in range(2))
    check_same_bytes(one, two)
    check_restored(one, Ensemble((1, 2), members), trace, tmp_path)
    assert {"markov.chance_LE_", "mlp.network_h2_", "mlp_2.network_h2_"} < state_of(one).keys()
    of_members = sum(parameter_bytes(member) for member in one.made_of.values())
    assert parameter_bytes(one) == of_members + one.bias_H2_.nbytes + one.weight_H2M_.nbytes


def test_it_needs_and_sees_what_its_members_do(tmp_path: Path) -> None:
    members = ("popularity", {"trajectory": {"weighted": True}}, "gate_lookahead", "token_table")
    ensemble = Ensemble((1,), members)
    assert ensemble.needs == ("gate_inputs", "weights")
    assert ensemble.sees == "routing history + weights + token ids + gate inputs"
    assert Ensemble((1,), ("popularity",)).sees == "nothing"
    reader = on_disk(full_trace(), tmp_path / "trace")
    scores_TLE = ensemble.fit(whole(reader), whole(reader)).scores(Past(full_trace(), 1))
    assert ((scores_TLE >= 0) & (scores_TLE <= 1)).all()
    with pytest.raises(MissingData, match="weights"):
        ensemble.fit(whole(random_trace()), whole(random_trace()))


def test_without_validation_rows_all_members_count_alike() -> None:
    trace = drifting(n_requests=10)
    nobody = Part(trace, np.array([], np.int64))
    fitted = Ensemble((1,), ("markov", "popularity")).fit(whole(trace), nobody)
    assert (fitted.weight_H2M_ == 0.5).all() and not fitted.bias_H2_.any()


def test_many_validation_tokens_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefetch.predict import ensemble

    trace = drifting(n_requests=12)
    train, validation = parts(trace)
    fitted = Ensemble((1,), ("markov", "popularity")).fit(train, validation)
    monkeypatch.setattr(ensemble, "MOST_NUMBERS", 25 * 4 * 2 * 16)
    first, others = fitted._told(validation, 1)
    assert len(first.ids_NK) == 25 and len(others.ids_NK) == 75


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one"),
        (["markow"], "'markow' is no predictor; there are activation_matrix, encoder"),
        (["ensemble"], "an ensemble is no member of another one"),
        (["imported"], "imported: guesses from a file cannot be members"),
        (["mlp", "memory_mlp"], "memory_mlp learns from the validation requests, .*stops_early:true"),
        (["none"], "it guesses nothing"),
        (["oracle"], "oracle sees the answer"),
        (["encoder"], "encoder sees the answer"),
        ([{"mlp": {"hiden": 3}}], "mlp.hiden: does not exist; mlp has accelerator, batch"),
        ([{"mlp": {"hidden": "x"}}], "mlp.hidden: expected int, got 'x'"),
        ([{"mlp": {"horizons": [2]}}], "mlp has no horizons of its own; set train.horizons"),
        ([{"mlp": {}, "markov": {}}], "expected a name or one name: settings"),
        (["markov", {"markov": {}}], "markov stands there twice with the same settings"),
    ],
)  # fmt: skip
def test_nonsense_is_one_clear_line(members: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        Ensemble((1,), tuple(members))
    assert "\n" not in str(found.value)


def test_a_member_that_could_cheat_and_does_not_is_welcome() -> None:
    assert Ensemble((1,), ({"encoder": {"leak": False}},)).sees == "gate inputs"
