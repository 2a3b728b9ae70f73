"""Stage `evaluate`: what guesses are worth: policies x predictors x capacities x horizons on one workload.

Every table also shows, at the same capacity: no prefetch, the optimum, perfect guesses, and what people use today.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.progress import Progress
from prefetch.sim.engines.compiled import engine
from prefetch.sim.limits.curves import hit_rate_curves
from prefetch.sim.tables import grid, summary
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell, Refused, refused_row
from prefetch.sim.tables.needed import MOST_STEPS, required_recall
from prefetch.sim.tables.protocols import in_words, protocols, show
from prefetch.sim.tables.sweep import Job, Kept, run_all
from prefetch.sim.tables.timeline import timeline_of, write_chrome_trace

log = logging.getLogger(__name__)
# over the size of the cache, by a tracker
DRAWN = ("hit_rate", "tpot_ms", "slowdown", "memory_savings")


def run(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """A tidy row per cell, the warnings, and the headline numbers of the cell that was chosen at the root."""
    check_grid(cfg)
    bench, kept = Bench(cfg, store), Kept(store.root)
    cells = list(grid.cells(bench))
    main = int(str(summary.chosen_row(bench, pd.DataFrame([one.names for one in cells])).name))
    if isinstance(ran := cells[main], Refused):
        raise ran.reason
    with ThreadPoolExecutor(1) as aside:
        timeline = aside.submit(
            timeline_of if bench.is_simulated else _no_timeline, ran, bench.work
        )
        table = _table(bench, cells, main, kept)
    outputs.table("results", table)
    sizes = table[table.way == summary.CURVE]
    if len(sizes):
        sizes = sizes[["capacity", *DRAWN]].astype({"capacity": float})
        outputs.curve("size", sizes, x="capacity")
    chosen = table.iloc[main]
    needed = _needed(bench, chosen, kept)
    if len(needed):
        outputs.table("required_recall", needed)
        drawn = needed[["recall", "bandwidth_factor", "tpot_ms"]]
        outputs.curve(
            "required", drawn.rename(columns={"bandwidth_factor": "link"}), "recall", ("link",)
        )
    published = _protocols(bench, outputs)
    metrics = summary.headline(table, chosen, needed)
    outputs.metrics(metrics)
    told = list(summary.warnings(bench, table, chosen))
    page = summary.summary(bench, table, needed, told) + in_words(published)
    (outputs.folder / "summary.md").write_text(page)
    shown = timeline.result()
    if shown is not None:
        write_chrome_trace(outputs.folder / "timeline.json", shown, summary.source(bench))
    if cfg.evaluate.figures:
        from prefetch.sim.tables.gallery import draw_all  # matplotlib: slow, and not everyone draws

        curves = _curves(bench, kept, outputs)
        draw_all(bench, outputs, table, needed, curves, published, shown)
    if bench.clock is not None:
        bench.clock.finished()
    summary.show(bench, table)
    show(published)
    for text in told:
        log.warning(text)
    return metrics


def _no_timeline(*_: Any) -> None:
    """Of a device: its spans are not recorded."""


def check_grid(cfg: Config) -> None:
    """A list that is given says something: an empty one is no default, and memory is one capacity."""
    for name in ("policies", "predictors", "capacities", "horizons"):
        values = getattr(cfg.evaluate, name)
        if values is not None and not len(values):
            raise ConfigError(
                f"evaluate.{name}=[]: names nothing to evaluate; give at least one, or evaluate.{name}=null for "
                "what is chosen at the root"
            )
    horizons = cfg.evaluate.horizons or []
    if any(horizon < 1 for horizon in horizons):
        raise ConfigError(f"evaluate.horizons={list(horizons)}: each must be at least 1")
    if cfg.memory is not None and cfg.evaluate.capacities is not None:
        raise ConfigError(
            f"memory={cfg.memory} and evaluate.capacities={list(cfg.evaluate.capacities)}: the memory leaves one "
            "capacity; give one of the two"
        )
    if cfg.evaluate.workers is not None and cfg.evaluate.workers < 1:
        raise ConfigError(f"evaluate.workers={cfg.evaluate.workers}: must be at least 1")


def _table(bench: Bench, cells: Sequence[Cell | Refused], main: int, kept: Kept) -> pd.DataFrame:
    """A row per cell, in their order. Only the main one must run."""
    able = {i: cell for i, cell in enumerate(cells) if isinstance(cell, Cell)}
    jobs = [bench.job(cell, must_run=i == main) for i, cell in able.items()]
    if bench.is_simulated:
        for cell in able.values():
            engine(cell.policy.rules, "timed")  # made once, before several ask for it together
        rows = run_all(jobs, kept, workers=bench.cfg.evaluate.workers, cluster=bench.cluster)
    else:
        rows = _measured(bench, jobs)
    found = dict(zip(able, rows, strict=True))
    for i, one in enumerate(cells):
        if isinstance(one, Refused):
            found[i] = refused_row(one.names, one.reason)
    # columns as they stand in a row that ran, whoever is first
    table = pd.DataFrame([found[i] for i in range(len(cells))], columns=[*found[main]])
    table["fits"] = table.fits.astype("boolean")
    table = table.fillna({"bound": "", "interval_over": ""})
    table["gap_closed"] = summary.gap_closed(table)
    return table


def _measured(bench: Bench, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One at a time, each kept as soon as it was measured."""
    told = len(jobs), bench.simulator.rounds, bench.work.n_steps
    log.info("measuring %d cells, %d times each: %d steps a time", *told)
    rows = list[dict[str, Any]]()
    with Progress("measuring", len(jobs), "cells") as progress:
        for job in jobs:
            rows.append(dict(job.run()))
            progress.advance()
    return rows


def _protocols(bench: Bench, outputs: Any) -> pd.DataFrame:
    if not bench.cfg.evaluate.protocols:
        return pd.DataFrame()
    if not bench.is_simulated or bench.simulator.misses != "wait":
        log.info(
            "no published protocols: they are compared with simulated caches whose misses wait"
        )
        return pd.DataFrame()
    found = protocols(bench)
    if len(found):
        outputs.table("protocols", found)
    return found


def _needed(bench: Bench, chosen: pd.Series, kept: Kept) -> pd.DataFrame:
    if not bench.cfg.evaluate.required_recall:
        return pd.DataFrame()
    if not bench.is_simulated:
        log.info("no required recall: its cells are simulated, simulator.clock=%s", "device")
        return pd.DataFrame()
    if bench.simulator.misses != "wait":
        log.info(
            "no required recall: with simulator.misses=%s a cache fills by guesses alone, or by uploads",
            bench.simulator.misses,
        )
        return pd.DataFrame()
    part = bench.beginning(MOST_STEPS)
    if not (part.work.prefill_S == 0).any():
        log.info("no required recall: steps with prompts are not guessed, and there are no others")
        return pd.DataFrame()
    names = {name: chosen[name] for name in ("policy", "capacity", "horizon")}
    of_steps = bench.work.n_steps
    return required_recall(part, names, kept).assign(of_steps=of_steps)


def _curves(bench: Bench, kept: Kept, outputs: Any) -> pd.DataFrame:
    curves = hit_rate_curves(bench, kept)
    if len(curves):
        outputs.table("hit_rate_curves", curves)
        outputs.curve("cache", curves[["share", "lru", "optimum"]], x="share")
    else:
        misses = bench.simulator.misses
        log.info(
            "no curves of LRU and the optimum: with simulator.misses=%s caches fill otherwise",
            misses,
        )
    return curves
