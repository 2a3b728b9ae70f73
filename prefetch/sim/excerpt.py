"""Some steps of a run, as a run of their own: a workload and a cell cut to them.

It runs nothing. S steps, L layers, V = S * L events, A accesses, R rows of the trace.
"""

from __future__ import annotations

import dataclasses

from prefetch.sim.cell import Cell
from prefetch.sim.machine import Guesses
from prefetch.sim.pool import Told
from prefetch.sim.workload import Workload


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


def first_requests(work: Workload, most_steps: int) -> int:
    """How many steps whole requests from the beginning take, at most so many; of a longer first one, as many."""
    if work.n_steps <= most_steps:
        return work.n_steps
    ends = [
        step
        for step in range(1, most_steps + 1)
        if work.request_S[step] != work.request_S[step - 1]
    ]
    return max(ends, default=most_steps)
