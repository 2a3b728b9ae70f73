"""Some requests of a trace, to learn from or to be asked about. Rows that were never run are not there.

It knows no predictor and no score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from prefetch.cluster.mapping import Cluster
from prefetch.cluster.worker import need_seen
from prefetch.errors import MissingData
from prefetch.predict.past import Past
from prefetch.scoring import Fold, Survey
from prefetch.trace.blocks import Traceable, blocks_of, columns_of
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader, concat
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.stretch import Stretch, cut

C = TypeVar("C")
RECORDED_BY = {
    "gate_inputs": "gate_inputs=true",
    "pre_attention": "pre_attention=true",
    "scores": "scores=all",
}
PART_ROWS = 1 << 12  # of a block: scores of all experts must fit beside it


class Lesson(NamedTuple):
    """What was known, and what came: a block of whole requests, of which `counted_T` rows belong to the part."""

    past: Past
    ids_TLK: NDArray[Any]
    counted_T: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Part:
    """The given requests of a trace; where a split is in time, only the rows from `first` up to `stop` count."""

    trace: Traceable
    requests: NDArray[np.int64]
    first: int = 0
    stop: int | None = None
    cluster: Cluster | None = None  # where whoever only counts may count; None = here

    @cached_property
    def card(self) -> ModelCard:
        if isinstance(self.trace, (RoutingTrace, TraceReader)):
            return self.trace.card
        return TraceReader(self.trace).card

    @cached_property
    def survey(self) -> Survey:
        """Of the whole trace."""
        return survey_of(self.trace)

    @property
    def columns(self) -> tuple[str, ...]:
        return columns_of(self.trace)

    def require(self, *columns: str) -> None:
        """Refuses by name what the trace has not recorded."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            asked = [f"source.{RECORDED_BY[name]}" for name in missing if name in RECORDED_BY]
            remedy = f"; {' '.join(asked)} records it, where the source can" if asked else ""
            raise MissingData(
                f"needs {', '.join(missing)}, which this trace has not recorded (it has {', '.join(self.columns)})"
                f"{remedy}"
            )

    def blocks(
        self, *columns: str, max_rows: int = PART_ROWS
    ) -> Iterator[tuple[RoutingTrace, NDArray[np.bool_]]]:
        """Whole requests with the rows that count; a later part of a request comes with what was before it."""
        row = 0
        for whole in blocks_of(self.trace, *columns, max_rows=max_rows):
            block = whole if whole.executed_T.all() else whole.rows(whole.executed_T)
            row_T = np.arange(row, row + block.n_tokens)
            row += block.n_tokens
            wanted_T = np.isin(block.request_T, self.requests)
            if self.stop is not None:
                wanted_T &= row_T < self.stop
            if not wanted_T.any():
                continue
            if not wanted_T.all():
                row_T, block = row_T[wanted_T], block.rows(wanted_T)
            counted_T = row_T >= self.first
            if not counted_T.all():  # of requests that end before the part begins nothing is asked
                kept_T = np.isin(block.request_T, block.request_T[counted_T])
                block, counted_T = block.rows(kept_T), counted_T[kept_T]
            if counted_T.any():
                yield block, counted_T

    def counted(self, count: Callable[[Part], C], what: str) -> Iterator[C]:
        """What `count` says of the whole part, or on a cluster of one stretch of the trace after the other.

        `count` is of a module, so that workers have it; what it says must add up to the same however rows are shared
        out.
        """
        is_in_time = self.first > 0 or self.stop is not None
        if self.cluster is None or is_in_time or not isinstance(self.trace, TraceReader):
            yield count(self)
            return
        cuts = cut(self.trace, self.cluster.n_shards(self.trace.n_tokens))
        folder = self.trace.folder.resolve()
        names = [f"requests of {folder.name} from row {start} to {stop}" for start, stop in cuts]
        state = (count, folder, self.requests)
        for _, said in self.cluster.map(_counted, cuts, state, title=what, names=names):
            yield said

    def summed(self, count: Callable[[Part], tuple[NDArray[Any], ...]], what: str) -> list[Any]:
        """Whole numbers that `count` found, added up in the order of the trace."""
        parts = self.counted(count, what)
        sums = list(next(parts))
        for later in parts:
            for mine, other in zip(sums, later, strict=True):
                mine += other
        return sums

    def some(self, most_tokens: int, seed: int) -> Part:
        """Whole requests in an order drawn by the seed, until there are enough tokens; the last one may be too many."""
        lengths: dict[int, int] = {}
        for block, counted_T in self.blocks():
            found, counts = np.unique(block.request_T[counted_T], return_counts=True)
            lengths |= dict(zip(found.tolist(), counts.tolist(), strict=True))
        if sum(lengths.values()) <= most_tokens:
            return self
        kept, total = list[int](), 0
        for request in np.random.default_rng(seed).permutation(sorted(lengths)).tolist():
            if total >= most_tokens:
                break
            kept.append(request)
            total += lengths[request]
        return dataclasses.replace(self, requests=np.array(sorted(kept), np.int64))

    def asked(self) -> NDArray[np.int64]:
        """The requests that have rows in this part."""
        if self.first == 0 and self.stop is None:
            return self.requests
        found = [np.unique(block.request_T) for block, _ in self.blocks()]
        return np.unique(np.concatenate(found)).astype(np.int64) if found else self.requests[:0]

    def lessons(self, horizon: int, *columns: str, max_rows: int = PART_ROWS) -> Iterator[Lesson]:
        for block, counted_T in self.blocks(*columns, max_rows=max_rows):
            yield Lesson(Past(block, horizon), block.ids_TLK, counted_T)

    def load(self, *columns: str) -> tuple[RoutingTrace, NDArray[np.bool_]]:
        """All of it in memory, for what learns from many passes."""
        read = list(self.blocks(*columns, max_rows=1 << 16))
        if not read:
            raise MissingData("this part of the trace has no rows to learn from")
        return concat([block for block, _ in read]), np.concatenate([rows for _, rows in read])


