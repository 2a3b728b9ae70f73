"""One HTML file that needs nothing else: template, style, scripts and data put together under a strict policy.

Only scripts whose sums stand in the page run, nothing is fetched, and data can never become markup. What does not fit
into the budget is left out from the end (pictures, then tables, of the oldest runs first) and said in the run's view.
"""

from __future__ import annotations

import base64
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
from analysis.report.packed import packed, packed_json, plain, script_json

MOST_BYTES = 5_800_000  # of the page
SCRIPTS = ("page.js", "table.js", "run.js", "charts.js", "explore.js")
SPARE = 300  # bytes per run, for saying that something was left out
FULL = "The page is full: what is missing here (tables, pictures) lies in the run's folder."
SLOT = re.compile(r"\{\{(\w+)\}\}")


def page(of: Contents, said: str, *, most_bytes: int = MOST_BYTES) -> str:
    """`said` is the sentence on how it was made."""
    script = _own_script()
    code = library.script()
    slots = {
        "title": html.escape(of.title),
        "summary": html.escape(of.summary()),
        "policy": _policy(script, code),
        "style": _file("page.css"),
        "about": _about(said),
        "data": script_json(index(of)),
        "charts": packed_json(_charts(of)),
        "library": packed(code),
        "script": script,
        "details": "",
    }
    template = _file("page.html")
    left = most_bytes - len(_filled(template, slots).encode("utf-8", "replace"))
    slots["details"] = "\n".join(_details(of, left))
    return _filled(template, slots)


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
    """A packed script per run: words of all, then tables, then pictures, of the newest as far as there is room."""
    common = [name for name, _ in of.compared.common]
    contents = [details.words(run, common) for run in of.runs]
    parts = [_part(at, told) for at, told in enumerate(contents)]
    left -= sum(_size(part) + SPARE for part in parts)
    for name, read in (("tables", details.tables), ("pictures", details.pictures)):
        for at in reversed(range(len(of.runs))):
            if not getattr(of.runs[at], name):
                continue
            more = contents[at] | {name: read(of.runs[at])} if left > 0 else contents[at]
            part = _part(at, more)
            if left > 0 and (grown := _size(part) - _size(parts[at])) <= left:
                contents[at], parts[at], left = more, part, left - grown
            else:
                contents[at]["left_out"] = FULL
    return [_part(at, told) for at, told in enumerate(contents)]


def _part(at: int, told: dict[str, Any]) -> str:
    return f'<script id="packed-run-{at}" type="application/gzip">{packed_json(told)}</script>'


def _size(part: str) -> int:
    return len(part) + 1
