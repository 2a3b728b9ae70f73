"""Listens to the plain timed engine: what GPU, link and host did, and when, span by span.

It decides nothing. Time on the GPU is whatever that engine counts as computed or waited, one after the other; copies
are what it moves; the host's time is what it asks for and computes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefetch.sim.engines.machine import WAIT
from prefetch.sim.engines.pool import HIT, LATE
from prefetch.sim.engines.reference import Entry
from prefetch.sim.engines.storage_reference import Copy
from prefetch.sim.engines.timed_reference import TimedReplay

GPU, LINK, HOST = "GPU", "link", "host"
LANES = (GPU, LINK, HOST)
BEFORE, EXPERT = "before the experts", "expert"
STALLS = {
    "stall_ns": "waits for a copy",
    "late_stall_ns": "waits for a guess under way",
    "host_stall_ns": "waits for the host",
    "disk_stall_ns": "waits for the disk",
}
DEMAND, AHEAD, LATE_COPY, UPLOAD = (
    "copy on demand", "copy of a guess", "rest of a needed guess", "upload",
)  # fmt: skip
ASKS, ASKS_AHEAD, COMPUTES = "asks for copies", "guesses and asks ahead", "computes experts"


@dataclass(frozen=True)
class Span:
    """Something that one lane does for a while. Expert -1: none in particular."""

    lane: str
    kind: str
    begin_ns: int
    took_ns: int
    step: int
    layer: int
    expert: int = -1

    @property
    def end_ns(self) -> int:
        return self.begin_ns + self.took_ns


class _Heard(Counter[str]):
    """Counts, and says what is added."""

    def __init__(self, counts: Counter[str], hear: Callable[[str, int], None]) -> None:
        super().__init__(counts)
        self._hear = hear

    def __setitem__(self, name: str, value: int) -> None:
        self._hear(name, value - self[name])
        super().__setitem__(name, value)


class Recorder(TimedReplay):
    """A timed replay that keeps everything that happened as spans."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.spans = list[Span]()
        self.counts = _Heard(self.counts, self._hear)
        self._waves, self.caches.waves = self.caches.waves, self._ordered  # type: ignore[method-assign]
        self._gpu = self._step = self._layer = 0
        self._computed, self._demanded = list[int](), list[int]()  # places in `spans`
        self._order, self._late = list[int](), dict[int, int]()  # expert: when it arrives
        self._is_ahead = False
        self._moving: Copy | None = None

    def begins(self) -> list[int]:
        """When every step begins, and when the last ends."""
        return [0, *np.cumsum(self.time_S).tolist()]

    def _keep(
        self, lane: str, kind: str, begin: int, took: int, layer: int, expert: int = -1
    ) -> None:
        self.spans.append(Span(lane, kind, begin, took, self._step, layer, expert))

    def _hear(self, name: str, more: int) -> None:
        """The GPU's time is what is counted, in the order in which it is counted."""
        if name == "compute_ns":
            is_before = not self._computed
            self._computed.append(len(self.spans))
            self._keep(GPU, BEFORE if is_before else EXPERT, self._gpu, more, self._layer)
        elif name in STALLS:
            self._keep(GPU, STALLS[name], self._gpu, more, self._layer)
        else:
            return
        self._gpu += more

    def _ordered(self, accesses: range, layer: int) -> Sequence[Sequence[int]]:
        waves = self._waves(accesses, layer)
        self._order = [a for wave in waves for a in wave]
        return waves

    def _event(self, event: int, step: int, layer: int, accesses: range) -> None:
        self._step, self._layer = step, layer
        self._computed, self._demanded, self._late = [], [], {}
        asked = max(self.host, self.now + int(self.machine.before_S[step]))
        super()._event(event, step, layer, accesses)
        missing = [self._expert(a) for a in self.missing]
        computed = [self._expert(a) for a in self._order if self.outcome[a] == HIT]
        late = [a for a in accesses if self.outcome[a] == LATE]
        late.sort(key=lambda a: (self._late[self._expert(a)], a))
        computed += [self._expert(a) for a in late]
        if self.machine.miss_way == WAIT:
            self._keep(HOST, ASKS, asked, len(missing) * self.machine.issue_ns, layer)
            self._name(self._computed[1:], computed + missing)
            self._name(self._demanded, missing)
        else:
            self._name(self._computed[1:], computed)

    def _expert(self, a: int) -> int:
        return int(self.work.ids_A[a])

    def _name(self, places: list[int], experts: list[int]) -> None:
        for place, expert in zip(places, experts, strict=True):
            self.spans[place] = dataclasses.replace(self.spans[place], expert=expert)

    def _next(self, link_free: int) -> Copy | None:
        self._moving = super()._next(link_free)
        return self._moving

    def _run_link(self, *given: Any) -> None:
        self._is_ahead = True
        super()._run_link(*given)
        self._is_ahead = False

    def _promote(self, entry: Entry, now: int) -> int:
        place = len(self.spans)
        arrival = super()._promote(entry, now)
        if len(self.spans) > place:
            self.spans[place] = dataclasses.replace(
                self.spans[place], kind=LATE_COPY, expert=entry[1]
            )
            self._demanded.remove(place)
        self._late[entry[1]] = arrival
        return arrival

    def _move(self, begin: int, layer: int, chunks: range) -> int:
        end = super()._move(begin, layer, chunks)
        if self._is_ahead and self._moving is not None:
            kind = AHEAD if self._moving.is_guess else UPLOAD
            self._keep(LINK, kind, begin, end - begin, layer, self._moving.entry[1])
        else:
            self._demanded.append(len(self.spans))
            self._keep(LINK, DEMAND, begin, end - begin, layer)
        return end

    def _enqueue(self, target: int) -> None:
        begin = self.host
        super()._enqueue(target)
        layer = target % self.work.card.n_layers
        self._keep(HOST, ASKS_AHEAD, begin, self.host - begin, layer)

    def _upload(self, entry: Entry, in_memory: int) -> None:
        begin = self.host
        super()._upload(entry, in_memory)
        self._keep(HOST, ASKS, begin, self.host - begin, entry[0], entry[1])

    def _on_host(self, begin: int, layer: int, missing: list[int]) -> int:
        end = super()._on_host(begin, layer, missing)
        self._keep(HOST, COMPUTES, begin, end - begin, layer)
        return end
