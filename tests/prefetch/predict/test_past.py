"""What a guess may know: aligned by hand, and unchanged when everything later changes, for every predictor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from omegaconf import OmegaConf
from recorded_traces import SMALL, full_trace, on_disk
from routing_traces import random_trace

from prefetch import config, leaves
from prefetch.errors import MissingData
from prefetch.predict.part import whole
from prefetch.predict.past import Answered, Past
from prefetch.predict.predictor import SCORES, SEES, Predictor, cheats
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace

NAMES = [name for name in config.choices("predictor") if name != "imported"]  # that needs a file


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TraceReader, TraceReader]:
    """Two traces on disk, with the routers beside them: to learn from, and to tune on."""
    one, two = (tmp_path_factory.mktemp("trace") for _ in range(2))
    return on_disk(full_trace(0), one, 0), on_disk(full_trace(5), two, 5)


def built(name: str, horizons: list[int]) -> Predictor:
    leaf = OmegaConf.load(config.CONFIGS / "predictor" / f"{name}.yaml")
    root = OmegaConf.create({"seed": 0, "train": {"horizons": horizons}, "predictor": leaf})
    for key, value in SMALL.get(name, {}).items():
        if key in root.predictor:
            root.predictor[key] = value
    return leaves.instantiate(root.predictor, "predictor")


def test_what_is_known_is_aligned_with_the_target() -> None:
    trace = random_trace(n_requests=2, tokens=5)
    past, ids_TLK = Past(trace, 2), trace.ids_TLK
    np.testing.assert_array_equal(past.here()[:, 2:], ids_TLK[:, :2])
    assert (past.here()[:, :2] == past.nobody).all()
    np.testing.assert_array_equal(past.here(1)[:, 3:], ids_TLK[:, :1])
    np.testing.assert_array_equal(past.before()[1:5], ids_TLK[:4])
    assert (past.before()[[0, 5]] == past.nobody).all()
    np.testing.assert_array_equal(past.before(3)[8:], ids_TLK[5:7])
    np.testing.assert_array_equal(past.nearest()[1:5, :2], ids_TLK[:4, :2])
    np.testing.assert_array_equal(past.nearest()[:, 2:], ids_TLK[:, :2])
    np.testing.assert_array_equal(past.earlier(7), ids_TLK[5:7])
    assert (Past(trace, 9).here() == past.nobody).all()
    with pytest.raises(ValueError, match="at least 1 back"):
        past.before(0)


def test_usage_is_a_decayed_average_of_earlier_tokens() -> None:
    trace = random_trace(n_requests=2, tokens=6)
    used_TLE = np.zeros((12, 4, 16))
    np.put_along_axis(used_TLE, trace.ids_TLK.astype(int), 1, axis=2)
    expected = np.zeros_like(used_TLE)
    for t in range(12):
        if t % 6:
            expected[t] = 0.7 * expected[t - 1] + 0.3 * used_TLE[t - 1]
    np.testing.assert_allclose(Past(trace, 1).usage(0.7), expected, atol=1e-6)


def test_recorded_columns_are_shifted_too() -> None:
    trace = full_trace()
    past = Past(trace, 2)
    np.testing.assert_array_equal(past.gate_inputs()[:, 2:], trace.gate_inputs_TLD[:, :2])
    np.testing.assert_array_equal(past.pre_attention()[:, 1:], trace.pre_attention_TLD[:, :3])
    assert not past.gate_inputs()[:, :2].any() and not past.pre_attention()[:, :1].any()
    np.testing.assert_array_equal(past.here_weights()[:, 2:], trace.weights_TLK[:, :2])
    np.testing.assert_array_equal(past.here_weights(1)[:, 3:], trace.weights_TLK[:, :1])
    assert not past.here_weights()[:, :2].any() and not past.here_weights(1)[:, :3].any()
    np.testing.assert_array_equal(past.before_weights()[1], trace.weights_TLK[0])
    np.testing.assert_array_equal(past.before_weights(2)[3], trace.weights_TLK[1])
    assert not past.before_weights()[[0, 10]].any(), "where a request begins nothing was before"


@pytest.mark.parametrize("horizon", [4, 5, 9])
def test_beyond_the_first_layer_nothing_of_the_token_is_known(horizon: int) -> None:
    past = Past(full_trace(), horizon)
    assert (past.here() == past.nobody).all()
    assert not past.here_weights().any() and not past.gate_inputs().any()
    np.testing.assert_array_equal(past.nearest(), past.before())


def test_what_a_trace_lacks_is_named() -> None:
    past = Past(random_trace(n_requests=2, tokens=5), 1)
    for ask, name in (
        (past.here_weights, "weights"),
        (past.before_weights, "weights"),
        (past.gate_inputs, "gate_inputs"),
        (past.pre_attention, "pre_attention"),
    ):
        with pytest.raises(MissingData, match=rf"needs (the )?{name}.*not recorded"):
            ask()


def test_windows_hold_every_row_once() -> None:
    past = Past(random_trace(n_requests=2, tokens=5), 1)
    found = [list(range(10))[window] for window in past.windows(4)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def changed_after(trace: RoutingTrace, row: int, layer: int, horizon: int) -> RoutingTrace:
    """The same until layer - horizon of this row (one more for what attention reads); everything after it differs."""
    other = full_trace(99)
    arrays = {}
    for field in ("ids_TLK", "weights_TLK", "gate_inputs_TLD", "pre_attention_TLD", "token_T"):
        mine, theirs = getattr(trace, field).copy(), getattr(other, field)
        if field != "token_T":
            known = max(0, layer - horizon + 1) + (field == "pre_attention_TLD")
            mine[row, known:] = theirs[row, known:]
        mine[row + 1 :] = theirs[row + 1 :]
        arrays[field] = mine
    return dataclasses.replace(trace, **arrays)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_later_changes_no_guess(
    name: str, recorded: tuple[TraceReader, TraceReader]
) -> None:
    """For every predictor: other routing, inputs and words from then on leave every earlier guess as it was."""
    trace, horizons = full_trace(), [1, 2]
    predictor = built(name, horizons).fit(*map(whole, recorded))
    view, moved = (Answered if cheats(predictor) else Past), 0
    for horizon in horizons:
        plain = predictor.scores(view(trace, horizon))
        for row, layer in ((3, 0), (17, 1), (25, 3), (78, 2)):
            later = view(changed_after(trace, row, layer, horizon), horizon)
            scores = predictor.scores(later)
            same_rows = np.array_equal(scores[:row], plain[:row])
            same_here = np.array_equal(scores[row, : layer + 1], plain[row, : layer + 1])
            moved += not (same_rows and same_here)
            assert scores.shape == past_shape(trace) and not np.isnan(scores).any()
    assert bool(moved) == cheats(predictor), f"{name} sees {predictor.sees}"


def past_shape(trace: RoutingTrace) -> tuple[int, int, int]:
    return trace.n_tokens, trace.card.n_layers, trace.card.n_experts


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_a_predictor_are_known_words(name: str) -> None:
    predictor = built(name, [1])
    assert set(predictor.sees.split(" + ")) <= set(SEES) and predictor.score in SCORES
    assert set(predictor.needs) <= {"weights", "gate_inputs", "pre_attention"}


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_strangers(name: str, recorded: tuple[TraceReader, TraceReader]) -> None:
    """A guess about one request is the same when it stands alone."""
    trace = full_trace()
    predictor = built(name, [1]).fit(*map(whole, recorded))
    view = Answered if cheats(predictor) else Past
    alone = predictor.scores(view(trace.rows(slice(30, 40)), 1))
    np.testing.assert_allclose(alone, predictor.scores(view(trace, 1))[30:40], atol=1e-5)
