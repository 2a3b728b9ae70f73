"""Which pictures an evaluation has: each is drawn from what was found, or the log says why not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from prefetch.progress import Progress
from prefetch.sim.tables import pictures
from prefetch.sim.tables.protocol_picture import published_protocols
from prefetch.sim.tables.summary import source
from prefetch.sim.tables.timeline import Timeline

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench

log = logging.getLogger(__name__)
Draw = Callable[[Path, str], list[Path]]


def draw_all(
    bench: Bench,
    outputs: Any,
    table: pd.DataFrame,
    needed: pd.DataFrame,
    curves: pd.DataFrame,
    published: pd.DataFrame,
    shown: Timeline | None,
) -> None:
    """Every picture as SVG and PNG, into the run's folder."""
    rows = pictures.prepared(table, bench.card.n_layers * bench.card.n_experts)
    todo = dict[str, Draw]()
    for name, (why_not, draw) in _pictures(bench, rows, needed, curves, published, shown).items():
        if why_not:
            log.info("no figure %s: %s", name, why_not)
        else:
            todo[name] = draw
    with Progress("drawing", len(todo), "pictures") as progress:
        for draw in todo.values():
            for path in draw(outputs.folder, f"{source(bench)}."):
                if path.suffix == ".png":
                    outputs.figure(path)
            progress.advance()


def _pictures(
    bench: Bench,
    rows: pd.DataFrame,
    needed: pd.DataFrame,
    curves: pd.DataFrame,
    published: pd.DataFrame,
    shown: Timeline | None,
) -> dict[str, tuple[str, Draw]]:
    """Why there is none, and how it is drawn."""
    full_ms, asked = bench.full_ns / 1e6, bench.cfg.evaluate.required_recall
    silent = "" if rows.tpot_ms.notna().any() else "no token is generated"
    alone = "" if len(bench.policies) > 1 else "there is one policy"
    unasked = "" if asked else "evaluate.required_recall=false"
    measured = "" if bench.is_simulated else "times are measured"
    n_entries = bench.card.n_layers * bench.card.n_experts
    return {
        "published_protocols": (
            "" if len(published) else "evaluate.protocols=false",
            lambda *to: published_protocols(published, n_entries, *to),
        ),
        "hit_rate_by_capacity": (
            "",
            lambda *to: pictures.hit_rate_by_capacity(rows, curves, *to),
        ),
        "tpot_by_capacity": (
            silent,
            lambda *to: pictures.tpot_by_capacity(rows, *to, full_ms=full_ms),
        ),
        "tpot_by_policy": (
            silent or alone,
            lambda *to: pictures.tpot_by_policy(rows, *to, full_ms=full_ms),
        ),
        "savings_and_slowdown": (silent, lambda *to: pictures.savings_and_slowdown(rows, *to)),
        "stall_breakdown": (silent, lambda *to: pictures.stall_breakdown(rows, *to)),
        "required_recall": (
            unasked or measured or silent or ("" if len(needed) else "every step has a prompt"),
            lambda *to: pictures.required_recall(needed, *to),
        ),
        "timeline": (
            measured or ("" if shown else "no token is generated"),
            lambda *to: pictures.timeline(shown, *to) if shown else [],
        ),
    }
