"""One run's folder: what is there is read, what is broken is a note, what was never written is not invented."""

import json
import os
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import Told, write_run

from analysis.report.commands import command
from analysis.report.contents import contents
from analysis.report.details import markup, warnings
from analysis.report.found import find
from analysis.report.markdown import markdown
from analysis.report.page import page
from analysis.report.reading import read_run
from analysis.report.runs import Run, Unreadable, flat, is_run
from analysis.report.stage import frame


def read(folder) -> Run:
    found = read_run(folder)
    assert isinstance(found, Run)
    return found


def test_links_that_lead_out_of_a_run_are_not_followed(tmp_path):
    folder = write_run(tmp_path / "run", Told(pages={"summary.md": "# It"}))
    (tmp_path / "private.txt").write_text("not for a page")
    for name in ("other.md", "other.csv", "other.svg", "other.log"):
        (folder / name).symlink_to(tmp_path / "private.txt")
    (folder / "same.md").symlink_to(folder / "summary.md")
    run = read(folder)
    assert set(run.pages) == {"summary.md", "same.md"} and "other" not in run.tables
    assert "other" not in run.pictures and "not for a page" not in run.log


def test_everything_that_a_stage_leaves_is_read(tmp_path):
    told = Told(
        words=("simulator.cache=0.5",),
        settings={"simulator.cache": 0.5},
        pages={"summary.md": "# It"},
    )
    run = read(write_run(tmp_path / "20260102-030405-000001", told))
    assert (run.stage, run.state, run.name) == ("evaluate", "finished", "20260102-030405-000001")
    assert run.choices["predictor"] == "markov" and run.settings["simulator.cache"] == 0.5
    assert run.settings["train.horizons"] == "[1, 4]" and run.settings["memory"] is None
    assert set(run.tables) == {"results", "required_recall"} and len(run.table("results")) == 3
    assert run.metrics["memory_savings"] == 0.5 and run.pages == {"summary.md": "# It"}
    assert list(run.lineage) == ["trace/0123456789abcdef"] and not run.notes
    assert command(run) == "python scripts/run.py stage=evaluate seed=0 simulator.cache=0.5"


@pytest.mark.parametrize("has_standing", [True, False], ids=["now", "before run.json"])
@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("failed", "ConfigError: no"),
        ("interrupted", "interrupted: not complete"),
        ("running", None),
    ],
)
def test_how_a_run_ended(tmp_path, state, error, has_standing):
    run = read(write_run(tmp_path / "a", Told(state=state, error=error, has_standing=has_standing)))
    assert run.state == ("unfinished" if state == "running" else state)
    assert run.message == (error or "no end was written: it was killed, or runs still")


def test_a_finished_run_of_a_version_that_did_not_say_so(tmp_path):
    run = read(write_run(tmp_path / "20250102-030405", Told(has_standing=False)))
    assert (run.state, run.began) == ("finished", "2025-01-02T03:04:05")


