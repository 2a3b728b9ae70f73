"""The engine: decisions of the simulator, carried out by a backend. One event after the other, on one host thread.

It knows no weights and no device. Copies of what is missing are given first, then the experts that are there are
launched, then each of the others behind its copy. A slot is written again only behind its last reader.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from prefetch.engine.backend import COMPUTE, COPY, Backend, Done, EngineError, names
from prefetch.sim.engines.ahead import Ahead, Needed
from prefetch.sim.engines.pool import HIT, LATE
from prefetch.sim.engines.quick import QuickCaches
from prefetch.sim.engines.recorded import BEGIN, EVENT, LAND, TRY, Record
from prefetch.sim.engines.reference import Entry
from prefetch.sim.engines.storage_reference import NEVER_STALE, Copy

IN_FLIGHT = (
    1  # copies on the link: what is missing waits for no more than the one that runs, as simulated
)
SCORE, TARGET = attrgetter("score"), attrgetter("target")
REASONS = {HIT: "", LATE: "late_stall_ns"}


class Engine(Ahead):
    """`outcome` says of every access what it was; `record` in which order copies began, landed, and were needed."""

    caches_of = QuickCaches

    def __init__(
        self, backend: Backend, n_slots: int, *told: Any, in_flight: int = IN_FLIGHT, **start: Any
    ) -> None:
        super().__init__(*told, **start)
        self.in_flight = in_flight
        self.backend = backend
        self.slot_of: dict[Entry, int] = {}
        self.free = deque(range(n_slots))  # the one that was left first, first
        self.last_use: dict[int, Done] = {}  # of a slot
        self.ready: dict[Entry, Done] = {}  # of a copy that no launch has waited for
        self.flying: deque[tuple[Entry, Done]] = deque()
        self.outcome: dict[int, int] = {}
        self.record: Record = []
        self.at_step = 0
        self.in_use: set[Entry] = set()  # by the event that was run last
        self.is_running = False  # its experts are not all launched
        self.over: Done = None  # ... and when they are
        self._is_resident = False
        self._rows: dict[int, dict[int, int]] = {}  # of layers whose experts are all there
        self._fill()

    def _fill(self) -> None:
        """Who is there from the start is copied before anything runs."""
        for cache in self.caches.caches:
            for entry in cache.slot:
                self._copy(entry)
        if self.flying:
            self.backend.wait([self.flying[-1][1]])
        self._land()
        self.record, self.counts["moved_bytes"] = [], 0
        self.filled = self.backend.n_copies

    @property
    def copied_bytes(self) -> int:
        """Since the start, as the backend counts its copies: all slots are of one size."""
        return (self.backend.n_copies - self.filled) * int(self.machine.bytes_L.max())

    def begin(self, event: int) -> None:
        """A step begins with this event."""
        if self.is_running:
            self._tidy()
        self.at_step = event // self.n_layers
        self.record.append((BEGIN, event))
        self._begin_step(event)

    def _tidy(self) -> None:
        """After an event that was interrupted: whoever is in a cache has a slot, and nobody else has one."""
        self.is_running = False
        for cache in self.caches.caches:
            for entry in [entry for entry in cache.slot if entry not in self.slot_of]:
                cache.remove(entry)
        for entry in [entry for entry in self.slot_of if not self._is_there(entry)]:
            self._let_go(entry)

    def wait_for(self, routing: Done) -> None:
        """The host has nothing else to do than to keep the link busy."""
        while not self.backend.is_done(routing):
            self.pump()
            under_way = [self.flying[0][1]] if self.flying and self.queue else []
            self.backend.wait([routing, *under_way])
        self.pump()

    def event(self, event: int, accesses: range, tokens: Sequence[int]) -> None:
        """`tokens`: of the event, for each of its accesses."""
        layer = event % self.n_layers
        self._land()
        self.record.append((EVENT, event))
        ids = self.work.ids_A[accesses.start : accesses.stop].tolist()
        entries = {a: (layer, expert) for a, expert in zip(accesses, ids, strict=True)}
        late = {a for a in accesses if entries[a] in self.arrives} if self.arrives else set()
        for a in late:
            del self.arrives[entries[a]]
        self.in_use, self.is_running = set(entries.values()), True
        needed = self._need(event, accesses, entries, late)
        self._check([entries[a] for a in needed.missing])
        self._run(layer, needed, entries, dict(zip(accesses, tokens, strict=True)))
        self.backend.combine(layer)
        self.over, self.is_running = self.backend.record(COMPUTE), False
        self._enqueue_next(event, layer)
        self.pump()

    @property
    def is_resident(self) -> bool:
        """Every expert of every layer is there, and none will ever leave: nothing is left to decide."""
        if not self._is_resident:
            work = self.work.card
            n_there = len(self.slot_of) - len(self.flying)
            self._is_resident = n_there == work.n_layers * work.n_experts and not self.queue
        return self._is_resident

    def resident_event(self, event: int, accesses: range, tokens: Sequence[int]) -> None:
        """An event when all are there: the host need not know the routing before it launches."""
        layer = event % self.n_layers
        self.record.append((EVENT, event))
        self.outcome.update(dict.fromkeys(accesses, HIT))
        ids = self.work.ids_A[accesses.start : accesses.stop].tolist()
        used = self.unused & {(layer, expert) for expert in ids} if self.unused else set()
        self.unused -= used
        self.counts["prefetch_used"] += len(used)
        self.launch_all(layer, dict(zip(ids, tokens, strict=True)))

    def launch_all(self, layer: int, tokens: Mapping[int, int]) -> None:
        """`tokens`: of the experts that are needed, where the host knows them."""
        if layer not in self._rows:
            n_experts = self.work.card.n_experts
            self._rows[layer] = {expert: self.slot_of[layer, expert] for expert in range(n_experts)}
        self.backend.publish(layer, self._rows[layer])
        self.backend.launch(layer, tokens)
        self.backend.combine(layer)

    def nothing_needed(self, event: int) -> None:
        """No token of the step went to an expert of this layer."""
        self.caches.tell(event)

    def pump(self) -> None:
        """Starts the next copies that wait, as long as few are under way."""
        self._land()
        while len(self.flying) < self.in_flight and (copy := self._next(NEVER_STALE)):
            is_busy = self.over is not None and not self.backend.is_done(self.over)
            self.queue.remove(copy)
            self.record.append((TRY, (copy.entry, is_busy)))
            if not self._start(copy, self.at_step, self.in_use if is_busy else ()):
                self.counts["prefetch_dropped"] += 1
                continue
            self._copy(copy.entry)

    def _run(
        self, layer: int, needed: Needed, entries: dict[int, Entry], tokens: dict[int, int]
    ) -> None:
        """Launches wait in the order in which their experts are there; a copy that finds no slot has them go first."""
        outcome, order = self.outcome, needed.order
        is_all = not needed.missing and not self.ready
        there = order if is_all else [a for a in order if outcome[a] == HIT]
        late = [] if is_all else [a for a in order if outcome[a] == LATE]
        if len(late) > 1:
            ready = list(self.ready)
            late.sort(key=lambda a: ready.index(entries[a]))
        waiting = deque([there] * bool(there) + [[a] for a in late])
        for a in needed.missing:
            while not self.free and waiting:
                self._launch(layer, waiting.popleft(), entries, tokens)
            self._copy(entries[a])
            waiting.append([a])
        self.counts["demand_loads"] += len(needed.missing)
        for group in waiting:
            self._launch(layer, group, entries, tokens)

    def _launch(
        self, layer: int, group: list[int], entries: dict[int, Entry], tokens: dict[int, int]
    ) -> None:
        """All of a group are there, or are one that is waited for."""
        slot_of, ready, slots = self.slot_of, self.ready, dict[int, int]()
        for a in group:
            entry = entries[a]
            slots[entry[1]] = slot_of[entry]
            if ready and (copied := ready.pop(entry, None)) is not None:
                why = REASONS.get(self.outcome[a], "stall_ns")
                self.backend.after(COMPUTE, copied, why)
        self.backend.publish(layer, slots)
        self.backend.launch(layer, {entries[a][1]: tokens[a] for a in group})
        done, kept = self.backend.record(COMPUTE), self.caches.of(layer).slot
        for a in group:
            entry = entries[a]
            self.last_use[slots[entry[1]]] = done
            if entry not in kept and entry not in self.beside:  # it was used, and is not kept
                self._let_go(entry)

    def _copy(self, entry: Entry) -> None:
        """Into the slot that was left first, behind whoever read it last."""
        if not self.free:
            raise EngineError(
                f"no slot is left for {names([entry])}: {len(self.slot_of)} hold {names(self.slot_of)}; "
                "the caches and their staging are larger than the pool"
            )
        slot = self.slot_of[entry] = self.free.popleft()
        if (reader := self.last_use.pop(slot, None)) is not None:
            self.backend.after(COPY, reader)
        self.backend.copy(entry, slot)
        done = self.ready[entry] = self.backend.record(COPY)
        self.flying.append((entry, done))
        self.counts["moved_bytes"] += self.bytes_L[entry[0]]

    def _land(self) -> None:
        while self.flying and self.backend.is_done(self.flying[0][1]):
            entry, _ = self.flying.popleft()
            if entry in self.arrives:
                self.record.append((LAND, entry))
                del self.arrives[entry]

    def _enqueue(self, target: int) -> None:
        """Guesses that come from a file take the time that their predictor takes."""
        super()._enqueue(target)
        if self.machine.predict_ns:
            self.backend.spend(self.machine.predict_ns)

    def _left(self, entry: Entry) -> None:
        if entry in self.unused or entry in self.arrives:
            super()._left(entry)
        if not (self.is_running and entry in self.in_use):
            self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        self.ready.pop(entry, None)
        self.free.append(self.slot_of.pop(entry))

    def _check(self, missing: Sequence[Entry]) -> None:
        """What the pool holds is what the policy believes that it holds."""
        is_there = self.in_use & self.slot_of.keys()
        if len(is_there) + len(missing) != len(self.in_use) or not is_there.isdisjoint(missing):
            raise EngineError(
                f"the pool holds {names(is_there)} of {names(self.in_use)}, and the policy loads {names(missing)}"
            )

    def _next(self, link_free: int) -> Copy | None:
        """As `Ahead`, of guesses none of which has begun: whoever is on the link is not in the queue any more."""
        queue, landing = self.queue, self.machine.landing
        if not queue or 0 < landing == len(self.beside):
            return None
        return max(queue, key=SCORE) if self.machine.by_score else min(queue, key=TARGET)
