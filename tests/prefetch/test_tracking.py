"""What Weights & Biases is told: offline read back from its file, online as calls of a stand-in for the client."""

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from offline_runs import settled

from prefetch.errors import ConfigError
from prefetch.runs.naming import About
from prefetch.tracking import TrackerLost, UsedArtifact, WandbTracker, at_home


def about(folder, **more):
    told = {
        "stage": "train",
        "words": ["stage=train", "seed=3"],
        "choices": {"predictor": "mlp"},
        "group": "sweep",
    }
    return About(**{**told, "folder": folder, "config": {"seed": 3, "train": {"folds": 1}}, **more})


def used(folder, *, is_made=False, kind="trace", key="k1", upstream=None):
    (place := folder / kind / key).mkdir(parents=True)
    files = {f"{i}.bin": {"bytes": 1000, "sha256": "0"} for i in range(2)}
    for name in ("manifest.json", *files):
        (place / name).write_bytes(b"0" * 1000)
    identity = {
        "kind": kind,
        "recipe": 1,
        "config": {"n": 1},
        "upstream": upstream or {},
        "libraries": {},
    }
    told = {"identity": identity, "files": files, "seconds": 0.5, "made": "now", "git_commit": "c"}
    return UsedArtifact(kind, key, place, told, is_made)


