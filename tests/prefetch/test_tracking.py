"""Files first, tracker second; an offline W&B run holds what the run's folder holds, and needs no network."""

import json
import socket
import time
from pathlib import Path

import pandas as pd
import pytest

from prefetch.errors import ConfigError
from prefetch.tracking import NoTracker, Outputs, WandbTracker, write_json


class Recorder(NoTracker):
    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def log(self, metrics, step=None) -> None:
        assert json.loads((self.folder / "metrics.json").read_text()) == metrics
        self.seen.append("metrics")

    def table(self, name, frame) -> None:
        assert (self.folder / f"{name}.csv").exists() and (self.folder / f"{name}.parquet").exists()
        self.seen.append(name)

    def lineage(self, keys) -> None:
        assert json.loads((self.folder / "lineage.json").read_text()) == keys
        self.seen.append("lineage")


def test_everything_is_on_disk_before_the_tracker_hears_of_it(tmp_path):
    tracker = Recorder(tmp_path)
    outputs = Outputs(tmp_path, tracker)
    outputs.metrics({"a": 1, "b": 0.5})
    outputs.table("t", pd.DataFrame({"x": [1, 2]}))
    outputs.lineage({"trace/abc": {}})
    assert tracker.seen == ["metrics", "t", "lineage"]
    assert pd.read_parquet(tmp_path / "t.parquet")["x"].tolist() == [1, 2]


@pytest.mark.parametrize("odd", ["x", None, float("nan"), float("inf"), True, [1]])
def test_metrics_are_finite_numbers(tmp_path, odd):
    with pytest.raises(AssertionError, match="metrics are finite numbers"):
        Outputs(tmp_path, NoTracker()).metrics({"a": odd})
    assert not (tmp_path / "metrics.json").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_wrong_mode_is_refused():
    with pytest.raises(ConfigError, match="mode: expected one of"):
        WandbTracker(mode="on")


def test_online_without_a_key_is_refused_before_the_client_waits(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no key found"):
        WandbTracker(mode="online").start(stage="x", folder=tmp_path, config={}, group=None)


def read_offline(folder: Path):
    """Config, history, run and exit code of the one offline run below a folder.

    The client's service is a process of its own, so the end of the file may come after `finish`.
    """
    for _ in range(200):
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        config, history, run, exit_code = parse_offline(path.read_bytes())
        if exit_code is not None:
            return config, history, run, exit_code
        time.sleep(0.05)
    raise AssertionError(f"{path}: no exit record after 10 s")


def parse_offline(data: bytes):
    """A leveldb log of protobuf records: blocks of 32 KiB, records in parts with a 7-byte header."""
    from wandb.proto import wandb_internal_pb2 as pb

    config, history, run, exit_code = {}, {}, None, None
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + 7 : at + 7 + size]
        if kind == 0 or len(part) < size:
            break  # not written yet
        parts = part if kind in (1, 2) else parts + part
        at += 7 + size
        if kind not in (1, 4):
            continue
        record = pb.Record()
        record.ParseFromString(parts)
        run = record.run if record.HasField("run") else run
        for update in (record.run.config.update, record.config.update):
            config |= {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in update
            }
        for item in record.history.item:
            history[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        exit_code = record.exit.exit_code if record.HasField("exit") else exit_code
    return config, history, run, exit_code


def save_picture(path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(path)
    return path


def test_an_offline_run_reads_back_equal_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: pytest.fail("the network was asked for a name")
    )
    tracker = WandbTracker(tags=["t"])
    tracker.start(stage="collect", folder=tmp_path, config={"seed": 3}, group="sweep")
    outputs = Outputs(tmp_path, tracker)
    outputs.metrics({"tokens": 7})
    outputs.table("rows", pd.DataFrame({"x": [1]}))
    outputs.figure(save_picture(tmp_path / "figure.png"))
    outputs.lineage({"trace/abc": {}})
    tracker.finish()
    config, history, run, exit_code = read_offline(tmp_path)
    assert config["seed"] == 3 and config["lineage"] == ["trace/abc"]
    assert history["tokens"] == 7 and history["table/rows._type"] == "table-file"
    assert history["figure/figure._type"] == "image-file"
    assert (run.run_group, run.job_type, list(run.tags), exit_code) == (
        "sweep",
        "collect",
        ["t"],
        0,
    )


def test_a_failed_stage_is_a_failed_run_with_its_message(tmp_path):
    tracker = WandbTracker()
    tracker.start(stage="collect", folder=tmp_path, config={}, group=None)
    tracker.finish("FormatError: bad")
    assert read_offline(tmp_path)[3] == 1


class Dying(NoTracker):
    def log(self, metrics, step=None) -> None:
        raise ConnectionResetError("the tracker's service died")

    table = figure = lineage = finish = log


def test_a_tracker_that_dies_takes_nothing_with_it(tmp_path, caplog):
    outputs = Outputs(tmp_path, Dying())
    outputs.metrics({"a": 1})
    outputs.table("t", pd.DataFrame({"x": [1]}))
    outputs.lineage({})
    outputs.finish(None)
    assert len(caplog.records) == 1 and "the tracker failed" in caplog.text
    assert {"metrics.json", "t.csv", "lineage.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_setting_that_the_client_refuses_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="W&B refused to start"):
        WandbTracker(project="a/b").start(stage="x", folder=tmp_path, config={}, group=None)
