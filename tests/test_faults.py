"""Runs that are killed, stopped, or meet a disk that fails: the next one is right. All points: bench_faults.py."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from entry import command, environment
from fault_cases import CASES, COLLECTED, FITTED
from faults import Fault, Trials, Warm, library, results, sharp, warmed

from prefetch.manifest import MANIFEST

POINTS = 4  # of each harm, evenly over the run, and the last
HARMS = ("kill", "torn", "term", "full", "read_only", "vanish", "clock", "fail_once")
CODES = {"clock": 40 * 86400, "fail_once": errno.EIO}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    counter = library(folder)
    if counter is None:
        pytest.skip("needs Linux and a C compiler (cc)")
    with warmed(folder, counter, "collect", "evaluate", "train", "artifacts") as warm:
        yield warm


@pytest.fixture(scope="module")
def collecting(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(warm, CASES["collect"], tmp_path_factory.mktemp("collect"))


def some(trials: Trials, harm: str, n: int = POINTS) -> list[Fault]:
    changes = trials.whole.changes
    places = [at for at in sharp(changes) if harm != "torn" or " write " in changes[at - 1]]
    few = {*places[:: max(1, len(places) // n)], places[-1]}
    return [Fault(harm, at, CODES.get(harm, 0)) for at in sorted(few)]


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_change_it_meets_the_next_run_is_right(collecting, harm):
    bad = {fault: wrong for fault in some(collecting, harm) if (wrong := collecting.trial(fault))}
    assert not bad


def test_what_can_be_compared_is_compared(collecting):
    """Otherwise every trial would be right."""
    assert {"out/metrics.json[tokens]", "out/metrics.json[best_recall_at_k]"} <= collecting.same
    assert any(name.endswith("/tokens-00000.parquet") for name in collecting.same)
    assert len(collecting.same) > 0.9 * len(collecting.expected)
    renamed = [one for one in collecting.whole.changes if " rename " in one]
    assert any("/trace/" in one for one in renamed) and any("runs/" in one for one in renamed)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_may_come_at_any_moment(collecting, stop):
    drawn = random.Random(int(stop))
    for _ in range(5):
        fault = Fault(stop=stop, after_s=drawn.random() * collecting.whole.seconds)
        assert collecting.trial(fault) == [], fault


@pytest.mark.parametrize("harm", ["kill", "full"])
def test_rows_that_were_kept_do_not_change_an_evaluation(warm, tmp_path, harm):
    trials = Trials(warm, CASES["evaluate"], tmp_path)
    bad = {fault: wrong for fault in some(trials, harm, 2) if (wrong := trials.trial(fault))}
    assert not bad and any("/cells/" in change for change in trials.whole.changes)


def test_a_judge_who_finds_nothing_would_be_no_judge(collecting, monkeypatch):
    """A run that leaves something, or other results, is told."""
    collecting.trial(Fault())
    (collecting.work / "store" / "trace" / "x.part").touch()
    (metrics,) = collecting.work.glob("out/metrics.json")
    metrics.write_text(metrics.read_text().replace("384", "385"))
    assert "out/metrics.json[tokens] differs" in list(collecting._differs())
    monkeypatch.setattr(collecting, "paths", collecting.paths - {"out/metrics.json"})
    assert "remains after stage=artifacts: out/metrics.json" in collecting.trial(Fault())


def test_a_run_that_hangs_is_told(collecting, monkeypatch):
    monkeypatch.setattr(faults, "LONGEST_S", 0.01)
    assert f"the run itself: died of signal {signal.SIGABRT}" in collecting.trial(Fault())


STORED = (*FITTED[1:], "store=store", "tracker=none", "hydra.run.dir=out")


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 1
        path.write_bytes(content)


def test_every_file_of_every_artifact_is_checked_named_and_made_again(warm, tmp_path):
    """One way to damage it after the other, in turn."""
    whole, work = tmp_path / "whole", tmp_path / "work"
    whole.mkdir()
    assert warm.run(whole, FITTED[0], *STORED).code == 0
    expected = {
        n: d for n, d in results(whole).items() if n.startswith("store/") and ".json[" not in n
    }
    files = sorted(path for path in whole.glob("store/*/*/*") if path.parent.parent.name != "runs")
    kinds = {path.parent.parent.name for path in files}
    assert kinds == {"trace", "predictor", "predictions"} and len(files) > 8
    for number, file in enumerate(files):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        damaged = work / file.relative_to(whole)
        damage(damaged, ("flipped", "truncated", "missing")[number % 3])
        told = warm.run(work, FITTED[0], *STORED)
        name = f"{damaged.parent.name}/{damaged.name}"
        assert told.code == 1 and name in told.err.splitlines()[-1], (name, told.err)
        assert "artifacts.rebuild=true makes it again" in told.err and "Traceback" not in told.err
        again = warm.run(work, FITTED[0], *STORED, "artifacts.rebuild=true")
        assert again.code == 0 and again.err.count("it is made again") == 1, again.err
        found = results(work)
        assert {name: found.get(name) for name in expected} == expected
        assert not list(work.glob("store/*/*.building")) and (damaged.parent / MANIFEST).exists()


def test_a_plugin_that_pip_left_by_halves_is_one_line(tmp_path):
    """Hydra imports every plugin, so that it meets every command."""
    half = tmp_path / "hydra_plugins" / "hydra_half"
    half.mkdir(parents=True)
    (half / "__init__.py").write_text("import os\nos.nosuch\n")
    told = {**environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command(*COLLECTED, "tracker=none"), cwd=tmp_path, env=told, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "pip install --force-reinstall hydra-half" in line


@pytest.mark.long
@pytest.mark.parametrize("name", ["analyze", "advise", "diagnose", "report", "subset", "artifacts"])
def test_every_stage_survives_a_kill(warm, tmp_path, name):
    trials = Trials(warm, CASES[name], tmp_path)
    bad = {fault: wrong for fault in some(trials, "kill", 2) if (wrong := trials.trial(fault))}
    assert not bad