def picture(path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(path)
    return path


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run of everything that can be told, read back; nothing asks for a name of the network, or writes at home."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("the network was asked"))
        patch.setenv("HOME", str(folder / "home"))
        patch.delenv("WANDB_DATA_DIR", raising=False)
        tracker = WandbTracker(
            tags=["mine"], tag_choices={"train": ["predictor"]}, maxima=["fit/recall*"]
        )
        tracker.start(about(folder))
        tracker.log({"recall": 0.5, "tokens": 7})
        epochs = {"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "recall": [0.1, 0.3, float("nan")]}
        tracker.curve("fit", pd.DataFrame(epochs), "epoch", ())
        lines = {
            "epoch": [2, 1, 1],
            "fold": [0, 0, 1],
            "share": [0.5, 0.5, 2],
            "loss": [3.0, 4.0, 5.0],
        }
        tracker.curve("apart", pd.DataFrame(lines), "epoch", ("fold", "share"))
        odd = {
            "n": np.int32([1, 2]),
            "mixed": ["a", 2],
            "gap": [0.5, None],
            "yes": [True, False],
            "list": [[1], [2, 3]],
        }
        tracker.table("rows", pd.DataFrame(odd))
        tracker.table("nothing", pd.DataFrame({"n": []}))
        tracker.figure("drawn", picture(folder / "drawn.png"))
        made = used(folder, is_made=True, kind="predictor", key="k2", upstream={"trace": "k1"})
        tracker.lineage([made, used(folder)])
        tracker.finish()
    return settled(folder)


def test_a_run_is_found_by_what_it_is(offline):
    assert (offline.project, offline.group, offline.job_type) == (
        "expert-prefetch",
        "sweep",
        "train",
    )
    assert (offline.name, offline.tags) == ("train seed=3", ["mine", "predictor=mlp"])
    assert (offline.state, offline.exit_code, offline.summary["outcome"]) == (
        "finished",
        0,
        "finished",
    )
    assert offline.config["seed"] == 3 and offline.config["train"] == {"folds": 1}
    assert offline.config["run"]["words"] == ["stage=train", "seed=3"]
    assert offline.config["run"]["version"] and offline.config["run"]["python"]


def test_numbers_are_its_summary_and_curves_its_history(offline):
    assert offline.summary["recall"] == 0.5 and offline.summary["tokens"] == 7
    rows = [row for row in offline.history if "fit/epoch" in row]
    assert [(row["fit/epoch"], row["fit/loss"]) for row in rows] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert "fit/recall" not in rows[2]  # what is not known is not told
    assert offline.step_metrics["fit/loss"] == offline.step_metrics["fit/recall"] == "fit/epoch"
    assert "fit/loss" not in offline.summary and offline.summary["fit/recall"] == {"max": 0.3}


def test_a_curve_has_a_column_for_every_value_of_what_tells_its_lines_apart(offline):
    rows = [{n: v for n, v in row.items() if n.startswith("apart/")} for row in offline.history]
    assert [row for row in rows if row] == [
        {"apart/epoch": 1, "apart/loss_fold0_share0_5": 4.0, "apart/loss_fold1_share2": 5.0},
        {"apart/epoch": 2, "apart/loss_fold0_share0_5": 3.0},
    ]
    assert offline.step_metrics["apart/loss_fold1_share2"] == "apart/epoch"


def test_tables_and_pictures_come_through_whatever_their_types(offline):
    columns, rows = offline.table("table/rows")
    assert columns == ["n", "mixed", "gap", "yes", "list"]
    assert offline.table("table/nothing") == (["n"], [])
    assert rows == [[1, "a", 0.5, True, "[1]"], [2, 2, None, False, "[2, 3]"]]
    assert offline.pictures()["figure/drawn"].read_bytes().startswith(b"\x89PNG")


def test_lineage_is_in_the_config_and_in_the_graph(offline):
    assert offline.config["lineage"] == ["predictor/k2", "trace/k1"]
    assert offline.config["uses"] == {"predictor": "k2", "trace": "k1"}
    assert offline.config["upstream"] == ["predictor/k2 <- trace k1"]
    graph = [a for a in offline.artifacts if a.type != "run_table"]
    assert [(a.type, a.name, a.is_input) for a in graph] == [
        ("trace", "trace-k1", True),
        ("predictor", "predictor-k2", False),
    ]
    assert graph[1].metadata["upstream"] == {"trace": "k1"} and graph[1].metadata["bytes"] == 2000


def test_artifacts_are_declared_where_they_lie_and_nothing_of_them_is_copied(offline):
    folder = offline.path.parents[2]
    for artifact in offline.artifacts:
        if artifact.type == "run_table":
            continue
        assert (
            set(artifact.references) == {"manifest.json", "0.bin", "1.bin"} and not artifact.copied
        )
        assert all(
            place.startswith(folder.resolve().as_uri()) for place in artifact.references.values()
        )
    copies = [
        path
        for path in (folder / "wandb").rglob("*")
        if path.is_file() and b"0" * 1000 in path.read_bytes()
    ]
    assert copies == []
    assert not list((folder / "home").rglob("staging/*"))  # tables are staged beside the run
    assert len(list((folder / "wandb" / "artifacts" / "staging").iterdir())) > 0


def test_a_failed_stage_is_a_failed_run_with_its_message(tmp_path):
    tracker = WandbTracker()
    tracker.start(about(tmp_path))
    tracker.finish("FormatError: bad", 3)
    run = settled(tmp_path)
    assert (run.state, run.exit_code) == ("failed", 3)
    assert (run.summary["outcome"], run.summary["error"]) == ("failed", "FormatError: bad")


def test_a_wrong_mode_is_refused():
    with pytest.raises(ConfigError, match="mode: expected one of"):
        WandbTracker(mode="on")


def test_online_without_a_key_is_refused_before_the_client_waits(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no key found"):
        WandbTracker(mode="online").start(about(tmp_path))


def test_a_setting_that_the_client_refuses_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="W&B refused to start"):
        WandbTracker(project="a/b").start(about(tmp_path))


class StandIn:
    """The client as far as the tracker calls it: it remembers the calls, in their order."""

    def __init__(self, *failures: Exception) -> None:
        self.calls, self.failures = [], list(failures)
        self.Settings = type(
            "Settings", (), {"model_fields": {"console": 0}, "__init__": self._settings}
        )
        self.Table = lambda **given: ("table", given)
        self.config, self.summary = self, {}

    def _settings(self, *_, **given):
        assert given == {
            "console": "off"
        }  # a client that does not know the others is not given them

    def init(self, **given):
        if self.failures:
            raise self.failures.pop(0)
        self.calls.append(("init", given))
        return self

    def Artifact(self, name, type, metadata):
        return SimpleNamespace(name=name, references=[], add_reference=lambda uri, **_: None)

    def __getattr__(self, verb):
        return lambda *details, **named: self.calls.append((verb, *details))


@pytest.fixture
def online(monkeypatch):
    def begin(*failures):
        stand_in = StandIn(*failures)
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(WandbTracker, "is_unreachable", False)
        return stand_in, WandbTracker(mode="online", entity="us")

    return begin


def test_online_a_run_uses_what_it_found_and_logs_what_it_made(online, tmp_path):
    client, tracker = online()
    tracker.start(about(tmp_path))
    tracker.lineage([used(tmp_path, is_made=True, kind="predictor", key="k2"), used(tmp_path)])
    tracker.finish()
    (_, begun), (told, config), *rest = client.calls
    assert (begun["mode"], begun["entity"], begun["job_type"], begun["group"]) == (
        "online",
        "us",
        "train",
        "sweep",
    )
    assert told == "update" and config["lineage"] == ["predictor/k2", "trace/k1"]
    assert [(verb, *(one.name for one in artifacts)) for verb, *artifacts in rest] == [
        ("use_artifact", "trace-k1"),
        ("log_artifact", "predictor-k2"),
        ("finish",),
    ]


def test_a_server_that_cannot_be_reached_makes_an_offline_run_and_loses_nothing(
    online, tmp_path, caplog
):
    client, tracker = online(TimeoutError("no answer in 30 s"))
    tracker.start(about(tmp_path))
    assert client.calls[0][1]["mode"] == "offline" and "kept offline" in caplog.text
    tracker.lineage([used(tmp_path)])
    assert [verb for verb, *_ in client.calls] == ["init", "update", "_log_artifact"]
    client.calls.clear()
    WandbTracker(mode="online").start(
        about(tmp_path)
    )  # the next of this process does not wait again
    assert [one["mode"] for _, one in client.calls] == ["offline"]


def test_a_client_that_is_broken_is_no_error_of_the_user(online, tmp_path):
    _, tracker = online(TimeoutError("no answer"), OSError("no space"))
    with pytest.raises(TrackerLost, match="no space"):
        tracker.start(about(tmp_path))
    tracker.finish("ValueError: x", 1)  # of a run that never began


def test_a_home_that_nobody_told_is_found_and_one_that_is_told_stays(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    at_home()
    assert os.environ["HOME"] == "/elsewhere"
    monkeypatch.delenv("HOME")
    at_home()
    assert os.environ["HOME"] == str(Path.home()) != "/elsewhere"
