"""What is decided event by event, in plain Python: who is there, who is copied ahead, whose place is taken.

It knows no clock: when a copy begins and when it has landed is told by whoever runs it, `timed_reference` on a
simulated link and the engine on a device's. Both take every decision here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from prefetch.sim.engines.machine import COUNTS, WAIT, Guesses, Machine
from prefetch.sim.engines.pool import ATOMIC, EMPTY, HIT, LATE, MISS
from prefetch.sim.engines.reference import Caches, Entry
from prefetch.sim.engines.storage_reference import NEVER_STALE, Copy, Storage, next_of
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload

Pinned = Collection[Entry]


@dataclass(frozen=True, eq=False)
class Needed:
    """An event's accesses, once it is known who is there."""

    order: list[int]  # as they are needed, wave by wave
    missing: list[int]  # in the same order
    at_once: int  # missing ones of the first wave that found a place in the cache
    is_big: bool  # there are more than the cache holds


class Ahead:
    """Caches with guesses that are copied ahead: queues, places and counts. `host`: its time, where simulated."""

    outcome: list[int] | dict[int, int]  # of every access; made by whoever runs it
    caches_of: type[Caches] = Caches

    def __init__(
        self,
        work: Workload,
        policy: Policy,
        room_G: Sequence[int],
        size_L: Sequence[int],
        machine: Machine,
        guesses: Guesses,
        semantics: int = ATOMIC,
        **start: Any,
    ) -> None:
        """`start`: rows that the policy is told, and who is there from the start, as `Caches` takes them."""
        self.work, self.machine, self.guesses = work, machine, guesses
        self.n_layers = work.card.n_layers
        self.caches = self.caches_of(work, policy, room_G, size_L, semantics, **start)
        self.caches.on_leave = self._left
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self.host = 0
        self.queue: list[Copy] = []  # first come first
        self.most_waiting = (guesses.ahead + 1) * self.width + machine.uploads
        self.arrives: dict[Entry, int | None] = {}  # copied ahead, not landed; None: not all moved
        self.unused: set[Entry] = set()  # copied ahead and not used since
        self.beside: dict[Entry, int] = {}  # not in the cache yet: the event that it is meant for
        self.storage = Storage(machine, self.counts, self._rank)
        self.spent = 0  # bytes that guesses have moved in this step
        self.bytes_L: list[int] = machine.bytes_L.tolist()
        self._said: dict[int, list[tuple[int, int]]] = {}  # guesses, of this step's events

    @property
    def width(self) -> int:
        """Guesses per event."""
        return int(self.guesses.ids_VW.shape[1])

    def guessed(self, target: int) -> list[tuple[int, int]]:
        """Experts that are guessed for an event and their scores, best first; EMPTY ends them."""
        if target >= len(self.guesses.ids_VW):
            return []
        if (said := self._said.get(target)) is None:
            ids_VW, score_VW = self.guesses.ids_VW, self.guesses.score_VW
            said = list(zip(ids_VW[target].tolist(), score_VW[target].tolist(), strict=True))
            self._said[target] = said
        return said

    def _begin_step(self, event: int) -> None:
        """Guesses about the first layers are known as a step begins."""
        self.spent = 0
        self._said.clear()
        if self.width:
            for target in range(event, event + min(self.guesses.ahead, self.n_layers)):
                self._enqueue(target)

    def _enqueue_next(self, event: int, layer: int) -> None:
        """The routing of this event is known, and with it the guesses about a later one."""
        if self.width and layer + self.guesses.ahead < self.n_layers:
            self._enqueue(event + self.guesses.ahead)

    def _enqueue(self, target: int) -> None:
        """Guesses about an event join the queue, where they are neither there nor queued."""
        self.host += self.machine.predict_ns
        layer = target % self.n_layers
        waiting = {copy.entry for copy in (*self.queue, *self.storage.queue)}  # each once
        for expert, score in self.guessed(target):
            if expert == EMPTY or len(waiting) == self.most_waiting:
                return
            entry = (layer, expert)
            if entry not in waiting and not self._is_there(entry):
                waiting.add(entry)
                self.host += self.machine.issue_ns
                joined = self.queue if self.storage.has(entry) else self.storage.queue
                # its last chunk may still be read
                may = max(self.host, self.storage.there.get(entry, 0))
                joined.append(Copy(entry, target, may, score))

    def _need(
        self, event: int, accesses: range, entries: dict[int, Entry], late: Collection[int]
    ) -> Needed:
        """Everything that the routing of an event decides. `outcome` says of every access what it was."""
        caches, (step, layer) = self.caches, divmod(event, self.n_layers)
        if self.machine.cancels:
            self._drop_stale(event)
        caches.tell(event)
        brought = {entry for entry in entries.values() if entry in self.beside}
        order, missing, at_once = list[int](), list[int](), 0
        is_big = caches.is_big(accesses, layer)
        for number, wave in enumerate(caches.waves(accesses, layer)):
            order += wave
            missing += self._classify(wave, entries, late, brought)
            placed = caches.run(
                wave,
                step,
                layer,
                pinned=set(self.arrives) if self.arrives else (),
                loads=self.machine.miss_way == WAIT,
                brought=brought,
            )
            if number == 0:
                at_once = len(placed) - (
                    sum(entry in brought for entry in placed) if brought else 0
                )
        for entry in brought:
            del self.beside[entry]
        if self.beside:
            self._drop_beside(event)
        return Needed(order, missing, at_once, is_big)

    def _classify(
        self,
        wave: Sequence[int],
        entries: dict[int, Entry],
        late: Collection[int],
        brought: Collection[Entry],
    ) -> list[int]:
        """What each access is; those that are missing."""
        missing, outcome, unused = list[int](), self.outcome, self.unused
        there = self.caches.of(entries[wave[0]][0]).slot
        for a in wave:
            entry = entries[a]
            if entry not in there and entry not in brought:
                outcome[a] = MISS
                missing.append(a)
                continue
            outcome[a] = LATE if a in late else HIT
            if entry in unused:
                unused.discard(entry)
                self.counts["prefetch_used"] += 1
        return missing

    def _is_there(self, entry: Entry) -> bool:
        return self.caches.has(entry) or entry in self.beside

    def _rank(self, copy: Copy) -> int:
        if not copy.is_guess:
            return -NEVER_STALE
        return copy.score if self.machine.by_score else -copy.target

    def _start(self, copy: Copy, step: int, pinned: Pinned) -> bool:
        """It takes its place when its first chunk moves: in the cache, or beside it."""
        size = self.bytes_L[copy.entry[0]] if copy.is_guess else 0
        if self._is_there(copy.entry):
            return False  # came on demand meanwhile
        if self.spent + size > self.machine.budget_bytes:
            return False
        if not self.storage.has(copy.entry):
            return False  # the host has forgotten it
        if copy.is_guess and self.machine.landing:
            self.beside[copy.entry] = copy.target
        elif not self._take_place(copy, step, pinned):
            return False
        self.storage.remember(copy.entry, 0)
        self.spent += size
        self.arrives[copy.entry] = None
        self.unused.add(copy.entry)
        self.counts["prefetch_loads"] += 1
        return True

    def _take_place(self, copy: Copy, step: int, pinned: Pinned) -> bool:
        """In the cache, in the place of others, where anybody may leave for it."""
        caches, layer = self.caches, copy.entry[0]
        meant_for = min(step + 1, copy.target // self.n_layers)
        seen = caches.seen(copy.entry, meant_for, score=copy.score)
        cache, size = caches.of(layer), caches.size_L[layer]
        if cache.left < size:
            busy = {*pinned, *self.arrives}
            if self.machine.protects and copy.is_guess:
                busy |= {(layer, expert) for expert, _ in self.guessed(copy.target)}
            if not caches.make_room(copy.entry, busy, seen):
                return False
        cache.fill(copy.entry, size, seen)
        return True

    def _left(self, entry: Entry) -> None:
        self.arrives.pop(entry, None)
        if entry in self.unused:
            self.unused.discard(entry)
            self.counts["prefetch_unused"] += 1
            self.counts["wasted_bytes"] += self.bytes_L[entry[0]]

    def _drop_stale(self, event: int) -> None:
        """The routing of this event is known: what is queued for it is not needed, or is wanted at once."""
        if self.storage.queue:
            self.storage.drop_stale(event)
        stale = [copy for copy in self.queue if copy.target <= event] if self.queue else []
        for copy in stale:
            self.queue.remove(copy)
            if not copy.chunks_done:
                self.counts["prefetch_dropped"] += 1
                continue
            whole = self.bytes_L[copy.entry[0]]
            moved = min(whole, copy.chunks_done * self.machine.chunk_bytes)
            self.counts["moved_bytes"] += moved
            self.counts["wasted_bytes"] += moved - whole  # `_left` counts all of it
            if self.beside.pop(copy.entry, None) is None:
                self.caches.of(copy.entry[0]).remove(copy.entry)
            self._left(copy.entry)

    def _drop_beside(self, event: int) -> None:
        """What lies beside the cache and was meant for an event that did not ask for it; unless it is still copied."""
        for entry, target in [*self.beside.items()]:
            if target <= event and self.arrives.get(entry, 0) is not None:
                del self.beside[entry]
                self._left(entry)

    def _next(self, link_free: int) -> Copy | None:
        """Whose copy is next, of those that wait and have a place to go to."""
        if not self.queue:
            return None
        begun = [copy for copy in self.queue if copy.chunks_done]
        is_full = 0 < self.machine.landing == len(self.beside)  # guesses wait for a place
        waiting = [copy for copy in self.queue if not (copy.is_guess and is_full)]
        return next_of(begun or waiting, link_free, self._rank)
