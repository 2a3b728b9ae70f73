"""The page as a reader meets it, in a real browser: no network, no errors; by mouse, by keys, on a phone, on paper."""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path

import pytest
from browser import Browser
from report_page import column, go, heading, narrow, nodes
from report_runs import CELLS, HOSTILE, Told, hostile, sweep, write_run

from analysis.report.contents import contents
from analysis.report.found import find
from analysis.report.page import page

MOST_WAIT_S = 20


def test_it_opens_from_disk_with_every_run(at: Browser) -> None:
    assert at.ask("document.title") == "Runs compared"
    rows = CELLS + 2 * len(HOSTILE) + 1
    assert at.ask("document.querySelectorAll('#table-box tbody tr').length") == rows
    assert at.ask("document.getElementById('count').textContent") == f"{rows} of {rows} runs"
    assert at.ask("window.Plotly === undefined"), (
        "the library waits until somebody looks at figures"
    )


def test_names_are_shown_as_they_were_typed_and_never_run(at: Browser) -> None:
    shown = column(at, "predictor")
    for name in HOSTILE:
        assert any(" ".join(name.split()) == " ".join(one.split()) for one in shown), name
    assert at.ask("document.querySelectorAll('#table-box :is(img, b, script, svg)').length") == 0
    go(at, "#problems", "!document.getElementById('section-problems').hidden")
    text = at.ask("document.getElementById('problems-list').innerText")
    assert "ConfigError: </script><b>no</b>" in text and "metrics.json cannot be read" in text


def test_a_heading_sorts_both_ways_and_empty_cells_stay_last(at: Browser) -> None:
    name = "metric hit_rate"
    for direction, sign in (("ascending", 1), ("descending", -1)):
        at.ask(f"{heading(name)}.click()")
        assert at.ask(f"{heading(name)}.parentElement.getAttribute('aria-sort')") == direction
        texts = column(at, "hit_rate")
        values = [float(text) for text in texts if text]
        assert len(values) > 20 and values == sorted(values, key=lambda value: sign * value)
        assert texts[len(values) :] == [""] * (len(texts) - len(values))


def test_a_filter_takes_words_columns_and_comparisons(at: Browser) -> None:
    assert narrow(at, "predictor:popularity") == CELLS // 4
    assert set(column(at, "simulator.cache")) == {f"{(1 + i) / 10:g}" for i in range(10)}
    assert narrow(at, "POPULARITY stage:evaluate") == CELLS // 6
    assert narrow(at, "hit_rate>0.6") == sum(float(v) > 0.6 for v in column(at, "hit_rate"))
    assert narrow(at, "seed=1") == CELLS - 40
    assert narrow(at, "nosuchword") == 0
    assert at.ask("document.getElementById('table-box').innerText") == "No run fits the filter."
    assert narrow(at, "<script>alert(1)</script>") >= 1
    assert narrow(at, "") == CELLS + 2 * len(HOSTILE) + 1


def test_settings_that_no_longer_differ_leave_the_table(at: Browser) -> None:
    heads = "[...document.querySelectorAll('#table-box thead button')].map((one) => one.firstChild.textContent)"
    assert {"predictor", "simulator.cache"} <= set(at.ask(heads))
    narrow(at, "predictor=popularity")
    assert "predictor" not in at.ask(heads) and "simulator.cache" in at.ask(heads)


def test_what_most_runs_do_not_have_is_tinted(at: Browser) -> None:
    at.ask(
        "document.querySelector('#column-list').querySelectorAll('input').forEach((box) => box.checked || box.click())"
    )
    tinted = at.ask("[...document.querySelectorAll('td.differs')].map((one) => one.innerText)")
    assert HOSTILE[0] in tinted and "fast" not in tinted
    assert "markov" not in tinted, "no predictor has more than half of the runs"


def test_seeds_together_are_one_row_with_mean_and_interval(at: Browser) -> None:
    before = at.ask("document.querySelectorAll('#table-box tbody tr').length")
    at.ask("document.getElementById('seeds').click()")
    assert at.ask("document.querySelectorAll('#table-box tbody tr').length") < before
    assert at.ask("document.querySelectorAll('.seeds a').length") >= 4
    (mean, low, high) = at.ask(
        "document.querySelector('td .interval').parentElement.innerText.match(/[-0-9.]+/g).map(Number)"
    )
    assert low < mean < high


