"""The network with route memory: its memory never holds the request it learns from; it survives the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import MissingData
from prefetch.predict.memory_mlp import MemoryMlp
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import restore, save
from prefetch.predict.route_memory import RouteMemory
from prefetch.trace.routing import RoutingTrace


def small(trace: RoutingTrace, **settings: object) -> MemoryMlp:
    given = {"hidden": 8, "epochs": 2, "batch": 16, **settings}
    return MemoryMlp((1, 3), **given).fit(Part(trace, np.arange(6)), Part(trace, np.arange(6, 8)))


def test_the_same_seed_gives_the_same_bytes_and_survives_the_disk(tmp_path: Path) -> None:
    trace = random_trace(n_requests=10, tokens=12)
    one, two = small(trace), small(trace)
    for horizon in (1, 3):
        past = Past(trace.rows(slice(96, 120)), horizon)
        np.testing.assert_array_equal(one.scores(past), two.scores(past))
    save(one, tmp_path, {}, 0.0)
    again = MemoryMlp((1, 3), hidden=8)
    restore(again, tmp_path)
    np.testing.assert_array_equal(again.scores(past), one.scores(past))


def test_what_is_remembered_is_not_asked_about_itself() -> None:
    """Told with its own request left out, a remembered request hears what a memory without it would say."""
    trace = random_trace(n_requests=6, tokens=10)
    everything, without = (RouteMemory(nearest=7) for _ in range(2))
    for memory, part in (
        (everything, Part(trace, np.arange(6))),
        (without, Part(trace, np.array([0, 1, 3, 4, 5]))),
    ):
        memory.chance_LE_ = np.zeros((4, 16), np.float32)
        memory.remember(part)
    past = Past(trace.rows(slice(20, 30)), 1)
    told, sure = everything.told(past, is_remembered=True)
    expected, expected_sure = without.told(past, is_remembered=False)
    np.testing.assert_array_equal(sure, expected_sure)
    # who of the equally alike is nearest depends on where he stands; most agree, and itself would have shown
    assert np.mean(np.abs(told.astype(float) - expected) > 0.01) < 0.02
    itself, sure_itself = everything.told(past, is_remembered=False)
    assert (sure_itself[:, 3, 1] > sure[:, 3, 1]).all()
    assert np.mean(np.abs(itself.astype(float) - expected) > 0.01) > 0.1


def test_fitted_again_it_forgets_what_it_learnt_before() -> None:
    one, other = (random_trace(seed, n_requests=10, tokens=12) for seed in (0, 1))
    twice = small(one)
    past = Past(one.rows(slice(96, 120)), 1)
    twice.scores(past)
    twice.fit(Part(other, np.arange(6)), Part(other, np.arange(6, 8)))
    np.testing.assert_array_equal(twice.scores(past), small(other).scores(past))


def test_of_one_request_split_in_time_nothing_is_remembered() -> None:
    """Leaving its only request out, a memory would say nothing while the network learns and much when it is asked."""
    trace = random_trace(n_requests=1, tokens=60)
    request = np.array([0])
    fitted = MemoryMlp(hidden=8, epochs=1, batch=16).fit(
        Part(trace, request, 0, 36), Part(trace, request, 36, 42)
    )
    assert len(fitted.ids_MLK_) == 0
    scores = fitted.scores(Past(trace, 1))
    assert np.isfinite(scores).all() and scores[42:].std() > 0.001


def test_too_few_rows_are_refused() -> None:
    trace = random_trace(n_requests=4, tokens=5)
    with pytest.raises(MissingData, match="too few requests"):
        MemoryMlp(hidden=4, epochs=1, stops_early=True).fit(
            Part(trace, np.arange(3)), Part(trace, np.array([77]))
        )


def test_the_validation_requests_are_learnt_from_unless_they_tell_when_to_stop() -> None:
    trace = random_trace(n_requests=10, tokens=12)
    everything, held_back = small(trace), small(trace, stops_early=True)
    assert set(everything.request_M_) == set(range(8)) and set(held_back.request_M_) == set(
        range(6)
    )
    assert all("score" in row for row in held_back.curve)
    assert len(everything.curve) == 4 and not any("score" in row for row in everything.curve)
    joined = Part(trace, np.arange(8)), Part(trace, np.array([], np.int64))
    given = {"hidden": 8, "epochs": 2, "batch": 16}
    past = Past(trace.rows(slice(96, 120)), 1)
    expected = MemoryMlp((1, 3), **given).fit(*joined).scores(past)
    np.testing.assert_array_equal(everything.scores(past), expected)
