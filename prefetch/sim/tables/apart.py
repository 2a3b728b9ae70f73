"""A cell's row from nothing but what it depends on, for a process that has no bench. It knows no table, no cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefetch.errors import PrefetchError
from prefetch.sim.limits.bounds import Bound, bound_of
from prefetch.sim.tables.cell import REFUSALS, Cell, refused_row
from prefetch.sim.tables.intervals import Units
from prefetch.sim.tables.rows import Beside, row_of
from prefetch.sim.workload import Workload

Row = dict[str, Any]


def unless_refused(cell: Cell, run: Callable[[], Row], *, must_run: bool) -> Row:
    """Of a cell that cannot run, why, unless it must."""
    try:
        return run()
    except REFUSALS as reason:
        if must_run:
            raise
        return refused_row(cell.names, reason)


def bound_key(cell: Cell) -> tuple[Any, ...]:
    """Cells of one workload that are alike in this share a bound."""
    machine, start = cell.machine, cell.wished.tobytes()
    return (cell.budget.room_G, machine.miss_way, machine.landing, cell.streams, start)


def bound_apart(cell: Cell, work: Workload, latency_ns: int) -> Bound | PrefetchError:
    """Or why there is none: that is for each cell to say."""
    try:
        return bound_of(cell, work, latency_ns)
    except REFUSALS as reason:
        return reason


def row_apart(
    cell: Cell,
    work: Workload,
    full_ns: float,
    units: Units,
    seed: int,
    bound: Bound | PrefetchError,
    *,
    must_run: bool = False,
) -> Row:
    """As a bench makes it, with the simulated clock."""

    def run() -> Row:
        timed = cell.run(work)
        if isinstance(bound, PrefetchError):
            raise bound
        return row_of(cell, work, timed, Beside(full_ns, units, seed, bound))

    return unless_refused(cell, run, must_run=must_run)