DAMAGE = {
    "metrics.json": b'{"hit_rate": 0.',
    "lineage.json": b"[1, 2]",
    ".hydra/config.yaml": b"a: [unclosed",
    ".hydra/hydra.yaml": b"\x00\xff\xfe",
    ".hydra/overrides.yaml": b"just: words",
    "run.json": b"null",
    "results.csv": b'a,b\n"1,2\n3',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_costs_only_what_it_holds(tmp_path, name):
    folder = write_run(tmp_path / "a", Told())
    (folder / name).write_bytes(DAMAGE[name])
    run = read(folder)
    assert run.stage in ("evaluate", "unknown")
    whole = read(write_run(tmp_path / "b", Told()))
    kept = {"metrics.json": "settings", "results.csv": "settings"}.get(name, "metrics")
    assert getattr(run, kept) == getattr(whole, kept)
    if name in ("metrics.json", ".hydra/config.yaml", ".hydra/hydra.yaml"):
        assert any(name.rpartition("/")[2] in note for note in run.notes)
    if name == "results.csv":
        assert run.table("results") is None and "results" in run.failures


@pytest.mark.parametrize(
    "column",
    [
        pa.array(np.zeros(20_000_000, np.int8)),
        pa.array(["x" * 100_000]).take(pa.array([0] * 10_000)),
    ],
)
def test_a_table_that_unfolds_to_more_than_a_page_needs_is_not_read(tmp_path, column):
    folder = write_run(tmp_path / "a", Told())
    pq.write_table(pa.table({"a": column}), folder / "results.parquet", compression="zstd")
    assert (folder / "results.parquet").stat().st_size < 1 << 18
    run = read(folder)
    assert run.table("results") is None and "refused as a bomb" in str(run.failures["results"])
    (folder / "results.parquet").unlink()
    assert read(folder).table("results") is not None


def test_odd_numbers_are_left_out_and_named(tmp_path):
    folder = write_run(tmp_path / "a", Told())
    (folder / "metrics.json").write_text('{"a": 1, "b": NaN, "c": "x", "d": null, "e": 1e400}')
    run = read(folder)
    assert run.metrics == {"a": 1} and "b, c, d, e" in run.notes[0]


def test_nothing_that_can_be_read_is_unreadable(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    found = read_run(tmp_path)
    assert isinstance(found, Unreadable) and "metrics.json cannot be read" in found.why
    assert not is_run(tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_note(tmp_path):
    folder = write_run(tmp_path / "a", Told())
    (folder / "metrics.json").chmod(0)
    assert "PermissionError" in read(folder).notes[0]


def test_a_stage_of_all_takes_settings_and_command_from_above(tmp_path):
    above = write_run(
        tmp_path / "20260102-030405-000001", Told(stage="all", words=("simulator.cache=0.5",))
    )
    inner = above / "evaluate"
    inner.mkdir()
    (inner / "metrics.json").write_text('{"hit_rate": 0.5}')
    run = read(inner)
    assert (run.stage, run.settings["stage.name"], run.name) == (
        "evaluate",
        "evaluate",
        f"{above.name}/evaluate",
    )
    assert command(run) == "python scripts/run.py stage=evaluate seed=0 simulator.cache=0.5"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
def test_a_command_says_to_a_shell_exactly_what_was_typed(tmp_path_factory, words):
    run = Run(
        tmp_path_factory.getbasetemp(), "train", "finished", overrides=["stage=train", *words]
    )
    assert shlex.split(command(run)) == ["python", "scripts/run.py", "stage=train", *words]


def test_a_command_that_nobody_knows_is_not_made_up(tmp_path):
    assert command(Run(tmp_path, "train", "finished")) is None


def test_settings_lie_flat():
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": None, "f": True}) == {
        "a.b.c": 1, "a.d": "[]", "e": None, "f": True,
    }  # fmt: skip


def test_warnings_are_the_lines_that_say_so():
    now = "2026-01-02 03:04:05,6"
    log = f"making trace\n{now} WARNING link busy\nWARNING link busy\n{now} INFO a WARNING"
    assert warnings(log) == ["link busy"]


def test_markdown_of_a_run_brings_no_markup_of_its_own():
    made = markup(
        "<script>x</script> ![p](http://a/b.png) [l](javascript:x)\n\n<img src=x onerror=x>\n\n| a |\n|---|\n| b |"
    )
    assert "<script" not in made and "<img" not in made and 'href="javascript' not in made
    assert "<td>b</td>" in made


def test_metrics_of_a_run_are_numbers(tmp_path):
    folder = write_run(tmp_path / "a", Told(metrics={"big": 2**60, "yes": True}))
    assert json.dumps(dict(read(folder).metrics))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".hydra/config.yaml", "a: &x [1, *x]\nseed: 0\n"),
        (".hydra/config.yaml", "a: &x {b: *x}\nseed: 0\n"),
        (".hydra/config.yaml", f"a: {'{b: ' * 900}1{'}' * 900}\n"),
        ("metrics.json", f'{{"a": 1{"0" * 400}}}'),
        ("lineage.json", '{"a": {"upstream": 5}}'),
        ("run.json", '{"stage": "\\ud800", "state": "failed", "error": "\\udfff"}'),
        ("metrics.json", '{"\\ud800": 1}'),
    ],
)
def test_what_no_run_would_write_stops_no_report(tmp_path, file, text):
    write_run(tmp_path / "fine", Told())
    (write_run(tmp_path / "odd", Told(seed=1)) / file).write_text(text)
    of = contents(find(str(tmp_path), tmp_path))
    assert len(of.runs) == 2, "what can be read of it is shown"
    assert page(of, "").encode() and markdown(of).encode()
    frame(of).to_parquet(tmp_path / "runs.parquet")


def test_settings_that_are_no_json_numbers_are_words(tmp_path):
    for i, value in enumerate((1.0, float("inf"), float("nan"))):
        write_run(tmp_path / str(i), Told(settings={"train.patience": value}))
    of = contents(find(str(tmp_path), tmp_path))
    assert "inf" in page(of, "") and "train.patience" in [column.name for column in of.columns]


def test_of_a_long_log_the_end_is_kept(tmp_path):
    folder = write_run(tmp_path / "a", Told(log="begin\n" + "x" * 300_000 + "\nWARNING the end"))
    run = read_run(folder)
    assert isinstance(run, Run) and run.log.endswith("WARNING the end")
    assert len(run.log) <= 200_000
