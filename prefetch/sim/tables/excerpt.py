"""Some steps of a run, as a run of their own: a workload and a cell cut to them.

It runs nothing. S steps, L layers, V = S * L events, A accesses, R rows of the trace.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

import numpy as np

from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import Told
from prefetch.sim.tables.cell import Cell
from prefetch.sim.workload import Workload
from prefetch.trace.routing import RoutingTrace


def work_of(work: Workload, first: int, last: int) -> Workload:
    """The steps from `first` to before `last`; what comes later is not known to anybody."""
    n_layers = work.card.n_layers
    start_V = work.start_V[first * n_layers : last * n_layers + 1]
    row_start_S = work.row_start_S[first : last + 1]
    accesses, rows = slice(start_V[0], start_V[-1]), slice(row_start_S[0], row_start_S[-1])
    per_step = ("decode_S", "prefill_S", "context_S", "pairs_S", "request_S")
    return dataclasses.replace(
        work,
        ids_A=work.ids_A[accesses],
        tokens_A=work.tokens_A[accesses],
        start_V=start_V - start_V[0],
        rows_R=work.rows_R[rows],
        row_start_S=row_start_S - row_start_S[0],
        **{name: getattr(work, name)[first:last] for name in per_step},
    )


def cell_of(cell: Cell, first: int, last: int) -> Cell:
    """The same cell for those steps: its costs per step, its guesses and what its policy is told per event."""
    n_layers = len(cell.machine.bytes_L)
    machine = cell.machine._replace(before_S=cell.machine.before_S[first:last])
    guesses, told, events = cell.guesses, cell.told, slice(first * n_layers, last * n_layers)
    if guesses is not None:
        guesses = Guesses(guesses.ids_VW[events], guesses.score_VW[events], guesses.ahead)
    told = Told(told.row_VE[events], told.kind_V[events], told.ahead)
    return dataclasses.replace(cell, machine=machine, guesses=guesses, told=told)


def first_requests(
    trace: RoutingTrace, most_steps: int, schedule: Callable[[RoutingTrace], Workload]
) -> RoutingTrace:
    """The first whole requests that are run in so many steps at most; of a longer first one, so many of its steps."""
    edges = [*trace.starts_R.tolist(), trace.n_tokens]

    def is_short(n: int) -> bool:
        return schedule(trace.rows(slice(0, edges[n]))).n_steps <= most_steps

    most = 1
    while most < len(edges) - 1 and is_short(most):
        most = min(2 * most, len(edges) - 1)
    n = bisect.bisect_left(range(1, most + 1), True, key=lambda n: not is_short(n))
    if n:
        return trace.rows(slice(0, edges[n]))
    first = trace.rows(slice(0, edges[1]))
    work = schedule(first)
    return first.rows(np.sort(work.rows_R[: work.row_start_S[most_steps]]))
