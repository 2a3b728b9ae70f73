"""The passes over a trace, shared out over a cluster: a worker counts the requests of a stretch of its rows.

Accumulators travel as pickles without what both sides know (the plan, what guesses are made from), and are merged in
the order of the trace. The optimum cannot be cut in time: its layers are shared out, each over all rows.
It knows no table. L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.routing.batch import Plan, batches, planned
from analysis.routing.cache import OptimalCurve
from analysis.routing.everything import Passes
from prefetch.cluster.mapping import Cluster
from prefetch.cluster.worker import need_seen, packed, unpacked
from prefetch.scoring import Survey
from prefetch.sim.limits.eight import LAYERS
from prefetch.trace.parquet import TraceReader
from prefetch.trace.stretch import Stretch, cut


@dataclass(frozen=True, eq=False, kw_only=True)
class Shares(Passes):
    """A trace on disk, and who reads it."""

    trace: TraceReader
    cluster: Cluster

    def plan(self, *, train_share: float, seed: int) -> Plan:
        survey = Survey()
        given = (self._folder, self.max_rows)
        for part in self._map(_surveyed, given, self._cuts, "surveying"):
            survey.merge(unpacked(part))
        return planned(self.trace, survey, self.trace.card, train_share, seed)

    def accumulate(
        self,
        plan: Plan,
        parts: list[Any],
        *recorded: str,
        title: str = "counting",
        most_rows: int | None = None,
    ) -> None:
        rows = min(self.max_rows, most_rows or self.max_rows)
        counted = [part for part in parts if not isinstance(part, OptimalCurve)]
        self._begin(plan, counted, recorded, rows)
        known = [plan, *(value for part in counted for value in _given(part))]
        state = _State(self._folder, rows, plan, recorded, known, packed(counted, known))
        for told in self._map(_counted, state, self._cuts if counted else [], title):
            for mine, later in zip(counted, unpacked(told, known), strict=True):
                mine.merge(later)
        for optimal in parts:
            if isinstance(optimal, OptimalCurve):
                self._replay(plan, optimal)

    def _begin(
        self, plan: Plan, parts: list[Any], recorded: tuple[str, ...], max_rows: int
    ) -> None:
        """What an accumulator reads from the first rows of a trace holds for all of it."""
        asking = [part for part in parts if hasattr(part, "begin")]
        if asking:
            first = next(batches(self.trace, plan, *recorded, max_rows=max_rows))
            for part in asking:
                part.begin(first)

    def _replay(self, plan: Plan, optimal: OptimalCurve) -> None:
        n_layers = plan.card.n_layers
        groups = [range(at, min(at + LAYERS, n_layers)) for at in range(0, n_layers, LAYERS)]
        state = (self._folder, self.max_rows, plan, optimal, self._cuts)
        names = [f"layer slots {group.start} to {group.stop - 1}" for group in groups]
        title = "optimal cache"
        found = self.cluster.map(_replayed, groups, state, title=title, names=names, unit="groups")
        for place, hist_LCD in found:
            optimal.take(groups[place], hist_LCD)

    def _map(
        self, work: Any, state: Any, cuts: list[tuple[int, int]], title: str
    ) -> Iterator[bytes]:
        folder = self._folder.name
        names = [f"requests of {folder} from row {start} to {stop}" for start, stop in cuts]
        for _, told in self.cluster.map(work, cuts, state, title=title, names=names):
            yield told

    @property
    def _folder(self) -> Path:
        return self.trace.folder.resolve()

    @property
    def _cuts(self) -> list[tuple[int, int]]:
        return cut(self.trace, self.cluster.n_shards(self.trace.n_tokens))


@dataclass(frozen=True, eq=False)
class _State:
    """What the shards of a pass share."""

    folder: Path
    max_rows: int
    plan: Plan
    recorded: tuple[str, ...]
    known: list[Any]
    fresh: bytes  # accumulators that have counted nothing


def _given(part: Any) -> list[Any]:
    """What an accumulator only reads: it need not come back."""
    return [getattr(part, name) for name in getattr(part, "given", ())]


def _surveyed(state: tuple[Path, int], stretch: tuple[int, int]) -> bytes:
    folder, max_rows = state
    survey = Survey()
    for block in _opened(folder, stretch).batches(max_rows=max_rows):
        survey.add(block)
    return packed(survey)


def _counted(state: _State, stretch: tuple[int, int]) -> bytes:
    parts = unpacked(state.fresh, state.known)
    trace = _opened(state.folder, stretch)
    for batch in batches(trace, state.plan, *state.recorded, max_rows=state.max_rows):
        for part in parts:
            part.add(batch)
    return packed(parts, state.known)


def _replayed(state: tuple[Path, int, Plan, OptimalCurve, list[tuple[int, int]]], layers: range) -> Any:  # fmt: skip
    """Over the batches of the first pass, which were cut as it was."""
    folder, max_rows, plan, optimal, cuts = state
    some = optimal.of_layers(layers)
    for stretch in cuts:
        for batch in batches(_opened(folder, stretch), plan, max_rows=max_rows):
            some.add(batch)
    return some.stacks.hist_LCD


def _opened(folder: Path, stretch: tuple[int, int]) -> Stretch:
    need_seen(folder / "trace.json")
    return Stretch(folder, *stretch)
