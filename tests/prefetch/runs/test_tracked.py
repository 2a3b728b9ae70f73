"""An offline run read back: equal to what wandb's own classes read, as far as it was written, never a crash."""

import json
import struct
import zlib

import pandas as pd
import pytest
from offline_runs import settled

from prefetch.errors import FormatError
from prefetch.runs.tracked import MAGIC, find_offline_runs, read_offline_run


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    import wandb

    folder = tmp_path_factory.mktemp("real")
    quiet = wandb.Settings(console="off", x_disable_stats=True, silent=True)
    run = wandb.init(
        project="p", group="g", job_type="train", name="n", tags=["a", "b"], mode="offline",
        dir=str(folder), config={"seed": 3, "deep": {"er": [1, None]}}, reinit="create_new", settings=quiet,
    )  # fmt: skip
    run.define_metric("fit/*", step_metric="fit/epoch")
    for epoch in range(3):
        run.log({"fit/epoch": epoch, "fit/loss": 1.0 / (epoch + 1), "word": "x" * 40_000})
    table = wandb.Table(dataframe=pd.DataFrame({"x": [1, 2], "y": ["a", "b"]}))
    run.log({"table/rows": table, "neg": -7})
    run.summary["error"] = "FormatError: bad"
    run.finish(exit_code=3)
    return settled(folder)


def test_what_the_client_wrote_reads_back(real):
    assert (real.project, real.group, real.job_type, real.name) == ("p", "g", "train", "n")
    assert (real.tags, real.state, real.exit_code, real.cut) == (["a", "b"], "failed", 3, None)
    assert real.config == {"seed": 3, "deep": {"er": [1, None]}}
    assert [row["fit/loss"] for row in real.history[:3]] == [1.0, 0.5, 1 / 3]
    assert real.step_metrics["fit/*"] == "fit/epoch"
    assert real.summary["error"] == "FormatError: bad" and real.summary["neg"] == -7
    assert real.tables() == ["table/rows"]
    assert real.table("table/rows") == (["x", "y"], [[1, "a"], [2, "b"]])
    assert real.client.count(".") == 2 and real.started_s > 1_700_000_000


def test_the_same_as_through_the_protobuf_classes_of_the_client(real):
    from wandb.proto import wandb_internal_pb2 as pb

    said = [pb.Record.FromString(data) for data in plain_records(real.path.read_bytes())]
    rows = [record.history for record in said if record.HasField("history")]
    assert len(rows) == len(real.history)
    for row, ours in zip(rows, real.history, strict=True):
        flat = {
            item.nested_key[0] if len(item.nested_key) == 1 else item.key: item.value_json
            for item in row.item
        }
        assert {n: json.loads(v) for n, v in flat.items() if n} == {n: ours[n] for n in flat if n}
    begun = next(record.run for record in said if record.HasField("run"))
    assert (begun.run_id, begun.start_time.seconds) == (real.run_id, real.started_s)
    assert [r.exit.exit_code for r in said if r.HasField("exit")] == [real.exit_code]
    declared = [r.artifact.name for r in said if r.HasField("artifact")]
    assert declared == [artifact.name for artifact in real.artifacts] and len(declared) == 1


