"""Sweeps: every job runs, what failed is named, and one that was stopped or killed goes on where it stopped."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from entry import QUICK, begin, run


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_sweep_runs_every_job_and_one_bad_job_does_not_stop_the_others(tmp_path, launcher):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    words = ("-m", "stage=collect", *QUICK, "source.top_k=2,99", f"hydra/launcher={launcher}")
    done = run(
        tmp_path, *words, "seed=0,1", *(("hydra.launcher.n_jobs=2",) * (launcher == "joblib"))
    )
    assert done.returncode == 2 and "n_experts must be from top_k" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.glob("multirun/*/*/metrics.json"))) == 2
    states = standings(tmp_path)
    assert [states[job]["state"] for job in "0123"] == ["finished", "finished", "failed", "failed"]
    entered = [json.loads(path.read_text()) for path in tmp_path.glob("artifacts/runs/*.json")]
    assert sorted(one["failed"] for one in entered) == [False, False, True, True]
    assert "of 4 jobs begun 2 failed, 2 finished" in done.stderr
    assert (
        "n_experts must be from top_k to 65535; got n_experts=32, top_k=99 (job 2, 3)"
        in done.stderr
    )


TINY = (
    "source=synthetic", "source.n_requests=12", "source.prompt_tokens=8", "source.new_tokens=8",
    "source.n_layers=4", "source.n_experts=8", "tracker=none", "train.folds=1", "train.horizons=[1]",
    "train.figures=false", "train.baselines=none",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("predictor=popularity,markov",), ["popularity", "markov"]),
        (
            ("predictor=mlp", "predictor.hidden=4,8,12", "predictor.epochs=1",
             "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
            ["mlp"] * 3,
        ),
    ],
    ids=["predictors", "sizes in parallel"],
)  # fmt: skip
def test_a_sweep_of_predictors_stands_on_one_trace(tmp_path, words, names):
    """Jobs that start together wait for the one that makes it; each has numbers, tables and a lineage of its own."""
    if "hydra/launcher=joblib" in words:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = run(tmp_path, "-m", "stage=train", *words, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("making trace ") == 1
    (trace,) = tmp_path.glob("artifacts/trace/*/trace.json")
    assert len(list(tmp_path.glob("artifacts/predictor/*/predictor.json"))) == len(names)
    (sweep,) = tmp_path.glob("multirun/*")
    fitted = set()
    for job, name in enumerate(names):
        metrics = json.loads((sweep / str(job) / "metrics.json").read_text())
        assert 0 < metrics["recall_at_k"] < 1
        table = (sweep / str(job) / "predictors.csv").read_text()
        assert f"\n{name}," in table
        used = json.loads((sweep / str(job) / "lineage.json").read_text())
        assert f"trace/{trace.parent.name}" in used
        fitted |= {key for key in used if key.startswith("predictor/")}
    assert len(fitted) == len(names)


def standings(folder: Path) -> dict[str, dict[str, object]]:
    """What `run.json` says, job by job."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in folder.glob("multirun/*/*/run.json")
    }


def test_every_job_says_what_to_type_to_run_it_again(tmp_path):
    run(tmp_path, "-m", "stage=collect", *QUICK, "source.skew=0.5,0.75")
    first, second = (standings(tmp_path)[job] for job in "01")
    words = shlex.split(str(second["command"]))
    assert words[:2] == ["python", "scripts/run.py"] and "source.skew=0.75" in words
    assert first["settings"] != second["settings"]
    again = run(tmp_path, *words[2:], "hydra.run.dir=again")
    assert again.returncode == 0
    assert (
        json.loads((tmp_path / "again" / "run.json").read_text())["settings"] == second["settings"]
    )


