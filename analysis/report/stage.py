"""Stage `report`: one page that compares runs, wherever they wrote; the same as Markdown and as a table."""

from __future__ import annotations

import logging
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import ListConfig, OmegaConf

from analysis.report.contents import Contents, contents
from analysis.report.found import find
from analysis.report.labels import clock
from analysis.report.listing import row_of
from analysis.report.markdown import markdown
from analysis.report.page import page
from analysis.report.runs import FAILED, INTERRUPTED, UNFINISHED
from prefetch import __version__
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.runs.outputs import Outputs

log = logging.getLogger(__name__)
PAGE, TEXT = "report.html", "report.md"
FIXED = ("stage", "run", "state", "mark", "times", "began", "took_s")
FORMULA = re.compile(
    r"\s*[=+@\t\r\uff1d\uff0b\uff0d\uff20-]"
)  # where a spreadsheet begins to compute


def run(cfg: Config, store: Store, outputs: Outputs) -> dict[str, float]:
    """Runs in; report.html, report.md and runs.csv out."""
    began = time.perf_counter()
    asked = cfg.report.runs
    found = find(
        OmegaConf.to_container(asked) if isinstance(asked, ListConfig) else asked, store.root
    )
    of = contents(found, cfg.report.title)
    made = page(of, _said(found.asked))
    (outputs.folder / PAGE).write_text(made, encoding="utf-8", errors="replace")
    (outputs.folder / TEXT).write_text(markdown(of), encoding="utf-8", errors="replace")
    if of.runs:
        outputs.table("runs", frame(of))
    for one in found.unreadable:
        log.warning("%s: cannot be read, and is named on the page (%s)", one.place, one.why)
    for note in of.notes():
        log.info(note)
    metrics = _metrics(of, (outputs.folder / PAGE), time.perf_counter() - began)
    outputs.metrics(metrics)
    print(of.summary())
    print(outputs.folder / PAGE)
    return metrics


def frame(of: Contents) -> pd.DataFrame:
    """A row per run, every column."""
    names = dict.fromkeys(FIXED)
    for column in of.columns:
        name = safe(column.name)
        while name in names:
            name = f"{name} ({column.kind})"
        names[name] = None
    rows = []
    for run, mark in zip(of.runs, of.marks, strict=True):
        told = [run.stage, run.name, run.state, mark, clock(run) or "", run.began, run.seconds]
        rows.append([safe(value) for value in (*told, *row_of(of, run))])
    table = pd.DataFrame(rows, columns=list(names))
    kinds = zip(list(names)[len(FIXED) :], of.columns, strict=True)
    return table.astype({name: "string" for name, column in kinds if column.kind == "setting"})


def safe(value: Any) -> Any:
    """A text that a spreadsheet leaves alone, and that every file can hold."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace").decode()
    return f"'{text}" if FORMULA.match(text) else text


def _said(asked: str) -> str:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    return f"Made by expert-prefetch {__version__} on {now} UTC from report.runs={asked}."


def _metrics(of: Contents, path: Path, seconds: float) -> dict[str, float]:
    states = [run.state for run in of.runs]
    return {
        "runs": len(of.runs),
        "failed": states.count(FAILED),
        "interrupted": states.count(INTERRUPTED),
        "unfinished": states.count(UNFINISHED),
        "unreadable": len(of.found.unreadable),
        "found_twice": of.found.twice,
        "gone": of.found.gone,
        "seed_groups": sum(len(group.seeds) > 1 for group in of.groups),
        "charts": len(of.charts),
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 3),
    }
