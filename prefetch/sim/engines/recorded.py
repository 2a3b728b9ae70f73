"""The simulator fed with what a device did: in which order copies began, landed and were needed.

A device runs free, so that guesses land at other moments than a simulated link says. Given those moments everything
else is decided here again, and must come out the same. It knows no device and no clock.
"""

from __future__ import annotations

from typing import Any

from prefetch.errors import PrefetchError
from prefetch.sim.engines.ahead import Ahead
from prefetch.sim.engines.pool import MISS
from prefetch.sim.engines.reference import Entry
from prefetch.sim.engines.storage_reference import NEVER_STALE

# what a record says: a step begins with an event; an event's routing is known; a guess's copy has landed; a copy was
# to begin (entry, whether the last event's experts were still in use)
BEGIN, EVENT, LAND, TRY = "begin", "event", "land", "try"
Record = list[tuple[str, Any]]


class RecordError(PrefetchError):
    """What a device did is not what was decided."""


class Recorded(Ahead):
    """Takes the decisions of a record again; afterwards `outcome` and `counts` say what they were."""

    def __init__(self, *told: Any, **start: Any) -> None:
        super().__init__(*told, **start)
        self.outcome = [MISS] * self.work.n_accesses
        self.in_use: set[Entry] = set()
        self.step = 0

    def run(self, record: Record) -> Recorded:
        for what, told in record:
            if what == BEGIN:
                self.step = told // self.work.card.n_layers
                self._begin_step(told)
            elif what == EVENT:
                self._event(told)
            elif what == LAND:
                del self.arrives[told]
            else:
                self._try(*told)
        return self

    def _event(self, event: int) -> None:
        layer = event % self.work.card.n_layers
        accesses = range(self.work.start_V[event], self.work.start_V[event + 1])
        entries = {a: self.caches.entry(a, layer) for a in accesses}
        late = {a for a, entry in entries.items() if entry in self.arrives}
        for a in late:
            del self.arrives[entries[a]]
        self.in_use = set(entries.values())
        needed = self._need(event, accesses, entries, late)
        self.counts["demand_loads"] += len(needed.missing)
        self.counts["moved_bytes"] += len(needed.missing) * int(self.machine.bytes_L[layer])
        self._enqueue_next(event, layer)

    def _try(self, entry: Entry, is_busy: bool) -> None:
        copy = self._next(NEVER_STALE)
        if copy is None or copy.entry != entry:
            raise RecordError(f"a copy of {entry} began where {copy} was next")
        self.queue.remove(copy)
        if self._start(copy, self.step, self.in_use if is_busy else ()):
            self.counts["moved_bytes"] += int(self.machine.bytes_L[entry[0]])
        else:
            self.counts["prefetch_dropped"] += 1
