"""Counts survive the disk, and impossible ones are refused with their place."""

import numpy as np
import pytest

from prefetch.errors import FormatError
from prefetch.trace.card import plain_card
from prefetch.trace.counts import ExpertCounts, load_counts
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance

CARD = plain_card("toy", n_experts=3, top_k=1, layer_numbers=(1, 3))
REAL = Provenance("real", "test")


def test_counts_survive_the_disk(tmp_path):
    counts = ExpertCounts(CARD, np.array([[1, 2, 3], [0, 0, 9]]), REAL)
    counts.save(tmp_path)
    loaded = load_counts(tmp_path)
    np.testing.assert_array_equal(loaded.counts_LE, counts.counts_LE)
    assert (loaded.card, loaded.provenance) == (CARD, REAL)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 2, 3]], r"expected \[2, 3\]"),
        ([[1, 2, 3], [1, -2, 3]], "layer 3, expert 1: a count cannot be negative, got -2"),
        ([[0, 0, 0], [0, 0, 0]], "every count is zero"),
    ],
)
def test_impossible_counts_are_refused(counts, message):
    with pytest.raises(FormatError, match=message):
        ExpertCounts(CARD, np.array(counts, np.int64), REAL)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "counts.json").write_text('{"schema": "prefetch.trace/1"}')
    with pytest.raises(
        FormatError, match=r"expected schema prefetch\.counts/1, found prefetch\.trace/1"
    ):
        load_counts(tmp_path)


def test_counts_where_a_trace_is_asked_for_are_named(tmp_path):
    ExpertCounts(CARD, np.array([[1, 2, 3], [0, 0, 9]]), REAL).save(tmp_path)
    with pytest.raises(FormatError, match="holds counts of experts, not a trace"):
        TraceReader(tmp_path)
