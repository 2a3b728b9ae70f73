"""Scores from files equal a slow definition: recall, exact sets, and what an LRU cache would have missed."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import FormatError
from prefetch.predict.guesses import write_guesses
from prefetch.predict.markov import Markov
from prefetch.predict.none import Nothing
from prefetch.predict.oracle import Oracle
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.popularity import Popularity
from prefetch.predict.predictor import NOT_GUESSED, Predictor
from prefetch.predict.scored import measures as m
from prefetch.predict.scored.held_out import held_out_in
from prefetch.predict.scored.measures import Counts, count
from prefetch.scoring import SharedText
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import RoutingTrace


def written(predictor: Predictor, part: Part, folder: Path, width: int) -> PredictionsReader:
    folder.mkdir(exist_ok=True)
    write_guesses(
        predictor, part, folder, name="p", trace="t", width=width, fitted=(), n_bytes=0
    )  # fmt: skip
    return PredictionsReader(folder)


def slow(trace: RoutingTrace, guess_TLP: np.ndarray, top_k: int) -> np.ndarray:
    """[L, M] by Python sets and an ordered dict per layer."""
    card = trace.card
    sums = np.zeros((card.n_layers, m.COLUMNS), np.int64)
    for layer in range(card.n_layers):
        lru: OrderedDict[int, None] = OrderedDict()
        for t in range(trace.n_tokens):
            row = [int(e) for e in trace.ids_TLK[t, layer] if e != 255]
            if not row:
                continue
            true, guess = set(row), [int(e) for e in guess_TLP[t, layer] if e != 255]
            k, two = set(guess[:top_k]), set(guess[: 2 * top_k])
            missed, out = true - set(lru), sums[layer]
            wrong = [rank for rank, e in enumerate(guess, 1) if e not in true]
            out[m.EVENTS] += 1
            out[m.CHOICES] += len(true)
            out[m.HITS_K] += len(k & true)
            out[m.HITS_2K] += len(two & true)
            out[m.EXACT] += true <= k
            out[m.GUESSED_K] += len(k)
            out[m.FIRST_MISS] += wrong[0] if wrong else len(guess) + 1
            out[m.MISSES] += len(missed)
            out[m.MISSES_K] += len(missed & k)
            out[m.MISSES_2K] += len(missed & two)
            out[m.LOADS_K] += len(k - set(lru))
            out[m.LOADS_2K] += len(two - set(lru))
            for expert in row:
                lru.pop(expert, None)
                lru[expert] = None
            while len(lru) > card.n_experts // 4:
                lru.popitem(last=False)
    return sums


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("width", [3, 6, 16])
def test_counts_equal_a_slow_definition(tmp_path: Path, width: int, holes: bool) -> None:
    trace = random_trace(n_requests=6, tokens=30)
    if holes:
        trace.ids_TLK[::5, 1, 2] = 255
        trace.ids_TLK[::7, 2] = 255
    part = whole(trace)
    reader = written(Markov((1, 2)).fit(part, part), part, tmp_path / "p", width)
    counts = count(reader, held_out_in(part))
    guess_THLP = np.concatenate([block.ids_THLP for block in reader.batches()])
    for h in range(2):
        expected = slow(trace, guess_THLP[:, h], 3)
        np.testing.assert_array_equal(counts.layer_HXLM[h, 0], expected)
        for rows in range(2):  # new text, all: nothing is kept apart here
            total = counts.unit_HYULM[h, rows].sum(axis=0)
            np.testing.assert_array_equal(total, expected[:, : m.UNIT_COLUMNS])
        hits = counts.rank_HXLP[h, 0].cumsum(axis=1)
        np.testing.assert_array_equal(hits[:, 2], expected[:, m.HITS_K])


def test_rows_of_a_template_stand_apart(tmp_path: Path) -> None:
    trace = random_trace(n_requests=6, tokens=30)
    template = SharedText(np.arange(512)[None] < 4, np.arange(256)[None] < 2)
    part = whole(trace)
    reader = written(Popularity().fit(part, part), part, tmp_path / "p", 6)
    is_copy_R = np.array([0, 0, 1, 0, 0, 0], bool)
    tested = dataclasses.replace(held_out_in(part), shared=template, is_copy_R=is_copy_R)
    counts = count(reader, tested)
    assert counts.layer_HXLM[0, :, :, m.EVENTS].T.tolist() == [[120, 36, 24]] * 4
    assert counts.row_XR.tolist() == [[24, 24, 0, 24, 24, 24], [6] * 6, [0, 0, 24, 0, 0, 0]]
    assert counts.unit_HYULM[0, 0, 2].sum() == 0 < counts.unit_HYULM[0, 1, 2].sum()


def test_probabilities_are_binned(tmp_path: Path) -> None:
    """Popularity on its own trace is right as often as it says."""
    part = whole(random_trace(n_requests=60))
    reader = written(Popularity().fit(part, part), part, tmp_path / "p", 16)
    counts: Counts = count(reader, held_out_in(part))
    guesses, scores, right = counts.bin_HBC[0].sum(axis=0)
    assert guesses == 60 * 40 * 3 * 6  # from the horizon on, the best 2k
    assert right == counts.layer_HXLM[0, m.NEW, 1:, m.HITS_2K].sum()
    assert scores == pytest.approx(right, rel=1e-3)  # float16


def test_bins_hold_the_rows_of_the_headline(tmp_path: Path) -> None:
    part = whole(random_trace(n_requests=6, tokens=30))
    reader = written(Popularity().fit(part, part), part, tmp_path / "p", 6)
    template = SharedText(np.arange(512)[None] < 10, np.zeros((1, 256), bool))
    counts = count(reader, dataclasses.replace(held_out_in(part), shared=template))
    assert counts.bin_HBC[0, :, 0].sum() == counts.layer_HXLM[0, m.NEW, 1:, m.EVENTS].sum() * 6


@pytest.mark.parametrize("width", [3, 6, 16])
def test_silence_is_a_miss_and_width_changes_no_rank(tmp_path: Path, width: int) -> None:
    part = whole(random_trace(n_requests=6))
    for predictor, first_miss in ((Nothing(), 1), (Oracle(), 4)):
        reader = written(predictor, part, tmp_path / type(predictor).__name__, width)
        sums = count(reader, held_out_in(part)).layer_HXLM[0, m.NEW]
        assert (sums[:, m.FIRST_MISS] == first_miss * sums[:, m.EVENTS]).all()


class Short(Popularity):
    def scores(self, past: Past) -> np.ndarray:
        scores_TLE = super().scores(past)
        third_TL1 = np.sort(scores_TLE, axis=2)[:, :, -3:-2]
        return np.where(scores_TLE >= third_TL1, scores_TLE, NOT_GUESSED).astype(np.float32)


def test_foreign_lists_are_as_wide_as_the_longest(tmp_path: Path) -> None:
    part = whole(random_trace(n_requests=6))
    reader = written(
        Short().fit(part, part), part, tmp_path / "p", 6
    )  # three guesses and three holes
    assert count(reader, held_out_in(part)).width == 6
    assert count(reader, held_out_in(part), is_foreign=True).width == 3


def test_guesses_about_other_rows_are_refused(tmp_path: Path) -> None:
    trace = random_trace()
    part = whole(trace)
    reader = written(Popularity().fit(part, part), part, tmp_path / "p", 6)
    with pytest.raises(FormatError, match="ends at row 1200; the trace goes on"):
        count(reader, held_out_in(whole(random_trace(n_requests=31))))
    with pytest.raises(FormatError, match="has rows after row 1160"):
        count(reader, held_out_in(whole(random_trace(n_requests=29))))
    with pytest.raises(FormatError, match="row 40 is about request 1, position 0"):
        count(reader, held_out_in(whole(random_trace(n_requests=24, tokens=50))))
    with pytest.raises(FormatError, match="the trace has 4 of 15"):
        count(reader, held_out_in(whole(random_trace(n_experts=15))))
