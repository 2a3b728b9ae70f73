"""A trace from wherever it stands (memory, a reader, its folder) as blocks of whole requests. It knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefetch.trace.parquet import TraceReader, wide_columns
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.stretch import Stretch

BLOCK_ROWS = 1 << 16
Traceable = RoutingTrace | TraceReader | Path | str  # what a notebook may hand to whoever reads


def blocks_of(
    trace: Traceable, *recorded: str, max_rows: int = BLOCK_ROWS
) -> Iterator[RoutingTrace]:
    if isinstance(trace, RoutingTrace):
        yield from _cut(trace, max_rows)
    else:
        reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
        yield from reader.batches(*recorded, max_rows=max_rows)


def numbered(
    trace: Traceable, *recorded: str, max_rows: int = BLOCK_ROWS
) -> Iterator[tuple[int, RoutingTrace]]:
    """The same, each block with where its first row stands in the whole trace."""
    if isinstance(trace, Stretch):
        yield from trace.numbered(*recorded, max_rows=max_rows)
        return
    first = 0
    for block in blocks_of(trace, *recorded, max_rows=max_rows):
        yield first, block
        first += block.n_tokens


def columns_of(trace: Traceable) -> tuple[str, ...]:
    """What was recorded beside the choices."""
    if isinstance(trace, RoutingTrace):
        return tuple(wide_columns(trace))
    return tuple((trace if isinstance(trace, TraceReader) else TraceReader(trace)).columns)


def _cut(trace: RoutingTrace, max_rows: int) -> Iterator[RoutingTrace]:
    """At the request boundaries that come next after every `max_rows` rows."""
    starts, first = trace.starts_R, 0
    while first < trace.n_tokens:
        later = starts[starts >= first + max_rows]
        stop = int(later[0]) if len(later) else trace.n_tokens
        yield trace.rows(slice(first, stop))
        first = stop