def plain_records(data):
    """The log's records, by the definition of LevelDB's format."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts = (parts if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts


def test_cut_anywhere_it_is_read_as_far_as_it_goes(real, tmp_path):
    data = real.path.read_bytes()
    cut_at = sorted(
        {*range(0, 400), *range(400, len(data), 997), *range(len(data) - 200, len(data))}
    )
    rows_before = 0
    for n_bytes in cut_at:
        path = tmp_path / "run-x.wandb"
        path.write_bytes(data[:n_bytes])
        run = read_offline_run(path)
        assert rows_before <= len(run.history) <= len(real.history)
        assert run.history == real.history[: len(run.history)]
        assert run.state == "failed" or (run.state == "unfinished" and run.cut is not None)
        rows_before = len(run.history)
    assert rows_before == len(real.history)


def test_of_a_killed_run_the_last_numbers_stand_in_for_its_summary(tmp_path):
    path = written(tmp_path, history(loss=2.0), history(loss=1.0, other=5))
    run = read_offline_run(path)
    assert run.summary == {"loss": 1.0, "other": 5} and run.state == "unfinished"


def test_a_damaged_byte_ends_the_reading_and_is_told(real, tmp_path):
    data = bytearray(real.path.read_bytes())
    for at in range(7, len(data), 1499):
        damaged = data.copy()
        damaged[at] ^= 0xFF
        (path := tmp_path / "run-x.wandb").write_bytes(damaged)
        run = read_offline_run(path)
        assert run.cut is not None and ("checksum" in run.cut or "not complete" in run.cut)
        assert run.history == real.history[: len(run.history)] and run.state == "unfinished"


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04 a zip", b":W&B\xe1\xbe\x01 of a later version", b"\0" * 100]
)
def test_a_file_that_is_no_offline_run_is_an_error_by_name(tmp_path, data):
    (path := tmp_path / "run-x.wandb").write_bytes(data)
    with pytest.raises(FormatError, match=r"run-x\.wandb.*begins with"):
        read_offline_run(path)


@pytest.mark.parametrize("record", [b"\x0b", b"\x12\xff", b"\x80", b"\x12\x02\x0a\x05"])
def test_a_record_that_no_version_writes_is_an_error_by_name(tmp_path, record):
    with pytest.raises(FormatError, match=r"run-x\.wandb"):
        read_offline_run(written(tmp_path, record))


def test_a_file_that_is_not_there_is_an_error_by_name(tmp_path):
    with pytest.raises(FormatError, match="absent"):
        read_offline_run(tmp_path / "run-absent.wandb")
    assert find_offline_runs(tmp_path) == []


def test_what_later_versions_add_is_passed_over(tmp_path):
    later = field(999, b"whatever") + field(998, 7)
    run = read_offline_run(
        written(tmp_path, later, history(later, loss=1.0), later + field(18, field(1, 0) + later))
    )
    assert [row["loss"] for row in run.history] == [1.0] and run.state == "finished"


def test_values_that_newer_versions_write_as_such(tmp_path):
    items = {
        "json": field(8, b"[1]"),
        "text": field(7, b"word"),
        "whole": field(5, (7 << 1) - 1),  # zigzag of -7
        "yes": field(4, 1),
        "number": varint(6 << 3 | 1) + struct.pack("<d", 0.25),
        "nothing": field(3, 0),
    }
    parts = [field(1, field(2, name.encode()) + value) for name, value in items.items()]
    (row,) = read_offline_run(written(tmp_path, field(2, b"".join(parts)))).history
    assert row == {
        "json": [1],
        "text": "word",
        "whole": -7,
        "yes": True,
        "number": 0.25,
        "nothing": None,
    }


def test_a_killed_client_may_leave_its_exit_below_zero(tmp_path):
    run = read_offline_run(written(tmp_path, field(18, field(1, (1 << 64) - 1))))
    assert run.exit_code == -1 and run.state == "failed"


def test_a_table_outside_of_its_run_is_not_followed(tmp_path):
    told = json.dumps({"_type": "table-file", "path": "../../secret.json"}).encode()
    (tmp_path / "secret.json").write_text("{}")
    path = written(tmp_path, field(3, field(1, field(1, b"table/x") + field(16, told))))
    with pytest.raises(FormatError, match="outside its run"):
        read_offline_run(path).table("table/x")
    with pytest.raises(FormatError, match="has no table 'y'"):
        read_offline_run(path).table("y")


def history(more=b"", **values):
    items = [
        field(1, field(2, name.encode()) + field(16, json.dumps(value).encode()))
        for name, value in values.items()
    ]
    return field(2, b"".join(items) + more)


def written(folder, *records):
    """An offline run of these records, each in one piece."""
    data = MAGIC
    for record in records:
        head = struct.pack("<IHB", zlib.crc32(b"\x01" + record), len(record), 1)
        data += head + record
    (path := folder / "run-x.wandb").write_bytes(data)
    return path


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])
