"""A trace goes to disk and comes back equal, in blocks of whole requests, and the same input gives the same bytes."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch.errors import FormatError
from prefetch.trace import parquet
from prefetch.trace.card import plain_card
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter

CARD = plain_card("toy", n_experts=16, top_k=2, layer_numbers=(0, 1, 2))


def random_trace(lengths: list[int], seed: int = 0, card=CARD) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    shape = (n, card.n_layers)
    ids = rng.random((*shape, card.n_experts)).argsort(-1)[..., : card.top_k]
    return trace_of(
        card,
        ids,
        request_T=np.repeat(np.arange(len(lengths)), lengths),
        phase_T=rng.integers(0, 2, n),
        executed_T=rng.random(n) < 0.9,
        token_T=rng.integers(-1, 50, n),
        domain="domain a",
        weights_TLK=rng.random((*shape, card.top_k)),
        scores_TLM=rng.random((*shape, card.n_experts)).astype(np.float16),
        gate_inputs_TLD=rng.random((*shape, 5)).astype(np.float16),
    )


def write(folder: Path, *blocks: RoutingTrace, card=CARD) -> TraceReader:
    folder.mkdir(parents=True, exist_ok=True)
    writer = TraceWriter(folder, Provenance("real", "test"))
    writer.begin(card)
    for block in blocks:
        writer.append(block)
    writer.close()
    return TraceReader(folder)


def assert_equal(left: RoutingTrace, right: RoutingTrace) -> None:
    for field in dataclasses.fields(RoutingTrace):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            assert a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


ALL = ("weights", "scores", "gate_inputs")


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    group_bytes=st.sampled_from([100, 1000, 1 << 24]),
    shard_bytes=st.sampled_from([500, 5000, 1 << 28]),
    max_rows=st.integers(1, 40),
)
def test_what_is_written_is_read(lengths, group_bytes, shard_bytes, max_rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "SHARD_BYTES", shard_bytes)
        trace = random_trace(lengths)
        reader = write(tmp_path_factory.mktemp("trace"), trace)
        assert (reader.n_tokens, reader.n_requests) == (sum(lengths), len(lengths))
        assert_equal(reader.load(*ALL), trace)
        blocks = list(reader.batches(*ALL, max_rows=max_rows))
        assert_equal(parquet.concat(blocks), trace)
        requests = [set(block.request_T.tolist()) for block in blocks]
        assert sum(map(len, requests)) == len(lengths), "a block split a request"
        for stem, rows in [(f"tokens-{n:05d}.parquet", rows) for n, rows in reader.shards]:
            assert (reader.folder / stem).exists() and rows > 0


def test_no_shard_splits_a_request(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 2000)
    monkeypatch.setattr(parquet, "SHARD_BYTES", 1000)
    reader = write(tmp_path, random_trace([7, 30, 2, 9, 20]))
    assert len(reader.shards) > 1
    stops = np.cumsum([rows for _, rows in reader.shards])[:-1]
    request_T = reader.load().request_T
    assert all(request_T[stop] != request_T[stop - 1] for stop in stops)


def test_optional_columns_are_read_only_when_named(tmp_path):
    reader = write(tmp_path, random_trace([5]))
    assert reader.load().weights_TLK is None
    assert reader.load("weights").weights_TLK is not None
    with pytest.raises(FormatError, match=r"has not recorded \['pre_attention'\]; it has"):
        reader.load("pre_attention")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, random_trace([40, 50]))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    cuts=st.sets(st.integers(1, 100), max_size=6),
    group_bytes=st.sampled_from([300, 3000]),
)
def test_the_same_rows_give_the_same_bytes_whatever_the_blocks(
    lengths, cuts, group_bytes, tmp_path_factory
):
    """Blocks are cut anywhere, also within a request; domains are first seen in any of them."""
    folder, trace = tmp_path_factory.mktemp("law"), random_trace(lengths)
    names = tuple(f"domain {number}" for number in range(3))
    trace = dataclasses.replace(trace, domains=names, domain_T=2 - trace.request_T % 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "SHARD_BYTES", 3 * group_bytes)
        edges = [0, *sorted(cut for cut in cuts if cut < sum(lengths)), sum(lengths)]
        blocks = [trace.rows(slice(a, b)) for a, b in itertools.pairwise(edges)]
        write(folder / "a", trace)
        write(folder / "b", *blocks)
    for path in (folder / "a").iterdir():
        assert path.read_bytes() == (folder / "b" / path.name).read_bytes(), path.name


def test_domains_of_many_files_are_kept_apart(tmp_path):
    a = dataclasses.replace(random_trace([3, 3]), domains=("x",))
    b = random_trace([3, 3], 1)
    b = dataclasses.replace(b, domains=("y",), request_T=b.request_T + np.int32(2))
    trace = write(tmp_path, a, b).load()
    assert [trace.domains[code] for code in trace.domain_T] == ["x"] * 6 + ["y"] * 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "trace.json").unlink(), "trace.json: not found"),
        (lambda f: (f / "trace.json").write_text("{"), "expected JSON"),
        (
            lambda f: (f / "trace.json").write_text("[]"),
            "expected schema prefetch.trace/1, found list",
        ),
        (lambda f: (f / "trace.json").write_text(json.dumps({"schema": "x/9"})), "found x/9"),
        (
            lambda f: (f / "tokens-00000.parquet").write_bytes(b"PAR1junk"),
            "expected a Parquet shard",
        ),
        (lambda f: (f / "tokens-00000.parquet").unlink(), "expected a Parquet shard"),
    ],
)
def test_a_damaged_trace_is_named(tmp_path, damage, message):
    write(tmp_path, random_trace([5]))
    damage(tmp_path)
    with pytest.raises(FormatError, match=message):
        TraceReader(tmp_path).load()


def test_a_shard_with_other_rows_is_refused(tmp_path):
    write(tmp_path / "a", random_trace([5]))
    write(tmp_path / "b", random_trace([6]))
    (tmp_path / "b" / "tokens-00000.parquet").replace(tmp_path / "a" / "tokens-00000.parquet")
    with pytest.raises(FormatError, match="promises 5 rows, found 6"):
        TraceReader(tmp_path / "a").load()