def test_the_csv_is_what_the_table_shows(at: Browser, tmp_path: Path) -> None:
    at.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    left = narrow(at, "stage:train")
    at.ask("document.getElementById('csv').click()")
    end = time.monotonic() + MOST_WAIT_S
    while not (tmp_path / "runs.csv").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    rows = list(
        csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_bytes().decode(), newline=""))
    )
    assert len(rows) == left and {"run", "stage", "predictor", "recall_at_k"} <= set(rows[0])
    said = {row["predictor"] for row in rows}
    assert HOSTILE[0] in said and HOSTILE[2] in said, "quotes and commas survive"
    assert "'=1+1" in said and "=1+1" not in said, "a spreadsheet computes nothing"
    assert {row["mark"] for row in rows if row["predictor"] == "oracle"} == {"cheats"}
    assert {row["times"] for row in rows} == {""}, "train simulates nothing"


def test_a_run_has_an_address_its_command_and_its_tables(at: Browser) -> None:
    narrow(at, "predictor=markov stage=evaluate state=finished")
    at.ask("document.querySelector('#table-box tbody a').click()")
    at.wait("!!document.querySelector('#run dl')")
    assert at.ask("location.hash").startswith("#run-")
    assert at.ask("document.activeElement.id") == "run-title"
    assert at.ask("document.querySelector('.command code').innerText").startswith(
        "python scripts/run.py stage="
    )
    assert at.ask("document.querySelectorAll('#run details table').length") >= 1
    assert "trace/0123456789abcdef" in at.ask("document.getElementById('run').textContent")
    came_from = at.ask("location.hash")
    at.ask("history.back()")
    at.wait("!document.getElementById('section-runs').hidden")
    assert at.ask("document.activeElement.hash") == came_from, "the reader is where they were"


def test_a_hostile_run_is_text_all_over(at: Browser) -> None:
    narrow(at, "hostile1")
    at.ask("document.querySelector('#table-box tbody a').click()")
    at.wait("!!document.querySelector('#run dl')")
    text = at.ask("document.getElementById('run').innerText")
    assert text.count("<img src=x onerror=alert(1)>") >= 4, "command, warning, page, numbers"
    assert at.ask("document.querySelectorAll('#run :is(img, script)').length") == 0
    assert "Warnings" in text


def test_an_address_opens_its_section_and_an_unknown_one_the_table(at: Browser, path: Path) -> None:
    for address, section in (
        ("#settings", "settings"),
        ("#nonsense", "runs"),
        ("#run-nobody", "runs"),
        ("#%E4", "runs"),
    ):
        at.open(path, address)
        shown = at.ask(
            "[...document.querySelectorAll('main > section')].filter((one) => !one.hidden).map((one) => one.id)"
        )
        assert shown == [f"section-{section}"], address


def test_keys_alone_reach_everything(at: Browser) -> None:
    at.press("Tab", 9)
    assert at.ask("document.activeElement.className") == "skip"
    seen = []
    for _ in range(40):
        at.press("Tab", 9)
        seen.append(
            at.ask(
                "document.activeElement.id || document.activeElement.dataset.sort || document.activeElement.hash"
            )
        )
    places = [
        seen.index(name)
        for name in ("theme", "#figures", "filter", "stage", "csv", "table-box", "fixed run")
    ]
    assert places == sorted(places), "in the order of the page"
    at.ask(f"{heading('fixed stage')}.focus()")
    at.press("Enter", 13, "\r")
    assert (
        at.ask(f"{heading('fixed stage')}.parentElement.getAttribute('aria-sort')") == "ascending"
    )
    assert at.ask("document.activeElement.dataset.sort") == "fixed stage", "the focus stays"
    at.ask("document.getElementById('columns').open = true")
    at.ask("document.querySelector('#column-list input').focus()")
    at.press("Escape", 27)
    assert not at.ask("document.getElementById('columns').open")
    assert at.ask("document.activeElement.tagName") == "SUMMARY"


