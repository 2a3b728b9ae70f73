"""What stands in two tables is the same number, and what a list cannot tell is not told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.predict.guesses import write_guesses
from prefetch.predict.markov import Markov
from prefetch.predict.part import parts_of, survey_of
from prefetch.predict.popularity import Popularity
from prefetch.predict.predictor import Predictor
from prefetch.predict.previous_token import PreviousToken
from prefetch.predict.scored import results
from prefetch.predict.scored.held_out import HeldOut, held_out_folds
from prefetch.predict.scored.measures import count
from prefetch.predict.scored.results import Scored
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import RoutingTrace, trace_of

PREDICTORS = {"previous_token": PreviousToken, "markov": Markov, "popularity": Popularity}


def unequal() -> RoutingTrace:
    """Every fifth request is long and always the same: easy for the previous token, and most of all rows."""
    base = random_trace(n_requests=20, skew=0.3)
    pieces = [
        np.tile(base.ids_TLK[40 * r][None], (400, 1, 1))
        if r % 5 == 0
        else base.ids_TLK[40 * r :][:12]
        for r in range(20)
    ]
    lengths = [len(piece) for piece in pieces]
    return trace_of(base.card, np.concatenate(pieces), request_T=np.repeat(np.arange(20), lengths))


def scored(
    trace: RoutingTrace, folder: Path, name: str = "markov", width: int = 6, n_folds: int = 5
) -> Scored:
    counts = []
    held: list[HeldOut] = held_out_folds(trace, 0, n_folds)
    for fold, held_out in zip(survey_of(trace).folds(0), held, strict=False):
        train, validation, _ = parts_of(trace, fold)
        predictor: Predictor = PREDICTORS[name]((1, 2)).fit(train, validation)
        place = folder / f"{name}{width}_{fold.number}"
        place.mkdir()
        write_guesses(
            predictor, held_out.part, place, name=name, trace="t", width=width, fitted=(), n_bytes=0,
        )  # fmt: skip
        counts.append(count(PredictionsReader(place), held_out))
    return Scored(name, "routing history", False, tuple(counts), 0, 0.0, None)


def test_every_table_says_the_same(tmp_path: Path) -> None:
    trace = unequal()
    all_scored = [scored(trace, tmp_path, name) for name in PREDICTORS]
    table = results.summary(all_scored, 0)
    cells = table[table["rows"] == "new_text"].set_index(["predictor", "horizon"])
    assert (cells.low <= cells.recall_at_k).all() and (cells.recall_at_k <= cells.high).all()
    assert (cells.low_2k <= cells.recall_at_2k).all() and (
        cells.recall_at_2k <= cells.high_2k
    ).all()
    by_width = results.by_width(all_scored).set_index(["predictor", "horizon", "width"]).recall
    by_fold = results.by_fold(all_scored).groupby(["predictor", "horizon"]).recall_at_k.mean()
    layers = results.by_layer(all_scored, trace.card)
    layers = layers[(layers["rows"] == "new_text") & ~layers.is_first_layer]
    by_layer = layers.groupby(["predictor", "horizon"]).recall_at_k.mean()
    for name, horizon in cells.index:
        recall = cells.recall_at_k[name, horizon]
        assert by_width[name, horizon, 3] == pytest.approx(recall, abs=1e-12)
        assert by_width[name, horizon, 6] == pytest.approx(cells.recall_at_2k[name, horizon])
        assert by_fold[name, horizon] == pytest.approx(recall, abs=1e-12)
        assert by_layer[name, horizon] == pytest.approx(recall, abs=1e-12)
        for counts in all_scored[0].folds:
            np.testing.assert_array_equal(
                counts.unit_HYULM.sum(axis=2), _both(counts.layer_HXLM)[..., :3]
            )
    gains = results.differences(all_scored, 0)
    assert (gains.low <= gains.gain_at_k).all() and (gains.gain_at_k <= gains.high).all()
    for row in gains.itertuples():
        gain = cells.recall_at_k["previous_token", row.horizon]
        gain -= cells.recall_at_k[row.against, row.horizon]
        assert row.gain_at_k == pytest.approx(gain, abs=1e-12)


def _both(layer_HXLM: np.ndarray) -> np.ndarray:
    return np.stack([layer_HXLM[:, 0], layer_HXLM.sum(axis=1)], axis=1)


def test_turns_of_a_conversation_are_drawn_together(tmp_path: Path) -> None:
    """Four turns of each conversation are no four independent requests."""
    base = random_trace(n_requests=24, tokens=48)
    turns = [base.ids_TLK[48 * c :][: 12 * n] for c in range(24) for n in range(1, 5)]
    request_T = np.repeat(np.arange(96), [len(turn) for turn in turns])
    one = scored(trace_of(base.card, np.concatenate(turns), request_T=request_T), tmp_path)
    assert [counts.unit_HYULM.shape[2] for counts in one.folds] == [5, 5, 5, 5, 4]
    row = results.summary([one], 0).iloc[0]
    assert row.requests == 96 and row.near_copies == 0


@pytest.mark.parametrize(("width", "known"), [(2, []), (4, ["k"]), (6, ["k", "2k"])])
def test_what_a_short_list_cannot_tell_is_not_told(
    tmp_path: Path, width: int, known: list[str]
) -> None:
    one = scored(random_trace(n_requests=20), tmp_path, width=width)
    row = results.summary([one], 0).iloc[0]
    at_k = ["recall_at_k", "low", "high", "exact_match", "precision_at_k", "rank_of_first_miss",
            "miss_recall", "useful_load_share", "first_layers_recall_at_k"]  # fmt: skip
    at_2k = ["recall_at_2k", "low_2k", "high_2k", "miss_recall_2k", "useful_load_share_2k"]
    assert row[at_k].notna().all() == row[at_k].notna().any() == ("k" in known)
    assert row[at_2k].notna().all() == row[at_2k].notna().any() == ("2k" in known)
    layers = results.by_layer([one], random_trace().card)
    assert layers.recall_at_k.notna().all() == ("k" in known)
    assert layers.recall_at_2k.notna().all() == ("2k" in known)
    assert results.by_width([one]).width.max() == width
