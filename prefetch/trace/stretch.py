"""Some of a trace's requests, those that begin in a stretch of its rows, read without reading the rest.

Stretches that cover all rows cover all requests, each once: so that a trace can be shared out. It knows no cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace


class Stretch(TraceReader):
    """A reader of the requests whose first row stands in [start, stop); `row_of_first` of them is where they begin."""

    def __init__(self, folder: Path | str, start: int, stop: int) -> None:
        super().__init__(folder)
        self.start, self.stop = start, stop
        # the row before tells whether one begins here
        self.first_row = max(0, start - 1)

    def numbered(
        self, *recorded: str, max_rows: int = 1 << 16
    ) -> Iterator[tuple[int, RoutingTrace]]:
        """Blocks of whole requests, each with where its first row stands in the whole trace."""
        row: int | None = None
        for block in super().batches(*recorded, max_rows=max_rows):
            row = self.row_of_first if row is None else row
            first_R = block.starts_R + row
            wanted = np.flatnonzero((first_R >= self.start) & (first_R < self.stop))
            if len(wanted):
                begin = int(block.starts_R[wanted[0]])
                after = int(wanted[-1]) + 1
                end = int(block.starts_R[after]) if after < len(first_R) else block.n_tokens
                yield row + begin, block.rows(slice(begin, end))
            if first_R[-1] >= self.stop:
                return
            row += block.n_tokens

    def batches(self, *recorded: str, max_rows: int = 1 << 16) -> Iterator[RoutingTrace]:
        for _, block in self.numbered(*recorded, max_rows=max_rows):
            yield block


def cut(reader: TraceReader, n: int) -> list[tuple[int, int]]:
    """Bounds of n stretches of about as many rows."""
    edges = np.linspace(0, reader.n_tokens, n + 1).astype(int).tolist()
    return list(pairwise(edges))
