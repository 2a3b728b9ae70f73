"""The state runs through whole requests: chunks are one with it, both faces agree, requests stand alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict import recurrent
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import restore, save
from prefetch.predict.recurrent import Recurrent
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of


def holes() -> RoutingTrace:
    trace = random_trace(n_requests=8, tokens=12)
    trace.ids_TLK[::5, 1, 2] = 255
    trace.ids_TLK[::7, 2] = 255
    return trace


def small(trace: RoutingTrace, **settings: object) -> Recurrent:
    given = {"hidden": 12, "epochs": 2, **settings}
    return Recurrent((1, 3), **given).fit(Part(trace, np.arange(5)), Part(trace, np.arange(5, 8)))


def test_the_same_seed_gives_the_same_bytes_and_survives_the_disk(tmp_path: Path) -> None:
    trace = holes()
    one, two, other = small(trace), small(trace), small(trace, seed=1)
    past = Past(trace, 1)
    np.testing.assert_array_equal(one.scores(past), two.scores(past))
    assert not np.array_equal(one.scores(past), other.scores(past))
    save(one, tmp_path, {}, 0.0)
    again = Recurrent((1, 3), hidden=12)
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(past), one.scores(past))


def test_how_a_request_is_cut_changes_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is all that a chunk leaves behind; the order of sums differs, so they are nearly the same."""
    trace = holes()
    fitted, past = small(trace), Past(trace, 3)
    whole = fitted.scores(past)
    for chunk in (1, 5):
        monkeypatch.setattr(recurrent, "CHUNK", chunk)
        np.testing.assert_allclose(fitted.scores(past), whole, atol=1e-5)


@pytest.mark.parametrize("horizon", [1, 3])
def test_both_faces_agree(horizon: int) -> None:
    """Sums in another order: nearly the same."""
    trace = holes()
    fitted = small(trace)
    expected, online = fitted.scores(Past(trace, horizon)), fitted.online(horizon)
    for t in range(trace.n_tokens):
        if t % 12 == 0:
            online.start()
        for layer in range(4):
            if layer < horizon:
                np.testing.assert_allclose(online.guess(layer), expected[t, layer], atol=1e-5)
        for layer in range(4):
            online.observe(layer, trace.ids_TLK[t, layer])
            if layer + horizon < 4:
                ahead = layer + horizon
                np.testing.assert_allclose(online.guess(ahead), expected[t, ahead], atol=1e-5)


def test_it_remembers_what_the_request_began_with() -> None:
    """The second layer repeats the first token of the request: nothing but a state can tell it."""
    rng = np.random.default_rng(0)
    ids_TLK = rng.integers(0, 4, (1600, 2, 1))
    ids_TLK[:, 1] = np.repeat(ids_TLK[::8, 0], 8, axis=0)
    card = plain_card("first", n_experts=4, top_k=1, layer_numbers=(0, 1))
    trace = trace_of(card, ids_TLK, request_T=np.arange(1600) // 8)
    parts = Part(trace, np.arange(160)), Part(trace, np.arange(160, 180))
    fitted = Recurrent((1,), hidden=16, epochs=6, batch=8, dropout=0.0).fit(*parts)
    asked = trace.rows(slice(1440, 1600))
    guessed = fitted.scores(Past(asked, 1))[:, 1].argmax(axis=1)
    assert (guessed == asked.ids_TLK[:, 1, 0]).mean() > 0.95


def test_a_request_of_one_token_and_two_layers() -> None:
    trace = random_trace(n_requests=6, tokens=1, n_layers=2)
    parts = Part(trace, np.arange(4)), Part(trace, np.arange(4, 6))
    fitted = Recurrent((1,), hidden=4, epochs=1).fit(*parts)
    assert np.isfinite(fitted.scores(Past(trace, 1))).all()


def test_a_split_in_time_learns_from_the_first_part_alone() -> None:
    """What the later part of the only request holds changes nothing that was learnt."""
    trace, other = (random_trace(seed, n_requests=1, tokens=40) for seed in (0, 1))
    ids_TLK = trace.ids_TLK.copy()
    ids_TLK[20:] = other.ids_TLK[20:]
    fitted = []
    for one in (trace, dataclasses.replace(trace, ids_TLK=ids_TLK)):
        parts = Part(one, np.arange(1), 0, 20), Part(one, np.arange(1), 20, 30)
        fitted.append(Recurrent((1,), hidden=4, epochs=1).fit(*parts).scores(Past(trace, 1)))
    np.testing.assert_array_equal(*fitted)


def test_nonsense_is_refused() -> None:
    for wrong in ({"hidden": 0}, {"chunk": 0}, {"dropout": 1.0}, {"most_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Recurrent(**wrong)
    trace = random_trace(n_requests=4, tokens=5)
    with pytest.raises(MissingData, match="too few requests"):
        Recurrent(hidden=4, epochs=1).fit(Part(trace, np.arange(3)), Part(trace, np.array([77])))