def test_a_sweep_that_was_killed_goes_on_where_it_stopped(tmp_path):
    """The first jobs are found finished, the killed one and those after it are run."""
    words = (
        "-m",
        "stage=collect",
        "source=synthetic",
        "tracker=none",
        "source.n_requests=3,4,3000000,5",
    )
    process = begin(tmp_path, *words)
    while "2" not in standings(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert {job: one["state"] for job, one in standings(tmp_path).items()} == {
        "0": "finished", "1": "finished", "2": "running"
    }  # fmt: skip
    before = standings(tmp_path)["0"]
    (sweep,) = tmp_path.glob("multirun/*")
    shorter = (*words[:-1], "source.n_requests=3,4,30,5")  # nobody waits for three million
    done = run(tmp_path, *shorter, f"hydra.sweep.dir={sweep}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("making trace ") == 2 and "of 4 jobs begun 4 finished" in done.stderr
    after = standings(tmp_path)
    assert after["0"] == before and set(after) == {"0", "1", "2", "3"}
    assert len(list(sweep.glob("*/metrics.json"))) == 4
    folders = [line for line in done.stdout.splitlines() if line.startswith(str(sweep))]
    assert [Path(folder).name for folder in folders] == ["0", "1", "2", "3"]


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    process = begin(tmp_path, "-m", "stage=collect", *QUICK, "source.n_requests=3,3000000")
    while not list(tmp_path.glob("artifacts/trace/*.building/*")) or len(standings(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    (sweep,) = tmp_path.glob("multirun/*")
    assert process.returncode == 130 and "of 2 jobs begun 1 finished, 1 interrupted" in said
    assert "hydra.sweep.dir=" in said and sweep.name in said


def test_two_sweeps_at_once_on_one_store_are_both_right(tmp_path):
    """They ask for the same traces and predictors at the same time: each is made once, and both have all numbers."""
    words = (
        "-m",
        "stage=train",
        "predictor=popularity,markov",
        *TINY,
        f"store={tmp_path / 'store'}",
    )
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    both = [begin(tmp_path / name, *words) for name in "ab"]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(text.count("making trace ") for text in said) == 1
    assert sum(text.count("making predictor ") for text in said) == 2
    for job in "01":
        a, b = (
            next((tmp_path / name).glob(f"multirun/*/{job}/by_layer.csv")).read_text()
            for name in "ab"
        )
        assert a == b


def test_a_stage_of_several_says_how_to_run_it_alone(tmp_path):
    words = ("stage=all", "stage.stages=[collect,analyze]", *QUICK, "analyze.figures=false")
    assert run(tmp_path, *words).returncode == 0
    (told,) = tmp_path.glob("outputs/all/*/analyze/run.json")
    typed = shlex.split(json.loads(told.read_text())["command"])
    assert "stage=analyze" in typed and "stage=all" not in typed


def test_another_sweep_s_folder_is_not_written_over(tmp_path):
    words = ("-m", "stage=collect", *QUICK, "hydra.sweep.dir=mine")
    assert run(tmp_path, *words, "source.skew=0.5,0.75").returncode == 0
    before = (tmp_path / "mine" / "0" / "metrics.json").read_bytes()
    done = run(tmp_path, *words, "source.skew=0.75,0.5")
    assert done.returncode == 2
    assert done.stderr.count("holds a finished run of other settings") >= 2
    assert (tmp_path / "mine" / "0" / "metrics.json").read_bytes() == before


def test_two_processes_are_never_at_work_in_one_folder(tmp_path):
    words = ("stage=collect", *QUICK, "source.n_requests=3000000", "hydra.run.dir=mine")
    first = begin(tmp_path, *words)
    while not list(tmp_path.glob("artifacts/trace/*.building/*")):
        assert first.poll() is None
        time.sleep(0.05)
    second = run(tmp_path, *words)
    assert second.returncode == 2 and "another process is at work in this folder" in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert not list(tmp_path.glob("mine/.run.lock"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage=analyze", "trace=mine", "source=synthetic"), "source=synthetic: trace=mine is used as it is"),
        (("experiment=quick", "experiment=seeds"), "experiment=: given twice"),
        (("-m", "stage=train", *QUICK, "hydra/launcher=slurm"), "Slurm is not on this machine"),
        (("stage=train", *QUICK, "train.domains=python"), "a list is written key=[a,b]"),
    ],
)  # fmt: skip
def test_words_that_nobody_can_mean_are_refused(tmp_path, words, said):
    done = run(tmp_path, "tracker=none", *(word for word in words if word != "tracker=none"))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_word_for_a_sweep_may_stand_anywhere(tmp_path):
    done = run(tmp_path, "stage=collect", "-m", *QUICK, "seed=0,1")
    assert done.returncode == 0 and len(standings(tmp_path)) == 2


def test_a_sweep_that_could_not_begin_says_nothing_of_jobs_and_keeps_no_password(tmp_path):
    words = ("-m", "stage=train", "predictor=markov,nosuch", "source=arrays")
    done = run(tmp_path, *words, "'source.path=https://me:hunter22@host/x'", "tracker=none")
    assert done.returncode == 2 and "jobs" not in done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hunter22" not in path.read_bytes(), path
