"""What the page says of one run, in steps: words, texts, tables, pictures, so that a budget can cut from the end.

It knows no markup but that of the Markdown which stages write, and nothing of how runs compare.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from analysis.report.commands import command
from analysis.report.labels import clock
from analysis.report.packed import plain
from analysis.report.runs import Run

MOST_ROWS = 200  # of a table that the page shows
MOST_LOG = 20_000  # characters of the end of a log
MOST_WARNINGS = 200
LARGEST_PICTURE = 600_000  # bytes
WARNING = re.compile(r"^(?:\S+ \S+ )?(?:WARNING|ERROR|CRITICAL)\b:? ?(.*)$")


def nothing(run: Run) -> dict[str, Any]:
    """What a run has on a page that is full."""
    texts = dict.fromkeys(("message", "typed_in", "log", "left_out"), "")
    lists: dict[str, list[Any]] = {
        name: []
        for name in ("warnings", "notes", "pages", "lineage", "has_common", "tables", "pictures")
    }
    said = {"folder": str(run.folder), "version": run.version[:100], "clock": clock(run) or ""}
    return {**said, **texts, **lists, "command": None, "metrics": {}, "settings": {}}


def words(run: Run, common: Sequence[str]) -> dict[str, Any]:
    """What was told and found; settings that all runs share are said once, elsewhere."""
    shared = set(common)
    return {
        "message": run.message,
        "command": command(run),
        "typed_in": run.typed_in,
        "warnings": warnings(run.log)[:MOST_WARNINGS],
        "notes": [*run.notes, *(f"table {name}: {why}" for name, why in run.failures.items())],
        "metrics": plain(dict(run.metrics)),
        "lineage": [[name, _made_from(told)] for name, told in run.lineage.items()],
        "settings": {name: plain(v) for name, v in run.settings.items() if name not in shared},
        "has_common": [name for name in common if name in run.settings or name in run.choices],
    }


def texts(run: Run) -> dict[str, Any]:
    pages = [[name, markup(text)] for name, text in run.pages.items() if text]
    return {"pages": pages, "log": run.log[-MOST_LOG:]}


def tables(run: Run) -> dict[str, Any]:
    """Those that cannot be read say why."""
    found: list[dict[str, Any]] = []
    for name in run.tables:
        frame = run.table(name)
        if frame is not None:
            found.append({"name": name, "of": len(frame), **_rows(frame.head(MOST_ROWS))})
        elif why := run.failures.get(name):
            found.append({"name": name, "of": 0, "columns": [], "rows": [], "why": why})
    return {"tables": found}


def pictures(run: Run) -> dict[str, Any]:
    """As drawings (text, which packs well), or as they are."""
    found = []
    for name, path in run.pictures.items():
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if len(content) > LARGEST_PICTURE:
            continue
        if path.suffix == ".svg":
            found.append({"name": name, "svg": content.decode(errors="replace")})
        else:
            found.append({"name": name, "png": base64.b64encode(content).decode()})
    return {"pictures": found}


def warnings(log: str) -> list[str]:
    """Lines of a log that say what they are."""
    found = [match.group(1) for line in log.splitlines() if (match := WARNING.match(line))]
    return list(dict.fromkeys(line for line in found if line))


@functools.cache
def _renderer() -> MarkdownIt:
    """Markup in the text is shown, not obeyed; nothing is fetched."""
    return (
        MarkdownIt("commonmark", {"html": False})
        .enable("table")
        .disable(["image", "html_block", "html_inline"])
    )


def markup(text: str) -> str:
    return str(_renderer().render(text))


def _made_from(told: Any) -> str:
    upstream = told.get("upstream") if isinstance(told, dict) else None
    above = upstream if isinstance(upstream, dict) else {}
    return ", ".join(f"{kind}/{key}" for kind, key in above.items())


def _rows(frame: pd.DataFrame) -> dict[str, Any]:
    rows = json.loads(
        frame.replace([np.inf, -np.inf], np.nan).to_json(orient="split", default_handler=str)
    )
    return {
        "columns": [str(name) for name in rows["columns"]],
        "rows": [[plain(value) for value in row] for row in rows["data"]],
    }
