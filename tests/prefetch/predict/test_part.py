"""Parts and folds: every request tested once, nothing in two parts, rows that never ran nowhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import MissingData
from prefetch.predict.part import Part, parts_of, survey_of, together, whole
from prefetch.scoring import FOLDS
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.stretch import Stretch
from prefetch.trace.writer import TraceWriter


def test_every_request_is_tested_once_and_learnt_from_elsewhere() -> None:
    folds = survey_of(random_trace(n_requests=33)).folds(0)
    assert len(folds) == FOLDS
    np.testing.assert_array_equal(np.sort(np.concatenate([f.test for f in folds])), range(33))
    for fold in folds:
        together = np.concatenate([fold.train, fold.validation, fold.test])
        np.testing.assert_array_equal(np.sort(together), range(33))
        assert 3 <= len(fold.validation) <= 4 and 6 <= len(fold.test) <= 7
    again = survey_of(random_trace(n_requests=33)).folds(0)
    np.testing.assert_array_equal(again[2].train, folds[2].train)
    assert not np.array_equal(
        survey_of(random_trace(n_requests=33)).folds(1)[0].test, folds[0].test
    )


@pytest.mark.parametrize("n_requests", [1, 12])
def test_train_and_validation_together_are_all_that_is_not_tested(n_requests: int) -> None:
    """Of requests, and of one request that is split in time."""
    trace = random_trace(n_requests=n_requests, tokens=40)
    parts = parts_of(trace, survey_of(trace).folds(0)[0])

    def rows(part: Part) -> set[tuple[int, int]]:
        blocks = ((block.rows(counted_T)) for block, counted_T in part.blocks())
        return {(r, p) for b in blocks for r, p in zip(b.request_T, b.position_T, strict=True)}

    both = rows(together(parts.train, parts.validation))
    assert both == rows(parts.train) | rows(parts.validation)
    assert both and not both & rows(parts.test)


def test_every_domain_has_its_share_of_every_fold() -> None:
    trace = random_trace(n_requests=40)
    domain_T = np.where(trace.request_T < 10, 0, 1).astype(np.int32)
    trace = dataclasses.replace(trace, domains=("few", "many"), domain_T=domain_T)
    for fold in survey_of(trace).folds(0):
        assert (fold.test < 10).sum() == 2 and (fold.test >= 10).sum() == 6


def test_repeated_requests_are_in_no_part() -> None:
    trace = random_trace(n_requests=10)
    trace.ids_TLK[280:320] = trace.ids_TLK[:40]
    for fold in survey_of(trace).folds(0):
        assert 7 not in np.concatenate([fold.train, fold.validation, fold.test])


def test_some_requests_are_drawn_from_all_over_the_trace() -> None:
    everything = whole(random_trace(n_requests=60, tokens=10))
    some = everything.some(195, seed=0)
    assert len(some.requests) == 20 and (np.diff(some.requests) > 0).all()
    assert some.requests.max() > 40 and some.requests.min() < 20
    assert sum(counted_T.sum() for _, counted_T in some.blocks()) == 200
    np.testing.assert_array_equal(some.requests, everything.some(195, seed=0).requests)
    assert not np.array_equal(some.requests, everything.some(195, seed=1).requests)
    assert everything.some(600, seed=0) is everything
    assert len(everything.some(0, seed=0).requests) == 0


def test_few_requests_are_split_in_time_and_know_what_was_before() -> None:
    trace = random_trace(n_requests=1, tokens=100)
    (fold,) = survey_of(trace).folds(0)
    assert fold.kind == "time"
    train, validation, test = parts_of(trace, fold)
    seen = {name: [] for name in ("train", "validation", "test")}
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        for block, counted_T in part.blocks():
            seen[name] += block.position_T[counted_T].tolist()
            assert block.position_T[0] == 0
        assert part.asked().tolist() == [0]
    assert seen == {
        "train": list(range(60)),
        "validation": list(range(60, 70)),
        "test": list(range(70, 100)),
    }


def test_a_request_that_ends_before_the_test_begins_is_not_asked_about() -> None:
    trace = random_trace(n_requests=3, tokens=20)
    (fold,) = survey_of(trace).folds(0)
    assert [part.asked().tolist() for part in parts_of(trace, fold)] == [[0, 1], [1, 2], [2]]


def test_rows_that_never_ran_are_not_there() -> None:
    trace = random_trace(n_requests=5)
    trace.executed_T[10:20] = False
    trace.executed_T[40:80] = False
    rows = sum(block.n_tokens for block, _ in whole(trace).blocks())
    assert rows == 150
    everything = np.concatenate([f.test for f in survey_of(trace).folds(0)])
    assert 1 not in everything


def test_what_was_not_recorded_is_refused_by_name() -> None:
    part = whole(random_trace())
    with pytest.raises(MissingData, match="needs gate_inputs, which this trace has not recorded"):
        part.require("gate_inputs")
    with pytest.raises(MissingData, match="no rows to learn from"):
        Part(random_trace(), np.array([999])).load()


def test_a_folder_is_surveyed_once_until_its_trace_is_another(tmp_path: Path) -> None:
    def written(n_requests: int) -> TraceReader:
        writer = TraceWriter(tmp_path, Provenance("synthetic", "test"))
        trace = random_trace(n_requests=n_requests)
        writer.begin(trace.card)
        writer.append(trace)
        writer.close()
        return TraceReader(tmp_path)

    reader = written(12)
    assert survey_of(reader) is survey_of(TraceReader(tmp_path))
    assert len(survey_of(Stretch(tmp_path, 0, 200)).request_R) == 5  # a part is not the whole
    assert len(survey_of(written(7)).request_R) == 7
