"""The same tables as Markdown: a name from a user stays one cell, and numbers keep their labels."""

import pytest
from markdown_it import MarkdownIt
from report_runs import HOSTILE, Told, hostile, sweep, write_run

from analysis.report.contents import contents
from analysis.report.found import find
from analysis.report.listing import index
from analysis.report.markdown import MOST_ROWS, escaped, markdown, table


def of(folder):
    return contents(find(str(folder), folder))


def cells(text):
    """Rows of the first table, as a Markdown reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows, row = [], None
    for token in tokens:
        if token.type == "tr_open":
            row = []
            rows.append(row)
        elif token.type == "inline" and row is not None:
            row.append("".join(child.content for child in token.children))
    return rows


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_cell_and_means_itself(name):
    text = table(["a", "b"], [[name, 1]])
    (_, row) = cells(text)
    assert row == [" ".join(name.split()), "1"]
    assert not any(
        token.type == "html_inline" for token in MarkdownIt().parseInline(escaped(name))[0].children
    )


def test_the_tables_of_the_page(tmp_path):
    folder = sweep(tmp_path / "20260102-030405-1", 48)
    write_run(
        tmp_path / "20260102-030405-1" / "x",
        Told(stage="train", choices={"predictor": "oracle"}, seed=7),
    )
    text = markdown(of(folder))
    parts = (
        "## evaluate",
        "tpot_ms (simulated)",
        "## Time per token (simulated)",
        "(cheats)",
        "## Recall by layer",
        "## Settings that all runs share",
        "stage=evaluate seed=0 predictor=markov simulator.cache=0.1",
    )
    for part in parts:
        assert part in text, part
    assert " to " in text, "intervals over seeds"


def cheating_seeds(folder):
    """Three seeds of what cheats; the first and the last failed and left no table that could say it."""
    for seed in range(3):
        has_failed = seed != 1
        told = Told(
            seed=seed, choices={"predictor": "oracle"}, state="failed" if has_failed else "finished",
            error="no" if has_failed else None, began=f"2026-01-0{seed + 1}T00:00:00+00:00",
        )  # fmt: skip
        write_run(folder / str(seed), told)
    return folder


def test_a_mean_says_of_how_many_seeds_and_keeps_its_mark(tmp_path):
    made = of(cheating_seeds(tmp_path / "a"))
    assert "(cheats) | failed and finished |" in markdown(made)
    (group,) = index(made)["groups"]
    assert group["mark"] == "cheats" and group["name"].startswith("1 seed: ")
    text = markdown(of(sweep(tmp_path / "20260102-030405-1", 48)))
    assert "| 2 seeds: 20260102-030405-1/" in text and "Student's 95 % interval over seeds" in text


def test_failed_and_unreadable_runs_are_told(tmp_path):
    write_run(tmp_path / "a", Told(state="failed", error="ConfigError: a|b <c>"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.json").write_text("{")
    text = markdown(of(tmp_path))
    assert "failed: ConfigError: a\\|b &lt;c>" in text and "metrics.json cannot be read" in text


def test_hostile_runs_leave_every_table_rectangular(tmp_path):
    for i, name in enumerate(HOSTILE):
        write_run(tmp_path / str(i), hostile(name))
    text = markdown(of(tmp_path))
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        assert token.type != "html_block"
    blocks = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(blocks) >= 3
    for block in blocks:
        assert len({len(row) for row in cells(block)}) == 1


def test_a_long_table_says_how_long_it_is():
    assert f"The first {MOST_ROWS} of 1,000 rows." in table(["a"], [[i] for i in range(1000)])


def test_no_runs_is_a_page_too(tmp_path):
    assert "No runs." in markdown(contents(find("latest:3", tmp_path)))
