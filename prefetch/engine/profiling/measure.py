"""Runs the grid: a row for every cell, part, implementation and direction, whether it could run or not.

It says nothing about what it found. What is predicted not to fit into memory, or into the time that is left, is not
run: its row says so, with the prediction.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from prefetch.engine.profiling.grid import Cell, Grid
from prefetch.engine.profiling.memory import peak_bytes
from prefetch.engine.profiling.operations import (
    DENSE,
    N_OPERATIONS,
    OURS,
    PRODUCT,
    Operands,
    Operation,
    operands,
    operations,
)
from prefetch.engine.profiling.rows import with_ratios
from prefetch.engine.profiling.timing import Call, Clock, Times
from prefetch.engine.profiling.work import BACKWARD, FORWARD, LAYER, Roofs, bound_ns, work_of
from prefetch.kernels.dense import seats_of
from prefetch.progress import Progress

log = logging.getLogger(__name__)
RAN = "ran"
NO_MEMORY, NO_TIME, REFUSED = "not run: memory", "not run: time", "refused"
WHILE_RUNNING = f"{NO_MEMORY} (it ended while running)"
ROW_SHARE = 30  # a row may take this part of the time of the grid
POOL_SHARE = 4  # experts that are kept between cells take at most this part of the free memory
TOUCHES = (
    4  # bytes moved per byte of a large tensor: written and read, to see its memory and to time it
)
Row = dict[str, Any]


@dataclass
class Bench:
    """What every row needs: how to time, the roofs, the memory and the time that may be used."""

    grid: Grid
    clock: Clock
    roofs: Roofs
    room_bytes: int
    seed: int
    kept: dict[Any, Tensor] = field(default_factory=dict)  # drawn experts, by their sizes
    counts: dict[Cell, Tensor] = field(default_factory=dict)  # choices of every expert
    end_s: float = 0.0  # on the monotonic clock

    def __post_init__(self) -> None:
        self.end_s = time.monotonic() + self.grid.seconds

    def pool(self, cell: Cell) -> Tensor:
        """Cells of the same sizes share their experts."""
        key = cell.experts, cell.layout
        if key not in self.kept:
            held = sum(pool.nbytes for pool in self.kept.values())
            most = self.clock.place.free_bytes // POOL_SHARE
            if held + cell.experts * cell.layout.bytes > most:
                self.kept.clear()
            self.kept[key] = cell.layout.random(cell.experts, self.seed, self.clock.place.device)
        return self.kept[key]

    def room(self, cell: Cell) -> int:
        """What the experts leave of the memory."""
        return self.room_bytes - cell.experts * cell.layout.bytes


def measure(bench: Bench) -> pd.DataFrame:
    """The table. All forward rows come first: when time runs out, gradients and large steps are what is missing."""
    grid, rows = bench.grid, list[Row]()
    directions = (FORWARD, BACKWARD) if grid.backward else (FORWARD,)
    total = len(grid.cells) * sum(N_OPERATIONS[direction] for direction in directions)
    with Progress("timing", total, "rows") as progress:
        for direction, cell in itertools.product(directions, grid.cells):
            for row in _cell(bench, cell, direction):
                rows.append(row)
                progress.advance()
    table = with_ratios(pd.DataFrame(rows))
    for reason in (NO_TIME, REFUSED):
        if n := int(table.status.str.startswith(reason).sum()):
            log.warning("%d of %d rows: %s; the table says which", n, len(table), reason)
    return table


def _cell(bench: Bench, cell: Cell, direction: str) -> Iterator[Row]:
    if bench.room(cell) <= 0:
        needed = cell.experts * cell.layout.bytes
        yield {**cell.fields, "part": LAYER, "implementation": OURS, "direction": direction,
               "status": NO_MEMORY, "predicted_bytes": needed}  # fmt: skip
        return
    of = operands(cell, bench.pool(cell), bench.grid.skew, bench.seed)
    bench.counts[cell] = of.counts_E
    rows, ready, expected = list[Row](), list[tuple[Row, Call]](), list[Tensor]()
    for one in operations(of, bench.grid.factor, direction):
        rows.append(_about(of, one, bench) | _first(one, cell, bench, expected))
        if rows[-1]["status"] != RAN:
            continue
        if direction == BACKWARD:  # what is kept for a gradient is large: one at a time
            _time([(rows[-1], one.make())], bench)
        else:
            ready.append((rows[-1], one.make()))
    _time(ready, bench)
    yield from rows


def _about(of: Operands, one: Operation, bench: Bench) -> Row:
    """Everything but times."""
    cell, counts_E = of.cell, of.counts_E
    n_distinct = int((counts_E > 0).sum())
    work = work_of(cell, one.part, one.direction, n_distinct)
    ns, by = bound_ns(work, bench.roofs, cell.dtype)
    row = {
        **cell.fields,
        "part": one.part,
        "implementation": one.implementation,
        "direction": one.direction,
        "status": RAN,
        "place": one.place,
        "path": of.path,
        "distinct_experts": n_distinct,
        "busiest_share": float(counts_E.max()) / (cell.tokens * cell.top_k),
        "bytes": work.bytes,
        "flops": work.flops,
        "bound_ns": ns,
        "bound_by": by,
        "predicted_bytes": one.predicted_bytes,
    }
    if one.implementation in (DENSE, PRODUCT):
        row["dropped_share"] = dropped_share(counts_E, cell, bench.grid.factor)
    return row


def _first(one: Operation, cell: Cell, bench: Bench, expected: list[Tensor]) -> Row:
    """The first call, for memory and numbers, or why there is none."""
    left_s = bench.end_s - time.monotonic()
    predicted = one.predicted_bytes or 0
    if predicted > bench.room(cell):
        return {"status": NO_MEMORY}
    if left_s <= TOUCHES * predicted / bench.roofs.read_bytes_per_s:
        return {"status": NO_TIME}
    try:
        return _looked_at(one, bench, expected)
    except torch.OutOfMemoryError:
        return {"status": WHILE_RUNNING}
    except Exception as error:  # compilers and libraries raise what they like; the other rows go on
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        is_memory = "can't allocate memory" in reason
        return {"status": WHILE_RUNNING if is_memory else f"{REFUSED}: {reason}"}


def _looked_at(one: Operation, bench: Bench, expected: list[Tensor]) -> Row:
    """A gradient's memory is that of both passes."""
    call: Call = (lambda: one.make()()) if one.direction == BACKWARD else one.make()
    peak, out = peak_bytes(call, bench.clock.place)
    is_layer = one.part == LAYER and one.direction == FORWARD
    return {"peak_bytes": peak, **(_deviation(one, out, expected) if is_layer else {})}


