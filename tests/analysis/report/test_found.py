"""Which runs: folders, sweeps, lists, the tracker's offline files, the store's index; each once, none lost silently."""

import json
import os
import shutil

import pytest
from offline_runs import settled
from report_runs import Told, sweep, write_run

from analysis.report import found as found_module
from analysis.report.found import find
from prefetch.errors import ConfigError


def enter(store, folder, at):
    """As `write_index` does."""
    index = store / "runs"
    index.mkdir(parents=True, exist_ok=True)
    path = index / f"{folder.name}.json"
    path.write_text(
        json.dumps({"stage": "evaluate", "folder": str(folder), "failed": False, "used": []})
    )
    os.utime(path, (at, at))


def test_a_sweep_in_the_order_of_its_jobs(tmp_path):
    found = find(str(sweep(tmp_path / "20260102-030405-1", 12)), tmp_path)
    assert [run.folder.name for run in found.runs] == [str(i) for i in range(12)]


def test_the_latest_of_the_index_wherever_they_wrote(tmp_path):
    for i in range(4):
        folder = write_run(tmp_path / f"place{i}" / "run", Told(seed=i)).rename(
            tmp_path / f"run{i}"
        )
        enter(tmp_path / "store", folder, 1000 + i)
    shutil.rmtree(tmp_path / "run3")
    (tmp_path / "store" / "runs" / "broken.json").write_text(json.dumps({"folder": "x" * 5000}))
    found = find("latest:2", tmp_path / "store")
    assert [run.folder.name for run in found.runs] == ["run1", "run2"]
    assert found.gone == 1 and [one.place.name for one in found.unreadable] == ["broken.json"]
    assert find("latest:20", tmp_path / "empty").runs == []


def test_reports_are_not_reported_on_and_do_not_count(tmp_path):
    enter(tmp_path, write_run(tmp_path / "a", Told()), 1)
    enter(tmp_path, write_run(tmp_path / "page", Told(stage="report")), 2)
    assert [run.stage for run in find("latest:1", tmp_path).runs] == ["evaluate"]


def test_a_run_counts_once_however_it_is_found(tmp_path):
    folder = write_run(tmp_path / "runs" / "a", Told())
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "copied" / "a")
    enter(tmp_path / "store", folder, 1)
    asked = [
        str(tmp_path / "runs"),
        str(tmp_path / "link"),
        str(tmp_path / "copied"),
        str(folder),
        "latest:5",
    ]
    found = find(asked, tmp_path / "store")
    assert len(found.runs) == 1 and found.twice == 4


def test_a_repeated_run_is_not_a_copy(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, Told(began=f"2026-01-02T03:04:05+0{name == 'b':d}:00"))
    assert len(find(str(tmp_path), tmp_path).runs) == 2


def test_artifacts_and_the_insides_of_runs_are_no_runs(tmp_path):
    sealed = tmp_path / "artifacts" / "trace" / "key"
    sealed.mkdir(parents=True)
    for name in ("manifest.json", "metrics.json"):
        (sealed / name).write_text("{}")
    write_run(tmp_path / "run", Told())
    assert len(find(str(tmp_path), tmp_path).runs) == 1


def test_of_all_its_stages_stand_for_it_unless_there_are_none(tmp_path):
    whole, early = (write_run(tmp_path / name, Told(stage="all", error=error, state=state)) for name, error, state in
                    (("whole", None, "finished"), ("early", "ConfigError: x", "failed")))  # fmt: skip
    (whole / "collect").mkdir()
    (whole / "collect" / "metrics.json").write_text('{"tokens": 1}')
    enter(tmp_path / "store", whole, 1)
    for asked in (str(tmp_path / "whole"), "latest:3"):
        assert [run.stage for run in find(asked, tmp_path / "store").runs] == ["collect"]
    (left,) = find(str(early), tmp_path).runs
    assert (left.stage, left.state) == ("all", "failed")


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    write_run(tmp_path / "good", Told())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.json").write_bytes(b"\xff\xfe{")
    found = find(str(tmp_path), tmp_path)
    assert len(found.runs) == 1
    (one,) = found.unreadable
    assert one.place == tmp_path / "bad" and "metrics.json cannot be read" in one.why


def test_a_folder_that_nobody_may_read_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "a", Told())
    write_run(tmp_path / "locked", Told())
    real = found_module.is_run

    def guarded(folder):
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(found_module, "is_run", guarded)
    found = find(str(tmp_path), tmp_path)
    assert len(found.runs) == 1 and "Permission denied" in found.unreadable[0].why


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nowhere", "report.runs=nowhere: does not exist"),
        ([], "names no run"),
        (None, "names no run"),
        (5, "report.runs=5: does not exist"),
        ("latest:0", "must be at least 1"),
        ("", "no run in it"),
    ],
)
def test_a_slip_is_an_error_that_says_what_to_give(tmp_path, monkeypatch, asked, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find(asked, tmp_path)


@pytest.fixture
def offline(tmp_path):
    """An offline run as the client writes it."""
    import pandas as pd
    import wandb

    folder = tmp_path / "tracked"
    folder.mkdir()
    config = {
        "seed": 3, "stage": {"name": "train"}, "lineage": ["trace/0123"],
        "predictor": {"_target_": "prefetch.predict.markov.Markov", "horizons": [1]},
    }  # fmt: skip
    with wandb.init(
        mode="offline", dir=str(folder), job_type="train", config=config,
        settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
    ) as run:  # fmt: skip
        run.log({"recall_at_k": 0.5})
        frame = pd.DataFrame(
            {"predictor": ["markov"], "horizon": [1], "recall_at_k": [0.5], "mark": ["cheats"]}
        )
        run.log({"table/predictors": wandb.Table(dataframe=frame)})
    settled(folder)
    return folder


def test_an_offline_run_of_the_tracker_is_a_run(offline, tmp_path):
    (run,) = find(str(offline), tmp_path).runs
    assert (run.stage, run.state, run.source) == ("train", "finished", "W&B offline")
    assert run.metrics == {"recall_at_k": 0.5} and run.choices["predictor"] == "markov"
    assert run.settings["seed"] == 3 and list(run.lineage) == ["trace/0123"]
    assert run.table("predictors")["mark"].tolist() == ["cheats"] and run.overrides is None
    (file,) = offline.rglob("*.wandb")
    assert len(find(str(file), tmp_path).runs) == 1
    file.write_bytes(b"not a log")
    assert find(str(offline), tmp_path).unreadable[0].why.startswith("begins with b'not a l'")


def test_an_offline_run_of_a_run_whose_folder_is_there_says_nothing_new(offline, tmp_path):
    folder = write_run(tmp_path / "runs" / "a", Told(stage="train", metrics={"recall_at_k": 0.5}))
    shutil.copytree(offline / "wandb", folder / "wandb")
    inside = find(str(folder), tmp_path)
    assert len(inside.runs) == 1
    both = find([str(offline), str(folder)], tmp_path)
    assert [run.source for run in both.runs] == ["folder"] and both.twice == 1
