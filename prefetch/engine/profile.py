"""Stage `profile`: what a router and a MoE layer take on this device, beside what they could take at least.

It decides nothing. It leaves a table of every row, a page that says what follows from them, and this machine's numbers
for `hardware=measured`.
"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.profiling import limits as memory_limits
from prefetch.engine.profiling import utilisation
from prefetch.engine.profiling.device import Place, place_of, using
from prefetch.engine.profiling.grid import Grid, grid_of
from prefetch.engine.profiling.headline import headline
from prefetch.engine.profiling.machine import Measured, measured_machine, seal
from prefetch.engine.profiling.measure import Bench, measure
from prefetch.engine.profiling.memory import source_of
from prefetch.engine.profiling.page import Ran, page
from prefetch.engine.profiling.rows import Rows
from prefetch.engine.profiling.timing import Clock
from prefetch.engine.profiling.told import Told
from prefetch.engine.profiling.utilisation import Load
from prefetch.errors import PrefetchError
from prefetch.sim.memory import bytes_of

log = logging.getLogger(__name__)
PAGE = "router_baseline_profile.md"


def run(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """Tables, figures, the page, the sealed hardware, and the headline numbers."""
    place = place_of(cfg.profile.device)
    grid, room_bytes = grid_of(cfg.profile, place), _room(cfg, place)
    with using(cfg.profile.threads) as threads:
        log.info("timing on %s, %d threads, for at most %.0f s", place.name, threads, grid.seconds)
        clock = Clock(place)
        dtypes = tuple(dict.fromkeys(cell.dtype for cell in grid.cells))
        machine = measured_machine(clock, store.root, dtypes)
        bench = Bench(grid, clock, machine.roofs, room_bytes, cfg.seed)
        table = measure(bench)
    try:
        rows = Rows(table)
    except LookupError as error:
        outputs.table("results", table)
        hint = "pass smaller sizes, or more memory= or profile.seconds"
        raise PrefetchError(f"{error}; {hint}") from None
    drawn, traced = utilisation.drawn(bench.counts), utilisation.of_trace(cfg, store)
    loads = utilisation.table_of(drawn, traced, grid.factor)
    told = _told(rows, loads, bench, machine)
    log.info("sealed %s: hardware=measured uses it (%s)", seal(store, machine), machine.noise)
    return _write(cfg, outputs, told, machine, grid, [*(load for _, load in drawn), *traced])


def _told(rows: Rows, loads: pd.DataFrame, bench: Bench, machine: Measured) -> Told:
    grid = bench.grid
    return Told(
        rows=rows,
        limits=memory_limits.limits(grid.cells, bench.room_bytes, grid.factor),
        utilisation=loads,
        copy=machine.key_fit,
        copy_kind=machine.key_kind,
        room_bytes=bench.room_bytes,
        device=bench.clock.place.name,
        skew=grid.skew,
    )


def _write(
    cfg: Config, outputs: Any, told: Told, machine: Measured, grid: Grid, loads: list[Load]
) -> dict[str, float]:
    tables = {
        "results": told.rows.table,
        "copies": machine.copies_with_fit(),
        "memory_limits": told.limits,
        "utilisation": told.utilisation,
    }
    for name, table in tables.items():
        outputs.table(name, table)
    metrics = headline(told, machine)
    outputs.metrics(metrics)
    figures = _figures(cfg, outputs, told, machine, loads)
    ran = Ran(
        machine=machine.machine,
        roofs=machine.roofs,
        room_bytes=told.room_bytes,
        memory_source=source_of(place_of(cfg.profile.device)),
        command=shlex.join(["python", "scripts/run.py", *sys.argv[1:]]),
        skew=grid.skew,
        factor=grid.factor,
        figures=figures,
        noise=machine.noise,
        warning=machine.warning,
    )
    text = page(told, ran)
    (outputs.folder / PAGE).write_text(text)
    print(text)
    return metrics


def _figures(
    cfg: Config, outputs: Any, told: Told, machine: Measured, loads: list[Load]
) -> list[str]:
    if not cfg.profile.figures:
        return []
    from prefetch.engine.profiling.pictures import draw_all  # matplotlib is slow to import

    paths = draw_all(told, loads, machine.copies, machine.fits, Path(outputs.folder))
    shown = [path for path in paths if path.suffix == ".png"]
    for path in shown:
        outputs.figure(path)
    return [path.stem for path in shown]


def _room(cfg: Config, place: Place) -> int:
    """Of what is free when the run begins; on a CPU others need some of it too. `memory=` allows less."""
    room_bytes = place.free_bytes if place.is_gpu else place.free_bytes * 9 // 10
    return room_bytes if cfg.memory is None else min(room_bytes, bytes_of(cfg.memory))
