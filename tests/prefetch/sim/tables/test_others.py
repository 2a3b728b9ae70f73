"""What is not replayed is read in blocks, whenever somebody counts it, and gives what one block would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefetch.sim.foresight import keys_of
from prefetch.sim.tables import others
from prefetch.sim.tables.others import Others, misses_of, replayed_rows, uses_of
from prefetch.trace import blocks, parquet
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter
from tests.routing_traces import random_trace


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TraceReader, RoutingTrace]:
    """The same trace in many small row groups, and whole."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 500)
    read_all = blocks.blocks_of
    monkeypatch.setattr(others, "blocks_of", lambda trace: read_all(trace, max_rows=30))
    executed = np.arange(12 * 20) % 7 > 0
    trace = random_trace(n_requests=12, tokens=20, executed_T=executed)
    writer = TraceWriter(tmp_path, Provenance("synthetic", "test"))
    writer.begin(trace.card)
    writer.append(trace)
    writer.close()
    return TraceReader(tmp_path), trace


def some_keys(trace: RoutingTrace, requests: list[int]) -> np.ndarray:
    rows = trace.rows(np.isin(trace.request_T, requests))
    return np.sort(keys_of(rows.request_T, rows.position_T))


def test_rows_are_replayed_or_others_and_others_may_be_fewer(stored):
    reader, trace = stored
    keys = some_keys(trace, [2, 3, 11])
    replayed = replayed_rows(reader, keys)
    expected = trace.rows(np.isin(trace.request_T, [2, 3, 11]))
    np.testing.assert_array_equal(replayed.ids_TLK, expected.ids_TLK)
    np.testing.assert_array_equal(replayed.position_T, expected.position_T)
    rest = Others(reader, keys)
    assert rest.requests().tolist() == [r for r in range(12) if r not in (2, 3, 11)]
    fewer = Others(reader, keys, np.array([0, 2, 7, 8], np.int64))
    assert fewer.requests().tolist() == [0, 7, 8]
    assert not replayed_rows(reader, np.empty(0, np.int64)).n_tokens


@pytest.mark.parametrize("by", ["lru", "optimum"])
def test_counts_do_not_depend_on_blocks(stored, by):
    reader, trace = stored
    rest = Others(reader, some_keys(trace, [2, 3, 11]))
    assert len(list(rest.blocks())) > 3
    whole = trace.rows(~np.isin(trace.request_T, [2, 3, 11]))
    ran = whole.rows(whole.executed_T)
    counted = np.stack(
        [np.bincount(ran.ids_TLK[:, layer].ravel(), minlength=16) for layer in range(4)]
    )
    np.testing.assert_array_equal(uses_of(rest), counted)
    np.testing.assert_array_equal(misses_of(rest, by), misses_of(ran, by))
    assert misses_of(rest, by).any()
