"""The stage as a user runs it: its files, its numbers, its errors, and that the page stands at the end of stage=all."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from entry import QUICK, run
from omegaconf import OmegaConf
from report_runs import HOSTILE, Told, hostile, sweep, write_run

from analysis.report import stage
from prefetch.artifacts import Store
from prefetch.config import CONFIGS, stage_names
from prefetch.errors import ConfigError
from prefetch.runs.outputs import Outputs
from prefetch.tracking import NoTracker


def made(tmp_path, runs, title=None) -> tuple[Path, dict[str, float]]:
    cfg = SimpleNamespace(report=OmegaConf.create({"runs": runs, "title": title}))
    folder = tmp_path / "out"
    metrics = stage.run(cfg, Store(tmp_path / "store"), Outputs(folder, NoTracker()))
    return folder, metrics


def test_it_writes_a_page_a_text_and_a_table(tmp_path, capsys):
    sweep(tmp_path / "20260102-030405-1", 8)
    write_run(
        tmp_path / "20260102-030405-1" / "x",
        Told(state="interrupted", error="interrupted: not complete"),
    )
    folder, metrics = made(tmp_path, str(tmp_path / "20260102-030405-1"), "A <title>")
    assert (metrics["runs"], metrics["interrupted"], metrics["failed"], metrics["unreadable"]) == (
        9,
        1,
        0,
        0,
    )
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["bytes"] == (folder / "report.html").stat().st_size < 6_000_000
    assert "<title>A &lt;title></title>" in (folder / "report.html").read_text().replace(
        "&gt;", ">"
    )
    assert (folder / "report.md").read_text().startswith("# A &lt;title>")
    table = pd.read_parquet(folder / "runs.parquet")
    assert len(table) == 9 and {"state", "predictor", "simulator.cache", "hit_rate"} <= set(table)
    assert str(folder / "report.html") in capsys.readouterr().out


def test_names_that_are_hostile_or_the_same_make_a_table_all_the_same(tmp_path):
    for i, name in enumerate((*HOSTILE, "run", "seed", "state")):
        write_run(tmp_path / "runs" / str(i), hostile(name))
    folder, _ = made(tmp_path, [str(tmp_path / "runs")])
    table = pd.read_parquet(folder / "runs.parquet")
    assert {"run (metric)", "seed", "state (metric)"} <= set(table) and len(table) == len(
        HOSTILE
    ) + 3


def test_no_cell_of_the_table_is_computed_and_marks_are_columns(tmp_path):
    for i, name in enumerate(("=1+1", " +1", "@x", "-1+1", "\uff1d1")):
        write_run(tmp_path / "runs" / str(i), hostile(name))
    write_run(tmp_path / "runs" / "x", Told(choices={"predictor": "oracle"}))
    folder, _ = made(tmp_path, str(tmp_path / "runs"))
    table = pd.read_csv(folder / "runs.csv", keep_default_na=False, dtype=str)
    texts = [*table.columns, *table["predictor"], *table["source.path"]]
    assert not any(text.lstrip()[:1] in {*"=+@-", "\uff1d"} for text in texts if text)
    (own,) = (row for row in table.to_dict("records") if row["predictor"] == "oracle")
    assert (own["mark"], own["times"]) == ("cheats", "simulated")


def test_a_store_without_runs_makes_an_empty_page(tmp_path):
    folder, metrics = made(tmp_path, "latest:20")
    assert metrics["runs"] == 0 and "No runs." in (folder / "report.html").read_text()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"report\.runs=nowhere: does not exist"):
        made(tmp_path, "nowhere")


def test_it_is_a_stage_and_the_last_of_all():
    assert stage_names()["report"].startswith("One page that compares runs")
    assert yaml.safe_load((CONFIGS / "stage" / "all.yaml").read_text())["stages"][-1] == "report"


def test_the_entry_reports_on_what_it_ran(tmp_path):
    """A run, a run that failed, and the page of both; a warning in the log is a warning on the page."""
    first = run(tmp_path, "stage=collect", *QUICK)
    assert first.returncode == 0 and "\nmaking trace" in f"\n{first.stderr}", (
        "the console stays as it was"
    )
    assert run(tmp_path, "stage=collect", *QUICK, "source.top_k=99").returncode == 2
    done = run(tmp_path, "stage=report", "report.runs=outputs", "tracker=none")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["runs"], metrics["failed"], metrics["unreadable"]) == (2, 1, 0)
    text = (folder / "report.md").read_text()
    assert "n_experts must be from top_k" in text
    assert (
        "python scripts/run.py stage=collect source=synthetic source.n_requests=3 tracker=none"
        in text
    )
    latest = run(tmp_path, "stage=report", "report.runs=latest:20", "tracker=none")
    assert latest.returncode == 0, latest.stderr
    assert "1 run of collect: 1 finished." in latest.stdout
    logs = [path.read_text() for path in tmp_path.glob("outputs/collect/*/run.log")]
    assert any(" INFO making trace" in log for log in logs), "a log says which lines are warnings"