def _time(ready: Sequence[tuple[Row, Call]], bench: Bench) -> None:
    """Writes times into the rows; of what had no turn, that."""
    most_s = bench.grid.seconds / ROW_SHARE
    calls = [call for _, call in ready]
    found = bench.clock.together(calls, bench.grid.repeats, most_s, bench.end_s)
    for (row, _), times in zip(ready, found, strict=True):
        row |= {"status": NO_TIME} if times is None else _columns(times)


def _columns(times: Times) -> Row:
    return {
        f"{name}_ns": getattr(times, f"{name}_ns") for name in ("median", "p25", "p75", "fastest")
    } | {"calls": times.calls}


def _deviation(one: Operation, out: Tensor, expected: list[Tensor]) -> Row:
    """From ours, relative to the largest number: every implementation computes the same layer."""
    if one.implementation == OURS:
        expected.append(out.float())
        return {}
    if not expected:
        return {}
    scale = float(expected[0].abs().max())
    off = float((out.float() - expected[0]).abs().max())
    return {"deviation": off / scale if scale else off}


def dropped_share(counts_E: Tensor, cell: Cell, factor: float) -> float:
    """Of all choices, those that find no seat in the dense baseline."""
    seats = seats_of(cell.tokens, cell.top_k, cell.experts, factor)
    return float((counts_E - seats).clamp(min=0).sum()) / (cell.tokens * cell.top_k)
