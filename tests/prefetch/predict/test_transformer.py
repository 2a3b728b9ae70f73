"""Its attention starts as route memory, sees a window of its request, copies, and stays causal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from recorded_traces import check_causal, full_trace
from routing_traces import random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict import transformer
from prefetch.predict.networks.sequences import known_ids, known_weights
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import restore, save
from prefetch.predict.transformer import Transformer
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of

OPTIONS = [{}, {"weights": True}, {"memory": True}, {"weights": True, "memory": True}]


def holes() -> RoutingTrace:
    trace = full_trace(n_requests=8, tokens=12)
    trace.ids_TLK[::5, 1, 2] = 255
    trace.ids_TLK[::7, 2] = 255
    return trace


def small(trace: RoutingTrace, **settings: object) -> Transformer:
    given = {"hidden": 8, "heads": 2, "epochs": 2, "batch": 2, **settings}
    return Transformer((1, 3), **given).fit(Part(trace, np.arange(5)), Part(trace, np.arange(5, 8)))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_seed_gives_the_same_bytes_and_survives_the_disk(
    options: dict[str, bool], tmp_path: Path
) -> None:
    trace = holes()
    one, two, other = (small(trace, **options, seed=seed) for seed in (0, 0, 1))
    past = Past(trace, 3)
    np.testing.assert_array_equal(one.scores(past), two.scores(past))
    assert not np.array_equal(one.scores(past), other.scores(past))
    save(one, tmp_path, {}, 0.0)
    again = Transformer((1, 3), hidden=8, heads=2, **options)
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(past), one.scores(past))


@pytest.mark.parametrize("options", OPTIONS)
def test_what_it_learnt_is_causal(options: dict[str, bool]) -> None:
    """A large learning rate: a weight that should stay nothing would not."""
    trace, other = full_trace(), full_trace(7)
    fitted = Transformer((1, 2), hidden=8, heads=2, epochs=3, learning_rate=0.05, **options)
    check_causal(fitted.fit(whole(trace), whole(other)), trace, other)


def test_how_a_request_is_cut_changes_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens see the same earlier ones; the order of sums differs, so the guesses are nearly the same."""
    trace = holes()
    fitted, past = small(trace, window=4), Past(trace, 1)
    expected = fitted.scores(past)
    for chunk in (1, 5):
        monkeypatch.setattr(transformer, "CHUNK", chunk)
        np.testing.assert_allclose(fitted.scores(past), expected, atol=1e-5)


def test_it_sees_a_window_of_earlier_tokens() -> None:
    """One more than the window, because how alike two tokens are includes the tokens before them."""
    trace = holes()
    fitted = small(trace, window=4)
    ids_TLK = trace.ids_TLK.copy()
    ids_TLK[0] = (ids_TLK[0] + 1) % 16
    changed = dataclasses.replace(trace, ids_TLK=ids_TLK)
    plain, other = (fitted.scores(Past(one, 1)) for one in (trace, changed))
    assert not np.array_equal(plain[1:5], other[1:5])
    np.testing.assert_array_equal(plain[6:], other[6:])


def test_all_that_may_be_known_is_told_and_nothing_else() -> None:
    trace = full_trace(n_requests=2, tokens=3)
    past = Past(trace, 3)
    ids_TLK, weights_TLK = known_ids(past), known_weights(past)
    for first in (0, 3):
        np.testing.assert_array_equal(ids_TLK[first : first + 2], trace.ids_TLK[first : first + 2])
        np.testing.assert_array_equal(ids_TLK[first + 2, :1], trace.ids_TLK[first + 2, :1])
        np.testing.assert_allclose(weights_TLK[first : first + 2], trace.weights_TLK[first : first + 2])  # fmt: skip
        assert (ids_TLK[first + 2, 1:] == past.nobody).all() and not weights_TLK[
            first + 2, 1:
        ].any()


def test_it_copies_what_alike_tokens_did() -> None:
    """Every request has a table of its own from layer 0 to layer 1: only its earlier tokens can tell."""
    rng = np.random.default_rng(0)
    n_requests, tokens = 160, 24
    first = rng.integers(0, 6, (n_requests, tokens))
    tables = np.argsort(rng.random((n_requests, 6)), axis=1)
    second = np.take_along_axis(tables, first, axis=1)
    ids_TLK = np.stack([first.ravel(), second.ravel()], axis=1)[:, :, None]
    card = plain_card("tables", n_experts=6, top_k=1, layer_numbers=(0, 1))
    trace = trace_of(card, ids_TLK, request_T=np.repeat(np.arange(n_requests), tokens))
    parts = Part(trace, np.arange(130)), Part(trace, np.arange(130, 140))
    fitted = Transformer((1,), hidden=16, epochs=4, batch=4, learning_rate=1e-2, dropout=0.0).fit(
        *parts
    )
    asked = trace.rows(slice(140 * tokens, None))
    hit = fitted.scores(Past(asked, 1))[:, 1].argmax(axis=1) == asked.ids_TLK[:, 1, 0]
    seen = np.array([first[r, t] in first[r, :t] for r in range(140, 160) for t in range(tokens)])
    assert hit[seen].mean() > 0.95


def test_a_request_of_one_token_and_two_layers() -> None:
    trace = random_trace(n_requests=6, tokens=1, n_layers=2)
    fitted = Transformer((1,), hidden=4, epochs=1).fit(
        Part(trace, np.arange(4)), Part(trace, np.arange(4, 6))
    )
    assert np.isfinite(fitted.scores(Past(trace, 1))).all()


def test_a_split_in_time_learns_from_the_first_part_alone() -> None:
    """What the later part of the only request holds changes nothing that was learnt."""
    trace, other = (random_trace(seed, n_requests=1, tokens=40) for seed in (0, 1))
    ids_TLK = trace.ids_TLK.copy()
    ids_TLK[20:] = other.ids_TLK[20:]
    fitted = []
    for one in (trace, dataclasses.replace(trace, ids_TLK=ids_TLK)):
        parts = Part(one, np.arange(1), 0, 20), Part(one, np.arange(1), 20, 30)
        fitted.append(Transformer((1,), hidden=4, epochs=1).fit(*parts).scores(Past(trace, 1)))
    np.testing.assert_array_equal(*fitted)


def test_weights_are_asked_for_only_when_they_are_used() -> None:
    assert (Transformer().needs, Transformer().sees) == ((), "routing history")
    given = Transformer(weights=True)
    assert (given.needs, given.sees) == (("weights",), "routing history + weights")
    trace = random_trace(n_requests=8, tokens=6)
    with pytest.raises(MissingData, match="weights"):
        small(trace, weights=True)


def test_nonsense_is_refused() -> None:
    for wrong in ({"hidden": 0}, {"window": 0}, {"dropout": 1.0}, {"heads": 0}, {"hidden": 6}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Transformer(**wrong)
    trace = random_trace(n_requests=4, tokens=5)
    with pytest.raises(MissingData, match="too few requests"):
        Transformer(hidden=4, epochs=1).fit(Part(trace, np.arange(3)), Part(trace, np.array([77])))
