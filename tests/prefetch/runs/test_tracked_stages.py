"""Real runs with the default tracker: what they tell it, how they end, what a kill leaves, what stays secret."""

import json
import os
import re
import signal
import subprocess
import time

import pandas as pd
import pytest
from entry import ROOT, begin, command, environment
from offline_runs import settled

from prefetch.runs.tracked import find_offline_runs, read_offline_run

SMALL = (
    "source=synthetic", "source.n_requests=6", "source.n_layers=6", "source.n_experts=8", "source.top_k=2",
    "source.prompt_tokens=8", "source.new_tokens=8", "train.folds=1", "train.horizons=[1,4]",
    "predictor.epochs=2", "simulator.model_card=mixtral_8x7b",
)  # fmt: skip
STAGE = """
import os, sys, time
from pathlib import Path
import pandas as pd
from prefetch.errors import FormatError

def told(cfg, store, outputs):
    outputs.table("rows", pd.DataFrame({"why": [f"{cfg.source.path} was read with {os.environ['HF_TOKEN']}"]}))
    outputs.metrics({"tokens": 7})

def fails(cfg, store, outputs):
    told(cfg, store, outputs)
    raise FormatError(f"{cfg.source.path}: refused, token {os.environ['HF_TOKEN']}")

def leaves(cfg, store, outputs):
    sys.exit(3)

def waits(cfg, store, outputs):
    told(cfg, store, outputs)
    time.sleep(60)

def outlives(cfg, store, outputs):
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    for child in children.split():  # the client's service
        os.kill(int(child), 9)
    for _ in range(100):  # the first words after its death may still go into a pipe
        told(cfg, store, outputs)
        if outputs._tracker._failures:
            break
        time.sleep(0.05)
    return {"children": len(children.split())}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, store):
    return finished(tmp_path_factory.mktemp("train"), "stage=train", f"store={store}", *SMALL)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, store, trained):
    words = ("stage=evaluate", "predictor=mlp", f"store={store}", *SMALL)
    return finished(tmp_path_factory.mktemp("evaluate"), *words)


def finished(folder, *words):
    run(folder, *words, "hydra.run.dir=out", exit_code=0)
    return settled(folder)


def run(folder, *words, exit_code, **more):
    done = subprocess.run(
        command(*words), cwd=folder, env=environment() | more, capture_output=True, text=True, timeout=200, check=False
    )  # fmt: skip
    assert done.returncode == exit_code, done.stderr
    return done


def test_a_stage_tells_who_it_is_and_with_what(trained):
    assert (trained.state, trained.job_type, trained.project) == (
        "finished",
        "train",
        "expert-prefetch",
    )
    assert (
        trained.name.startswith("train source=synthetic source.n_requests=6")
        and len(trained.name) <= 128
    )
    assert trained.tags == ["source=synthetic", "predictor=mlp"]
    assert trained.config["predictor"]["epochs"] == 2  # of the resolved configuration
    assert trained.config["predictor"]["horizons"] == [1, 4]


def test_metrics_tables_and_pictures_are_those_of_the_folder(trained, evaluated):
    for told in (trained, evaluated):
        folder = told.path.parents[2]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics and {name: told.summary[name] for name in metrics} == pytest.approx(metrics)
        names = {path.stem for path in folder.glob("*.csv")}
        assert {name.removeprefix("table/") for name in told.tables()} == names
        for name in names:
            columns, rows = told.table(f"table/{name}")
            frame = pd.read_csv(folder / f"{name}.csv")
            assert (columns, len(rows)) == (frame.columns.tolist(), len(frame))
    assert {"table/by_layer", "table/predictors"} <= set(trained.tables())  # per layer
    assert "table/results" in evaluated.tables()  # per cell


def test_the_loss_and_recall_of_every_epoch_are_history_by_epoch(trained):
    rows = [row for row in trained.history if "fit/epoch" in row]
    assert [row["fit/epoch"] for row in rows] == [1, 2]
    lines = {f"fit/{value}_horizon{h}_fold0" for value in ("loss", "recall") for h in (1, 4)}
    assert all(lines <= set(row) for row in rows)
    assert {trained.step_metrics[line] for line in lines} == {"fit/epoch"}
    curve = pd.read_csv(trained.path.parents[2] / "curve.csv")
    far = curve[curve.horizon == 4].sort_values("epoch")
    assert [row["fit/loss_horizon4_fold0"] for row in rows] == pytest.approx(far.loss.tolist())


def test_figures_are_pictures_of_the_run(trained):
    pictures = trained.pictures()
    assert {"figure/learning_curve", "figure/recall_by_layer"} <= set(pictures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())


def test_what_was_made_from_what_is_in_the_graph(trained, evaluated):
    made = {a.name for a in trained.artifacts if a.type != "run_table" and not a.is_input}
    found = {a.name for a in evaluated.artifacts if a.is_input}
    assert {name.partition("-")[0] for name in made} == {"trace", "predictor", "predictions"}
    assert found and found <= made
    lineage = json.loads((trained.path.parents[2] / "lineage.json").read_text())
    assert trained.config["lineage"] == sorted(lineage)
    assert {f"{name.replace('-', '/', 1)}" for name in made} == set(lineage)
    assert all(artifact.references for artifact in evaluated.artifacts if artifact.is_input)


def test_every_chart_of_the_documented_workspace_can_be_drawn(trained, evaluated):
    """docs/tracking.md names metrics, config keys and tables in backticks, beside the stage that tells them."""
    text = (ROOT / "docs" / "tracking.md").read_text()
    charts = re.findall(r"^\| .*\| (train|evaluate) \| (.*) \|$", text, re.MULTILINE)
    assert len(charts) >= 8
    for stage, keys in charts:
        told = trained if stage == "train" else evaluated
        known = (
            set(told.summary)
            | {key for row in told.history for key in row}
            | set(flat(told.config))
        )
        for key in re.findall(r"`([^`]+)`", keys):
            pattern = re.compile(re.escape(key).replace(r"\*", ".*"))
            assert any(pattern.fullmatch(name) for name in known), f"{stage}: nothing tells {key}"


def flat(config, before=""):
    for name, value in config.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")


@pytest.fixture
def place(tmp_path):
    """A git repository with a secret in its remote, and stages that end badly."""
    (tmp_path / "stopping.py").write_text(STAGE)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    remote = ["git", "remote", "add", "origin", "https://me:gitpassw0rd@host/x"]
    subprocess.run(remote, cwd=tmp_path, check=True)
    return tmp_path


SECRETS = {
    "HF_TOKEN": "hf_" + "aB3" * 10, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "DB_PASSWORD": "dbpassw0rd",
}  # fmt: skip


def stopping(name, folder):
    more = {**SECRETS, "PYTHONPATH": str(folder)}
    address = "https://me:urlpassw0rd@host/traces"
    words = (
        "stage=collect", f"stage._target_=stopping.{name}", "source=huggingface", "hydra.run.dir=out", "store=store",
        f"source.path='{address}'", "source.model=${oc.env:DB_PASSWORD}", "source.revision=" + SECRETS["HF_TOKEN"],
    )  # fmt: skip
    return words, more


def test_no_secret_is_in_any_byte_of_a_run(place):
    words, more = stopping("fails", place)
    run(place, *words, exit_code=1, **more)
    told = settled(place)
    assert (told.state, told.exit_code, told.summary["outcome"]) == ("failed", 1, "failed")
    assert (
        told.summary["error"]
        == "FormatError: https://REDACTED@host/traces: refused, token REDACTED"
    )
    assert (place / "out" / "error.txt").read_text().strip() == told.summary["error"]
    assert told.table("table/rows")[1] == [["https://REDACTED@host/traces was read with REDACTED"]]
    assert told.config["source"]["path"] == "https://REDACTED@host/traces"
    assert_no_secret(place)
    host = os.uname().nodename.encode()
    assert len(host) < 6 or host not in told.path.read_bytes()


def assert_no_secret(place):
    planted = ["urlpassw0rd", "gitpassw0rd", *SECRETS.values()]
    places = [path for path in place.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(places) > 10 and any(path.suffix == ".wandb" for path in places)
    for path in places:
        held = [secret for secret in planted if secret.encode() in path.read_bytes()]
        assert not held, f"{path} holds {held}"


def test_a_stage_that_leaves_by_itself_is_a_failed_run(place):
    words, more = stopping("leaves", place)
    run(place, *words, exit_code=3, **more)
    told = settled(place)
    assert (told.exit_code, told.summary["error"]) == (3, "SystemExit: 3")


def test_an_interrupted_stage_is_a_failed_run(place, monkeypatch):
    process = waiting(place, monkeypatch)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 130
    told = settled(place)
    assert (told.exit_code, told.summary["error"]) == (130, "interrupted")
    assert told.summary["tokens"] == 7


def test_a_killed_run_leaves_what_was_done_even_without_the_file_of_its_client(place, monkeypatch):
    process = waiting(place, monkeypatch)
    process.kill()
    ended(process)
    (path,) = find_offline_runs(place)
    told = read_offline_run(path)  # as far as it was written: nothing is promised
    assert told.state == "unfinished" and told.cut
    path.unlink()
    assert json.loads((place / "out" / "metrics.json").read_text()) == {"tokens": 7}
    assert pd.read_csv(place / "out" / "rows.csv").why.tolist() == [
        "https://REDACTED@host/traces was read with REDACTED"
    ]
    assert len(pd.read_parquet(place / "out" / "rows.parquet")) == 1
    assert json.loads((place / "out" / "run.json").read_text())["state"] == "running"


def waiting(place, monkeypatch):
    """A run that has told its metrics and is at work."""
    words, more = stopping("waits", place)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    process = begin(place, *words)
    for _ in range(600):
        if (place / "out" / "metrics.json").is_file():
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(0.5)
    return process


def ended(process):
    code = process.wait(timeout=60)
    process.stdout.close()
    process.stderr.close()
    return code


def test_a_stage_that_is_killed_at_work_has_left_its_tables_lineage_and_log(
    store, tmp_path, trained
):
    words = ("stage=evaluate", "predictor=mlp", f"store={store}", "hydra.run.dir=out", *SMALL)
    process = begin(tmp_path, *words)
    for _ in range(3000):
        if (tmp_path / "out" / "results.csv").is_file() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.csv", "results.parquet", "lineage.json", "run.log", "run.json"} <= left
    assert len(pd.read_parquet(tmp_path / "out" / "results.parquet")) > 5
    assert any(
        name.startswith("trace/")
        for name in json.loads((tmp_path / "out" / "lineage.json").read_text())
    )


def test_the_runs_of_a_sweep_share_their_group_and_differ_in_their_names(place):
    words, more = stopping("fails", place)
    run(place, "-m", *words, "seed=0,1", "hydra.sweep.dir=sweep", exit_code=1, **more)
    told = [read_offline_run(path) for path in find_offline_runs(place)]
    assert [(one.group, one.state) for one in told] == [("sweep", "failed")] * 2
    assert {one.name[-7:] for one in told} == {" seed=0", " seed=1"}
    assert {one.config["seed"] for one in told} == {0, 1}
    assert_no_secret(place)


def test_the_stages_of_one_command_share_their_group(tmp_path):
    words = (
        "stage=all",
        "stage.stages=[collect]",
        "source=synthetic",
        "source.n_requests=3",
        "store=store",
    )
    run(tmp_path, *words, "hydra.run.dir=mine", exit_code=0)
    told = {one.job_type: one for one in map(read_offline_run, find_offline_runs(tmp_path))}
    assert {one.group for one in told.values()} == {"all-mine"} and set(told) == {"all", "collect"}
    assert told["all"].summary["collect/requests"] == told["collect"].summary["requests"] == 3
    made = [a.name for a in told["collect"].artifacts if not a.is_input]
    assert made and made[0].startswith("trace-")


def test_a_tracker_that_dies_at_work_costs_a_warning_at_most(place):
    words, more = stopping("outlives", place)
    done = run(place, *words, exit_code=0, **more)
    # none where the dead client still takes words; test_outputs has one that says that it fails
    assert done.stderr.count("the tracker failed") <= 1 and "Traceback" not in done.stdout
    assert json.loads((place / "out" / "metrics.json").read_text()) == {"tokens": 7}
    assert json.loads((place / "out" / "run.json").read_text())["state"] == "finished"


def test_a_tracker_that_cannot_work_costs_a_warning(tmp_path):
    (tmp_path / "wandb.py").write_text("raise OSError('the client is broken')\n")
    words = (
        "stage=collect",
        "source=synthetic",
        "source.n_requests=3",
        "store=store",
        "hydra.run.dir=out",
    )
    done = run(tmp_path, *words, exit_code=0, PYTHONPATH=str(tmp_path))
    assert "the client is broken" in done.stderr and "the run goes on" in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["requests"] == 3
