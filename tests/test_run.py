"""The entry as a user meets it: a process of its own, its exit code, its lines."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from entry import QUICK, ROOT, begin, run


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_a_bare_run_and_help_list_the_stages_and_leave_nothing(tmp_path, words):
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    for line in ("stage=collect    Record routing", "stage=list       List the stages", "tiny_moe"):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_entry_is_short_and_imports_no_stage():
    lines = (ROOT / "scripts" / "run.py").read_text().splitlines()
    assert len(lines) < 40
    code = (
        "import sys, runpy; sys.argv = ['run.py']; runpy.run_path(sys.argv[0]); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "prefetch.runs.stages" in loaded
    assert not {"torch", "wandb", "pyarrow", "pandas", "numba", "prefetch.sources"} & loaded


def test_collect_twice_makes_once_and_ends_with_its_folder(tmp_path):
    first, second = (run(tmp_path, "stage=collect", *QUICK) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "making trace" in first.stderr and "making" not in second.stderr
    folder = Path(second.stdout.splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["tokens"] == 384 and metrics["real"] == 0 and metrics["dropped_rows"] == 0
    assert {"requests", "layers", "experts", "top_k", "seconds", "tokens_per_second"} <= set(
        metrics
    )
    (used,) = json.loads((folder / "lineage.json").read_text())
    assert (tmp_path / "artifacts" / used / "trace.json").exists()


@pytest.mark.long
def test_all_runs_every_stage_in_folders_of_their_own(tmp_path):
    done = run(tmp_path, "stage=all", *QUICK, "simulator.model_card=gpt_oss_20b")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert json.loads((folder / "metrics.json").read_text())["collect/tokens"] == 384
    assert (folder / "collect" / "metrics.json").exists() and (folder / "lineage.json").exists()
    (used,) = json.loads((folder / "analyze" / "lineage.json").read_text())
    assert used in json.loads((folder / "lineage.json").read_text())
    assert (folder / "analyze" / "summary.md").exists()
    assert (folder / "evaluate" / "results.csv").exists()
    assert "## What to type" in (folder / "advise" / "advice.md").read_text()


def test_artifacts_lists_and_removes(tmp_path):
    folder = Path(run(tmp_path, "stage=collect", *QUICK).stdout.splitlines()[-1])
    (used,) = json.loads((folder / "lineage.json").read_text())
    listed = run(tmp_path, "stage=artifacts")
    assert listed.returncode == 0 and used.partition("/")[2] in listed.stdout
    removed = run(tmp_path, "stage=artifacts", f"artifacts.remove={used}")
    assert removed.returncode == 0 and "no artifacts" in removed.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("stage=colect",), 2, "Available options in 'stage': advise all analyze artifacts"),
        (
            ("sed=1",),
            2,
            "Key 'sed' not in 'Config' full_key: sed ; the root has: advise, analyze, artifacts, clocks, cl",
        ),
        (("+seeed=1",), 2, "nothing reads an added key"),
        (("experiment=nosuch",), 2, "Available options in 'experiment': batch_size capacity_curve"),
        ((*QUICK, "stage=collect", "seed=-1"), 2, "seed=-1: must not be negative"),
        ((*QUICK, "stage=collect", "collect.max_dropped=7"), 2, "must be a share from 0 to 1"),
        ((*QUICK, "stage=collect", "hydra.run.dir=/proc/x"), 1, "/proc/x"),
        (("collect.max_droped=1",), 2, "collect has: max_dropped"),
        (("seed=abc",), 2, "Value 'abc' of type 'str' could not be converted to Integer"),
        ((*QUICK, "source.skwe=1"), 2, "source has: concentration, n_experts"),
        ((*QUICK, "stage=collect", "source.skew=x"), 2, "source.skew: expected float, got 'x'"),
        (("experiment=null",), 2, "experiment=null: names no choice; leave it out"),
        (("source=[synthetic,arrays]",), 2, "to run each, use -m source=synthetic,arrays"),
        (("a=[1,",), 2, "a=[1,"),
        (("tracker=none", "stage=collect", "trace=nowhere"), 1, "nowhere/trace.json: not found"),
        (("stage=artifacts", "artifacts.remove=x"), 2, "the store holds nothing"),
        (
            (*QUICK, "stage=train", "predictor=ensemble", "predictor.members=[markow]"),
            2,
            "predictor: members: 'markow' is no predictor; there are activation_matrix",
        ),
        (
            (*QUICK, "stage=train", "predictor=ensemble", "predictor.members=[{mlp:{hiden:3}}]"),
            2,
            "predictor: mlp.hiden: does not exist; mlp has",
        ),
        (
            (*QUICK, "stage=train", "predictor=ensemble", "predictor.members=mlp"),
            2,
            "predictor.members: expected ",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, words, code, message):
    done = run(tmp_path, *words)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "artifacts").exists()


def test_a_trace_that_the_user_names_is_used_as_it_is(tmp_path):
    folder = Path(run(tmp_path, "stage=collect", *QUICK).stdout.splitlines()[-1])
    (used,) = json.loads((folder / "lineage.json").read_text())
    (tmp_path / "artifacts" / used).rename(tmp_path / "mine")
    done = run(tmp_path, "stage=collect", "trace=mine", "tracker=none")
    assert done.returncode == 0 and "trace mine" in done.stdout


def test_a_corrupted_artifact_names_the_file(tmp_path):
    run(tmp_path, "stage=collect", *QUICK)
    (shard,) = tmp_path.glob("artifacts/trace/*/tokens-00000.parquet")
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    done = run(tmp_path, "stage=collect", *QUICK)
    assert done.returncode == 1 and f"{shard.name}: its sha256 differs" in done.stderr


def test_a_name_that_no_alias_fits_can_be_given(tmp_path):
    import numpy as np

    ids = np.random.default_rng(0).random((60, 4, 16)).argsort(-1)[..., :2]
    np.savez(tmp_path / "a.npz", mine=ids)
    words = ("stage=collect", "tracker=none", "source=arrays", "source.path=a.npz")
    refused = run(tmp_path, *words)
    assert refused.returncode == 1 and "pass source.names.expert_ids=NAME" in refused.stderr
    (folder,) = tmp_path.glob("outputs/collect/*")
    assert "pass source.names" in (folder / "error.txt").read_text()
    assert run(tmp_path, *words, "source.names.expert_ids=mine").returncode == 0


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing_half_made(tmp_path, stop):
    words = ("stage=collect", "source=synthetic", "source.n_requests=1000000", "tracker=none")
    process = begin(tmp_path, *words)
    while not list(tmp_path.glob("artifacts/trace/*.building/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not [path for path in tmp_path.glob("artifacts/trace/*") if path.is_dir()]
