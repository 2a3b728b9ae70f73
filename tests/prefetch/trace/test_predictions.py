"""Guesses go to disk and come back equal; what does not fit its own description is refused."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from prefetch.errors import FormatError
from prefetch.trace import parquet
from prefetch.trace.predictions import (
    Predictions,
    PredictionsCard,
    PredictionsReader,
    PredictionsWriter,
)

CARD = PredictionsCard(
    trace="abc",
    predictor="toy",
    n_experts=16,
    n_layers=3,
    width=4,
    horizons=(1, 4),
    causality="decode",
    score="probability",
    requests=(0, 2),
    fitted_requests=(1,),
)


def block(n: int = 10, card: PredictionsCard = CARD) -> Predictions:
    rng = np.random.default_rng(0)
    shape = (n, len(card.horizons), card.n_layers, card.n_experts)
    return Predictions(
        card=card,
        request_T=np.repeat([0, 2], [n // 2, n - n // 2]).astype(np.int32),
        position_T=np.arange(n, dtype=np.int32),
        ids_THLP=rng.random(shape).argsort(-1)[..., : card.width].astype(np.uint8),
        scores_THLP=rng.random((*shape[:-1], card.width)).astype(np.float16),
    )


@pytest.mark.parametrize("group_bytes", [100, 1 << 24])
def test_what_is_written_is_read(tmp_path, monkeypatch, group_bytes):
    monkeypatch.setattr("prefetch.trace.predictions.GROUP_BYTES", group_bytes)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 500)
    writer = PredictionsWriter(tmp_path, CARD)
    writer.append(block())
    writer.close()
    reader = PredictionsReader(tmp_path)
    assert reader.card == CARD and reader.n_tokens == 10
    blocks = list(reader.batches(max_rows=3))
    for name in ("request_T", "position_T", "ids_THLP", "scores_THLP"):
        joined = np.concatenate([getattr(part, name) for part in blocks])
        np.testing.assert_array_equal(joined, getattr(block(), name))


def test_no_guess_is_the_largest_value_and_needs_no_score():
    good = block()
    good.ids_THLP[0, 0, 0, 3], good.scores_THLP[0, 0, 0, 3] = 255, np.nan
    dataclasses.replace(good)
    good.ids_THLP[0, 0, 0, 3] = 3
    with pytest.raises(FormatError, match="has no score"):
        dataclasses.replace(good)


def test_an_id_out_of_range_is_named_with_its_horizon():
    bad = block()
    bad.ids_THLP[4, 1, 2, 0] = 16
    with pytest.raises(FormatError, match="row 4, horizon 4, layer slot 2: expert id 16"):
        dataclasses.replace(bad)


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"causality": "maybe"}, "causality must be one of"),
        ({"width": 17}, "width must be from 1"),
        ({"horizons": (0,)}, "horizons must be distinct"),
        ({"horizons": ()}, "horizons must be distinct"),
        ({"event_us_from": "hearsay"}, "event_us_from must be one of"),
        ({"requests": (2, 0)}, "requests must ascend"),
    ],
)
def test_a_card_states_which_claim_fails(change, claim):
    with pytest.raises(FormatError, match=claim):
        dataclasses.replace(CARD, **change)


def test_a_promise_of_other_requests_is_refused(tmp_path):
    card = dataclasses.replace(CARD, requests=(0, 2, 3))
    writer = PredictionsWriter(tmp_path, card)
    writer.append(block(card=card))
    with pytest.raises(FormatError, match=r"promised the requests .* wrote"):
        writer.close()


def test_guesses_about_another_trace_are_refused(tmp_path):
    writer = PredictionsWriter(tmp_path, CARD)
    writer.append(block())
    writer.close()
    reader = PredictionsReader(tmp_path)
    reader.check_fits(trace="abc", n_experts=16, n_layers=3)
    with pytest.raises(FormatError, match="trace is abc, expected other"):
        reader.check_fits(trace="other", n_experts=16, n_layers=3)


def test_guesses_fitted_on_what_is_asked_are_refused(tmp_path):
    writer = PredictionsWriter(tmp_path, CARD)
    writer.append(block())
    writer.close()
    check = functools.partial(
        PredictionsReader(tmp_path).check_fits, trace="abc", n_experts=16, n_layers=3
    )
    check(requests=[0, 2])
    with pytest.raises(FormatError, match="fitted on 1 of the 2 requests that are asked"):
        check(requests=[0, 1])


def test_requests_of_another_trace_are_no_requests_of_this_one():
    assert CARD.fitted_here == (1,)
    assert dataclasses.replace(CARD, fitted_trace="abc").fitted_here == (1,)
    assert dataclasses.replace(CARD, fitted_trace="other").fitted_here == ()


def test_a_card_of_before_can_be_read(tmp_path):
    writer = PredictionsWriter(tmp_path, CARD)
    writer.append(block())
    writer.close()
    path = tmp_path / "predictions.json"
    about = json.loads(path.read_text())
    for name in ("event_us_from", "event_us_p99", "fitted_trace"):
        del about["card"][name]
    path.write_text(json.dumps(about))
    assert PredictionsReader(tmp_path).card == CARD
