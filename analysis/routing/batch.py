"""What every table is fed: the trace in batches of whole requests, layer by layer, each row with the part it plays.

A table over a trace is an accumulator: `add(batch)` in the order of the trace, `merge(later)` with one that saw what
follows, and methods that turn what was counted into data frames. It knows no table.
T tokens, L layers, K choices, E experts, R requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from prefetch.cluster.worker import n_threads
from prefetch.errors import FormatError
from prefetch.progress import Progress
from prefetch.scoring import Split, Survey
from prefetch.trace.blocks import BLOCK_ROWS, Traceable, blocks_of, columns_of, numbered
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import PHASES, RoutingTrace, no_expert

TRAIN_SHARE = 0.7
WITNESSES = 400  # requests from which it is told how much requests differ; the error of a variance is then 7 %
THREADS = "layers"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of the whole trace before anything is counted."""

    card: ModelCard
    survey: Survey
    split: Split
    columns: tuple[str, ...]  # what the trace has recorded
    seed: int = 0

    def recorded(self, *wanted: str) -> tuple[str, ...]:
        """Those of the wanted columns that there are."""
        return tuple(name for name in wanted if name in self.columns)

    @property
    def n_rows(self) -> int:
        """Rows of the trace, executed or not: what `Batch.row_T` counts."""
        return self.survey.rows

    @property
    def domains(self) -> tuple[str, ...]:
        return self.survey.domains

    @cached_property
    def witnesses(self) -> NDArray[np.int64]:
        """Some of the requests, evenly spread over the trace."""
        request_R = np.array(self.survey.request_R)[np.array(self.survey.ran_R, bool)]
        return np.sort(request_R[:: max(1, -(-len(request_R) // WITNESSES))])

    @property
    def pair_type(self) -> np.dtype[Any]:
        """Of counts of pairs, each at most once a row: wide enough for twice as many as all rows."""
        return np.dtype(np.int32 if self.survey.executed_rows < 2**30 else np.int64)

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of the row groups that tables keep apart: all, and each phase where both exist."""
        decode, rows = self.survey.decode_rows, self.survey.executed_rows
        return ("all", "prefill", "decode") if 0 < decode < rows else ("all",)


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole requests, executed rows only."""

    block: RoutingTrace
    row_T: NDArray[np.int64]  # where each row stands in the whole trace
    part_T: NDArray[np.uint8]  # scoring.TRAIN, TEST or LEFT_OUT
    is_template_T: NDArray[np.bool_]
    is_witness_T: NDArray[np.bool_]

    @cached_property
    def ids_LTK(self) -> NDArray[Any]:
        """The choices with the layer first: every layer's own rows lie together."""
        return np.ascontiguousarray(self.block.ids_TLK.transpose(1, 0, 2))

    @cached_property
    def first_choice_LT(self) -> NDArray[Any]:
        """The choice of the largest weight; where no weights were read, the first that names an expert."""
        weights_TLK = self.block.weights_TLK
        if self.ids_LTK.shape[2] == 1:
            return self.ids_LTK[:, :, 0]
        if weights_TLK is None:
            first_LT = self.ids_LTK[:, :, 0]
            if not (first_LT == self.nobody).any():
                return first_LT
            place_LT1 = (self.ids_LTK != self.nobody).argmax(axis=2)[:, :, None]
            return np.take_along_axis(self.ids_LTK, place_LT1, axis=2)[:, :, 0]
        first_LT = np.empty(self.ids_LTK.shape[:2], self.ids_LTK.dtype)
        # numba has no float16; among weights >= 0 bits order alike (-0.0 made 0.0)
        bits_TLK = (weights_TLK + np.float16(0)).view(np.int16)
        for_layers(
            lambda layer: _heaviest(
                self.ids_LTK[layer], bits_TLK[:, layer], self.nobody, first_LT[layer]
            ),
            len(first_LT),
        )
        return first_LT

    @cached_property
    def starts_R(self) -> NDArray[np.int64]:
        return self.block.starts_R

    def is_of(self, phase: str) -> NDArray[np.bool_]:
        """[T] the rows of one phase."""
        phase_T = self.block.phase_T
        return np.ones(len(phase_T), bool) if phase == "all" else phase_T == PHASES.index(phase)

    def of_phase(self, phase: str) -> Batch:
        """Only the rows of one phase; whoever asks next gets the same."""
        return self if phase == "all" else self._phases[PHASES.index(phase)]

    @cached_property
    def _phases(self) -> list[Batch]:
        return [
            Batch(
                self.block.rows(in_T),
                self.row_T[in_T],
                self.part_T[in_T],
                self.is_template_T[in_T],
                self.is_witness_T[in_T],
            )
            for in_T in map(self.is_of, PHASES)
        ]

    @property
    def nobody(self) -> int:
        """The id that means "no expert"."""
        return no_expert(self.block.card.n_experts)


@njit(cache=True, nogil=True)
def _heaviest(ids_TK, bits_TK, nobody, first_T):  # type: ignore[no-untyped-def]
    for t in range(ids_TK.shape[0]):
        best, first_T[t] = -1, nobody
        for k in range(ids_TK.shape[1]):
            if ids_TK[t, k] != nobody and (first_T[t] == nobody or bits_TK[t, k] > best):
                best, first_T[t] = bits_TK[t, k], ids_TK[t, k]


class Accumulator(Protocol):
    def add(self, batch: Batch) -> None: ...
    def merge(self, later: Self) -> None: ...


A = TypeVar("A", bound=Accumulator)
T = TypeVar("T")


class ByPhase(Generic[A]):
    """One accumulator for all rows and, where a trace has both phases, one for the rows of each."""

    def __init__(self, plan: Plan, make: Callable[[], A]) -> None:
        self.parts = {phase: make() for phase in plan.phases}

    def add(self, batch: Batch) -> None:
        for phase, part in self.parts.items():
            if batch.of_phase(phase).block.n_tokens:
                part.add(batch.of_phase(phase))

    def merge(self, later: Self) -> None:
        for phase, part in self.parts.items():
            part.merge(later.parts[phase])

    def table(self, of: Callable[[A], pd.DataFrame]) -> pd.DataFrame:
        """The tables of the phases, one below the other."""
        frames = [of(part).assign(phase=phase) for phase, part in self.parts.items()]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["phase", *(name for name in frame.columns if name != "phase")]]


def plan_of(
    trace: Traceable, *, train_share: float = TRAIN_SHARE, seed: int = 0, max_rows: int = BLOCK_ROWS
) -> Plan:
    survey, card = Survey(), None
    with Progress("surveying", None, "tokens") as progress:
        for block in ahead(blocks_of(trace, max_rows=max_rows)):
            survey.add(block)
            card = block.card
            progress.advance(block.n_tokens)
    return planned(trace, survey, card, train_share, seed)


def planned(
    trace: Traceable, survey: Survey, card: ModelCard | None, train_share: float, seed: int
) -> Plan:
    if card is None or not survey.executed_rows:
        raise FormatError("the trace has no executed rows: there is nothing to analyse")
    return Plan(card, survey, survey.split(train_share, seed), columns_of(trace), seed)


def batches(
    trace: Traceable, plan: Plan, *recorded: str, max_rows: int = BLOCK_ROWS
) -> Iterator[Batch]:
    yield from ahead(_read(trace, plan, *recorded, max_rows=max_rows))


def _read(trace: Traceable, plan: Plan, *recorded: str, max_rows: int) -> Iterator[Batch]:
    for first, block in numbered(trace, *recorded, max_rows=max_rows):
        row_T = np.arange(first, first + block.n_tokens)
        if not block.executed_T.all():
            row_T, block = row_T[block.executed_T], block.rows(block.executed_T)
        if block.n_tokens:
            yield Batch(
                block,
                row_T,
                plan.split.parts(block, row_T),
                plan.split.is_template(block),
                np.isin(block.request_T, plan.witnesses),
            )


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, while the next one is already being read."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = reader.submit(next, items, None)
            yield item


def accumulate(
    trace: Traceable,
    plan: Plan,
    accumulators: Iterable[Accumulator],
    *recorded: str,
    title: str = "counting",
    max_rows: int = BLOCK_ROWS,
) -> None:
    """One pass over the trace, every batch to everyone."""
    with Progress(title, plan.survey.executed_rows, "tokens") as progress:
        for batch in batches(trace, plan, *recorded, max_rows=max_rows):
            for accumulator in accumulators:
                accumulator.add(batch)
            progress.advance(batch.block.n_tokens)


def layer_columns(card: ModelCard, layers: Any) -> dict[str, Any]:
    """The columns that name layers in a table; the stack only where there are two."""
    slots = np.asarray(layers, np.int64)
    columns: dict[str, Any] = {"layer": np.array(card.layer_numbers)[slots]}
    if len(set(card.layer_stacks)) > 1:
        columns["stack"] = np.array(card.layer_stacks)[slots]
    return columns


def for_layers(work: Callable[[int], Any], n_layers: int) -> list[Any]:
    """Every layer's work, on all cores: layers share nothing, so the number of threads changes no number."""
    if threading.current_thread().name.startswith(THREADS):
        return [
            work(layer) for layer in range(n_layers)
        ]  # a worker that waits for workers waits for ever
    return list(_pool().map(work, range(n_layers)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads(), thread_name_prefix=THREADS)
