"""The page of stage=report over many runs: seconds to make it, its bytes, and how fast it answers in a browser.

    python scripts/bench/bench_report.py [runs]        default 1000

The runs are drawn (evaluate and train, four predictors, ten caches, seeds) with their tables. Times in the browser are
the least of five, in a headless Chromium of 1400 pixels; without one, only the first table is printed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import describe

from analysis.report.contents import contents
from analysis.report.found import find
from analysis.report.markdown import markdown
from analysis.report.page import page

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from browser import Browser, chromium
from report_runs import sweep

ROUNDS = 5
CLOCK = "(() => {{ const t = performance.now(); {}; document.body.offsetHeight; return performance.now() - t; }})()"
STEPS = {
    "sort 200 rows shown": "document.querySelectorAll('button[data-sort]')[5].click()",
    "filter to a quarter": "document.getElementById('filter').value = 'predictor=markov'; "
    "document.getElementById('state').dispatchEvent(new Event('change'))",
    "filter back": "document.getElementById('filter').value = ''; "
    "document.getElementById('state').dispatchEvent(new Event('change'))",
}


def timed(said: str, work: Callable[[], object]) -> object:
    began = time.perf_counter()
    made = work()
    print(f"| {said} | {time.perf_counter() - began:.1f} s |")
    return made


def in_browser(browser: Browser, path: Path) -> dict[str, float]:
    """Milliseconds of one round."""
    browser.open(path)
    told = {"open": float(browser.ask("document.documentElement.dataset.ready"))}
    for name, code in STEPS.items():
        told[name] = browser.ask(CLOCK.format(code))
    browser.ask("document.querySelector('#more button').click()")
    told["sort all rows shown"] = browser.ask(CLOCK.format(STEPS["sort 200 rows shown"]))
    browser.ask("void (window.began = performance.now(), location.hash = '#figures')")
    browser.wait("document.getElementById('charts').dataset.drawn")
    told["figures, with the library"] = browser.ask("performance.now() - began")
    return told


def main() -> None:
    n = int(sys.argv[1]) if sys.argv[1:] else 1000
    print(f"{describe()}; {n} runs\n\n| step | time |\n|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = sweep(Path(made) / "20260102-030405-1", n)
        found = timed("find and read", lambda: find(str(folder), folder))
        of = contents(found)
        timed("compare, with charts", lambda: (of.groups, of.marks, of.charts))
        text = str(timed("page", lambda: page(of, "")))
        timed("Markdown", lambda: markdown(of))
        print(f"\nreport.html: {len(text.encode()):,} bytes")
        path = Path(made) / "report.html"
        path.write_text(text)
        if program := chromium():
            with Browser(program) as browser:
                browser.size(1400)
                rounds = [in_browser(browser, path) for _ in range(ROUNDS)]
            print("\n| in the browser | ms |\n|---|---|")
            for name in rounds[0]:
                print(f"| {name} | {min(one[name] for one in rounds):.0f} |")


if __name__ == "__main__":
    main()
