"""One HTML file that needs nothing else: template, style, scripts and data put together under a strict policy.

Only scripts whose sums stand in the page run, nothing is fetched, and data can never become markup. What does not fit
into the budget is left out from the end (pictures, then tables, texts, words, of the oldest runs first) and said in the
run's view; where even the table of runs is too long, the oldest runs are left out, which the page says.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from analysis.report import details, library
from analysis.report.charts import times_are
from analysis.report.contents import Contents
from analysis.report.listing import index
from analysis.report.packed import packed, packed_json, plain, script_json, short

MOST_BYTES = 5_800_000  # of the page
SCRIPTS = ("page.js", "table.js", "run.js", "charts.js", "explore.js")
SPARE = 160  # bytes per run, for saying that something was left out
FULL = "The page is full: what is missing here (tables, pictures, texts) lies in the run's folder."
SLOT = re.compile(r"\{\{(\w+)\}\}")


def page(of: Contents, said: str, *, most_bytes: int = MOST_BYTES) -> str:
    """`said` is the sentence on how it was made."""
    template, empty = _file("page.html"), _bytes(_slots(of.newest(0), said))
    while True:
        slots = _slots(of, said)
        left = most_bytes - _bytes(slots) - _least(of)
        if left >= 0 or len(of.runs) < 2:
            slots["details"] = "\n".join(_details(of, left))
            return _filled(template, slots)
        share = 0.95 * (most_bytes - empty) / (most_bytes - left - empty)
        of = of.newest(max(1, min(len(of.runs) - 1, int(share * len(of.runs)))))


def _slots(of: Contents, said: str) -> dict[str, str]:
    """Everything but what the runs' own views show."""
    script, code = _own_script(), _library()
    return {
        "title": html.escape(of.title),
        "summary": html.escape(of.summary()),
        "policy": _policy(script, code),
        "style": _file("page.css"),
        "about": _about(said),
        "data": script_json(index(of)),
        "charts": packed_json(_charts(of)),
        "library": _packed_library(),
        "script": script,
        "details": "",
    }


@functools.cache
def _library() -> str:
    return library.script()


@functools.cache
def _packed_library() -> str:
    return packed(_library())


def _bytes(slots: dict[str, str]) -> int:
    return len(_filled(_file("page.html"), slots).encode("utf-8", "replace"))


def _filled(template: str, slots: dict[str, str]) -> str:
    """In one pass: what stands in a slot is never read as a slot."""
    return SLOT.sub(lambda found: slots[found.group(1)], template)


def _file(name: str) -> str:
    return files("analysis.report").joinpath(name).read_text(encoding="utf-8").strip()


def _own_script() -> str:
    parts = "\n".join(_file(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\nbegin();\n}})();'


def _policy(*scripts: str) -> str:
    sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in sums)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _charts(of: Contents) -> list[dict[str, Any]]:
    made = []
    for chart in of.charts:
        told = asdict(chart) | {"times": times_are(of.runs, chart)}
        made.append(plain(told))
    return made


def _about(said: str) -> str:
    notice = f"plotly {library.version()} (its script draws the figures), MIT licence"
    return (
        f"<p>{html.escape(said)}</p>\n<p>It holds everything that it shows and fetches nothing. Times that are "
        "called simulated come from the simulator; measured ones from a device.</p>\n"
        f"<details><summary>{html.escape(notice)}</summary><pre>{html.escape(library.licence())}</pre></details>"
    )


def _details(of: Contents, left: int) -> list[str]:
    """A packed script per run: words of all, texts, tables, pictures, of the newest as far as there is room.

    `left` is what may be spent beside the least that each is given.
    """
    common = [name for name, value in of.compared.common if short(value) == value]
    contents = [details.nothing(run) for run in of.runs]
    parts = [_part(at, told) for at, told in enumerate(contents)]
    for has, read in (
        (bool, functools.partial(details.words, common=common)),
        (lambda run: run.pages or run.log, details.texts),
        (lambda run: run.tables, details.tables),
        (lambda run: run.pictures, details.pictures),
    ):
        for at in filter(lambda at: has(of.runs[at]), reversed(range(len(of.runs)))):
            more = contents[at] | read(of.runs[at]) if left > 0 else None
            part = _part(at, more) if more else parts[at]
            if more is not None and (grown := _size(part) - _size(parts[at])) <= left:
                contents[at], parts[at], left = more, part, left - grown
            else:
                contents[at]["left_out"] = FULL
    return [_part(at, told) for at, told in enumerate(contents)]


def _least(of: Contents) -> int:
    """Bytes that every run is given beside its row: where it lies, and that more was left out."""
    return sum(_size(_part(at, details.nothing(run))) + SPARE for at, run in enumerate(of.runs))


def _part(at: int, told: dict[str, Any]) -> str:
    return f'<script id="packed-run-{at}" type="application/gzip">{packed_json(told)}</script>'


def _size(part: str) -> int:
    return len(part) + 1