def _counted(
    state: tuple[Callable[[Part], C], Path, NDArray[np.int64]], stretch: tuple[int, int]
) -> C:
    """A worker's share."""
    count, folder, requests = state
    need_seen(folder / "trace.json")
    return count(Part(Stretch(folder, *stretch), requests))


class Parts(NamedTuple):
    train: Part
    validation: Part
    test: Part


def parts_of(trace: Traceable, fold: Fold) -> Parts:
    """Train, validation and test of one fold."""
    if fold.kind == "requests":
        return Parts(*(Part(trace, chosen) for chosen in (fold.train, fold.validation, fold.test)))
    validation, test = fold.cuts
    return Parts(
        Part(trace, fold.train, 0, validation),
        Part(trace, fold.train, validation, test),
        Part(trace, fold.train, test),
    )


def together(train: Part, validation: Part) -> Part:
    """Both as one, for who learns from all that is not tested. Where a split is in time, one follows the other."""
    requests = np.union1d(train.requests, validation.requests)
    return dataclasses.replace(train, requests=requests, stop=validation.stop)


def survey_of(trace: Traceable) -> Survey:
    """Of what stands in a folder once: folds, parts and scores all ask, and nobody changes what they get."""
    if type(trace) is TraceReader:
        told = (trace.folder / "trace.json").stat()
        written = (told.st_mtime_ns, told.st_size, told.st_ino)
        return _survey_in(trace.folder.resolve(), written)
    return _survey(trace)


@lru_cache(maxsize=2)  # what is learnt from, and what is tested
def _survey_in(folder: Path, _written: tuple[int, ...]) -> Survey:
    return _survey(TraceReader(folder))


def _survey(trace: Traceable) -> Survey:
    survey = Survey()
    for block in blocks_of(trace):
        survey.add(block)
    if not survey.executed_rows:
        raise MissingData("the trace has no executed rows: there is nothing to learn from")
    return survey


def whole(trace: Traceable) -> Part:
    """Everything, for a notebook that has its own split."""
    return Part(trace, np.array(survey_of(trace).request_R, np.int64))