def test_whoever_cannot_see_it_is_told_everything(at: Browser) -> None:
    for address, ready in (
        ("#runs", "true"),
        ("#figures", "document.getElementById('charts').dataset.drawn"),
    ):
        go(at, address, ready)
        roles = (
            "button",
            "link",
            "textbox",
            "searchbox",
            "combobox",
            "checkbox",
            "image",
            "region",
            "table",
        )
        asked = [node for node in nodes(at) if node["role"]["value"] in roles]
        assert len(asked) > 20
        for node in asked:
            assert node["name"]["value"].strip(), node


@pytest.mark.parametrize("section", ["runs", "figures", "settings", "problems", "about", "run"])
def test_on_a_phone_only_boxes_scroll_sideways(at: Browser, section: str) -> None:
    at.size(375, 800, is_phone=True)
    if section == "run":
        narrow(at, "hostile0")
        at.ask("document.querySelector('#table-box tbody a').click()")
        at.wait("!!document.querySelector('#run dl')")
    else:
        ready = (
            "document.getElementById('charts').dataset.drawn" if section == "figures" else "true"
        )
        go(at, f"#{section}", ready)
        at.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert at.ask("[document.documentElement.scrollWidth, innerWidth]") == [375, 375]


def test_names_of_any_length_stay_in_their_place(browser: Browser, tmp_path: Path) -> None:
    long = "L" * 200
    write_run(tmp_path / long, hostile(long))
    write_run(tmp_path / "b", Told(state="failed", error=long))
    (tmp_path / "p.html").write_text(page(contents(find(str(tmp_path), tmp_path), long), ""))
    browser.size(1400)
    browser.open(tmp_path / "p.html")
    inner, outer = browser.ask(
        "[...document.querySelectorAll('#table-box tbody th')].map((cell) => [cell.scrollWidth, cell.clientWidth])"
        ".reduce((a, b) => [Math.max(a[0], b[0] - b[1]), 0], [0, 0])"
    )
    assert inner == outer == 0, "a name lies over no other column"
    browser.size(375, 800, is_phone=True)
    assert browser.ask("[document.documentElement.scrollWidth, innerWidth]") == [375, 375]


def test_on_paper_it_is_light_open_and_without_tools(at: Browser) -> None:
    at.ask("document.getElementById('theme').click(), document.getElementById('theme').click()")
    go(at, "#settings", "!document.getElementById('section-settings').hidden")
    dark = "document.documentElement.dataset.theme"
    at.ask(
        "void addEventListener('beforeprint', () => { window.printed = document.documentElement.dataset.theme; })"
    )
    paper = at.pdf()
    assert paper.startswith(b"%PDF") and len(paper) > 5_000
    assert at.ask("window.printed") == "light" and at.ask(dark) == "dark"
    at.call("Emulation.setEmulatedMedia", media="print")
    assert at.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    at.call("Emulation.setEmulatedMedia", media="")


def test_a_long_table_shows_its_beginning_and_the_rest_when_asked(
    browser: Browser, tmp_path: Path
) -> None:
    folder = sweep(tmp_path / "20260102-030405-1", 2)
    found = find(str(folder), tmp_path)
    found.runs = [found.runs[i % 2] for i in range(450)]
    (tmp_path / "long.html").write_text(page(contents(found), ""))
    browser.open(tmp_path / "long.html")
    rows = "document.querySelectorAll('#table-box tbody tr').length"
    assert browser.ask(rows) == 200
    browser.ask("document.querySelector('#more button').click()")
    assert browser.ask(rows) == 450 and browser.problems == []


def test_a_page_of_nothing_says_so(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "empty.html").write_text(page(contents(find("latest:5", tmp_path)), ""))
    browser.open(tmp_path / "empty.html")
    assert browser.ask("document.getElementById('table-box').innerText") == "There are no runs."
    assert browser.ask("document.querySelectorAll('nav a').length") == 3 and browser.problems == []


def test_where_a_browser_is_named_it_must_run() -> None:
    """In the gate CHROMIUM is set: a page that nobody opened is not tested."""
    named = os.environ.get("CHROMIUM")
    assert named is None or Path(named).exists()
