"""One browser and one page for all tests that open it: a sweep with seeds and cheats, broken runs, hostile names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from report_runs import CELLS, HOSTILE, Told, hostile, sweep, write_run

from analysis.report.contents import contents
from analysis.report.found import find
from analysis.report.page import page


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium), and CHROMIUM names none")
    with Browser(program) as one:
        yield one


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with seeds and cheats, runs that broke, and every hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    sweep(folder / "20260102-030405-1", CELLS)
    for i, name in enumerate(HOSTILE):
        write_run(folder / f"hostile{i}", hostile(name))
        write_run(
            folder / f"cells{i}",
            Told(choices={"predictor": name}, settings={"simulator.cache": 0.9}),
        )
    write_run(folder / "broken", Told(state="failed", error="ConfigError: </script><b>no</b>"))
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "metrics.json").write_text("{")
    made = tmp_path_factory.mktemp("page") / "report.html"
    made.write_text(page(contents(find(str(folder), folder)), "Made by a test."), encoding="utf-8")
    return made


@pytest.fixture
def at(browser: Browser, path: Path) -> Iterator[Browser]:
    """The page as it opens, light and wide; whatever a test does, nothing is complained about and nothing fetched."""
    browser.size(1400)
    browser.prefer(prefers_color_scheme="light")
    browser.problems.clear()
    browser.asked.clear()
    browser.open(path)
    browser.ask("localStorage.clear()")
    yield browser
    assert browser.problems == []
    assert {address.partition(":")[0] for address in browser.asked} <= {
        "file",
        "data",
        "blob",
        "about",
    }
