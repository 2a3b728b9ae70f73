"""The reader of profiles: the same events in pieces of any size, and one clear error for whatever is damaged."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiler_traces import launched, operation, span, written

from analysis.device import chrome_trace
from analysis.device.chrome_trace import ChromeTrace
from analysis.device.names import load_names
from analysis.device.profile_trace import read_profile
from prefetch.errors import FormatError

NAMES = load_names()
EVENTS = [operation("aten::mm", 1, 2), *launched(1, 'gemm [x] {y} "ü\\', 1.5, 5, 3)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_pieces_of_any_size_give_the_same_events(tmp_path, monkeypatch, piece, name):
    path = written(tmp_path, EVENTS, name, schemaVersion=1, deviceProperties=[{"id": 0}])
    monkeypatch.setattr(chrome_trace, "PIECE_BYTES", piece)
    trace = ChromeTrace(path)
    assert list(trace.events()) == EVENTS
    assert trace.meta == {"schemaVersion": 1, "deviceProperties": [{"id": 0}]}


def test_a_bare_list_and_metadata_behind_the_events_are_read(tmp_path):
    bare, behind = tmp_path / "bare.json", tmp_path / "behind.json"
    bare.write_text(json.dumps(EVENTS))
    behind.write_text('{"traceEvents": ' + json.dumps(EVENTS, indent=2) + ', "traceName": "x"}')
    assert list(ChromeTrace(bare).events()) == EVENTS
    trace = ChromeTrace(behind)
    assert list(trace.events()) == EVENTS and trace.meta == {"traceName": "x"}


@given(st.data())
def test_a_profile_cut_anywhere_is_an_error_that_says_so(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("cut"), EVENTS, schemaVersion=1)
    text = path.read_text()
    path.write_text(text[: data.draw(st.integers(1, len(text) - 1))])
    with pytest.raises(FormatError, match=r"ends early|is not JSON|expected"):
        list(ChromeTrace(path).events())


def test_a_cut_off_gzip_and_one_that_is_none_are_errors(tmp_path):
    path = tmp_path / "t.json.gz"
    whole = gzip.compress(json.dumps({"traceEvents": EVENTS * 200}).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged or cut off"):
        list(ChromeTrace(path).events())
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match="not gzipped"):
        list(ChromeTrace(path).events())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends early"),
        ("hello", "begins with"),
        ("PK\x03\x04 and the rest", "is a zip archive: unpack it"),
        ("{}", "expected a list 'traceEvents'"),
        ('{"traceEvents": [1]}', "expected an event"),
        ('{"traceEvents": [{"a": nonsense, "b": "' + "x" * 100 + '"}]}', "is not JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_profile_is_named(tmp_path, text, says):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=says) as error:
        list(ChromeTrace(path).events())
    assert str(path) in str(error.value)


def test_negative_and_missing_times_are_errors_that_name_the_event(tmp_path):
    good = launched(1, "gemm", 1, 5, 3)
    for bad in ({"dur": -3.0}, {"ts": "soon"}, {"dur": float("nan")}):
        path = written(tmp_path, [*good, {**good[1], **bad}])
        with pytest.raises(FormatError, match=r"event 3 \('gemm'\): expected numbers ts and dur"):
            read_profile(path, NAMES)


def test_a_gpu_profile_without_kernels_says_what_to_record(tmp_path):
    launch = span("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1)
    path = written(tmp_path, [operation("aten::mm", 1, 2), launch])
    with pytest.raises(
        FormatError, match=r"expected GPU kernels, found none.*ProfilerActivity.CUDA"
    ):
        read_profile(path, NAMES)
    path = written(
        tmp_path, [operation("aten::mm", 1, 2)], deviceProperties=[{"name": "NVIDIA B200"}]
    )
    with pytest.raises(FormatError, match="though a GPU was there"):
        read_profile(path, NAMES)
    path = written(tmp_path, [{"ph": "M", "name": "process_name"}])
    with pytest.raises(FormatError, match="found neither"):
        read_profile(path, NAMES)


def test_memory_grows_by_columns_and_not_by_text(tmp_path):
    """Python frames that no rule names are the bulk of a profile with stacks: they leave nothing behind."""
    frame = span(
        "python_function",
        "<built-in method append of list object at 0x7f17c92d5f40>",
        1,
        1,
        pad="x" * 400,
    )
    path = written(tmp_path, [*launched(1, "gemm", 1, 5, 3), *[frame] * 20_000])
    tracemalloc.start()
    read_profile(path, NAMES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000
    assert (
        peak < path.stat().st_size / 2
    )  # a few pieces of text; what reads it whole takes several times its size


def test_what_stands_behind_a_profile_is_an_error_and_a_mark_before_it_is_none(tmp_path):
    path = written(tmp_path, EVENTS)
    path.write_text(path.read_text() + "\n")
    assert list(ChromeTrace(path).events()) == EVENTS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(ChromeTrace(path).events()) == EVENTS
    path.write_text(path.read_text() * 2)
    with pytest.raises(FormatError, match="expected the end of the file"):
        list(ChromeTrace(path).events())


def test_a_gzip_with_a_wrong_checksum_is_damaged(tmp_path):
    path = tmp_path / "t.json.gz"
    whole = gzip.compress(json.dumps({"traceEvents": EVENTS}).encode())
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    with pytest.raises(FormatError, match="damaged or cut off"):
        list(ChromeTrace(path).events())


@pytest.mark.parametrize(
    "bad", [{"dur": 1e300}, {"dur": 10**30}, {"dur": None}, {"ts": float("inf")}, {"args": "x"}, {"args": [1]}]
)  # fmt: skip
def test_an_event_that_is_none_is_named(tmp_path, bad):
    good = launched(1, "gemm", 1, 5, 3)
    path = written(tmp_path, [*good, {**good[1], **bad}])
    with pytest.raises(FormatError, match=r"event 3 \('gemm'\): expected"):
        read_profile(path, NAMES)


@pytest.mark.parametrize("key", ["ts", "dur"])
def test_a_time_that_lacks_is_not_taken_for_nought(tmp_path, key):
    good = launched(1, "gemm", 1, 5, 3)
    bad = {name: value for name, value in good[1].items() if name != key}
    with pytest.raises(FormatError, match=f"event 3.*{key}=None"):
        read_profile(written(tmp_path, [*good, bad]), NAMES)


def test_moments_since_1970_keep_their_nanoseconds(tmp_path):
    events = launched(1, "gemm", 1, 1_763_800_000_000_001, 3) + launched(
        2, "b", 2, 1_763_800_000_000_002, 3
    )
    start = read_profile(written(tmp_path, events), NAMES).activities.start
    assert start.tolist() == [1_763_800_000_000_001_000, 1_763_800_000_000_002_000]


def test_ranks_whose_numbers_clash_are_refused(tmp_path):
    rank = launched(1, "gemm", 1, 5, 3)
    other = [{**event, "pid": event["pid"] + 100} for event in rank]
    with pytest.raises(
        FormatError, match=r"expected one process, found 2.*each rank's own profile"
    ):
        read_profile(written(tmp_path, [*rank, *other]), NAMES)


def test_sizes_that_no_tensor_has_cost_nothing(tmp_path):
    huge = operation("aten::mm", 1, 2, [[2**50, 2**50], [2**50, 4]])
    negative = operation("aten::mm", 4, 2, [[-5, 4], [4, 4]])
    found = read_profile(written(tmp_path, [huge, negative]), NAMES)
    assert found.spans.flops.tolist() == [0, 0]
