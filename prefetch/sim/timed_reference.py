"""What a timed replay is, in plain Python: slow, and the definition that the compiled engine is held to.

Copies are objects, the link is stepped chunk by chunk, the caches are those of `reference`. Read this to know what a
stall is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from prefetch.sim.machine import BOTH, COUNTS, WAIT, Guesses, Machine
from prefetch.sim.policy import Policy
from prefetch.sim.pool import AFTER_USE, ATOMIC, EMPTY, HIT, LATE, MISS, OVERSHOOT
from prefetch.sim.reference import Caches, Entry
from prefetch.sim.storage_reference import NEVER_STALE, Copy, Storage, next_of
from prefetch.sim.workload import Workload


class TimedReplay:
    """Runs a workload event by event; afterwards `outcome`, `time_S` and `counts` say what happened."""

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
        self.caches = Caches(work, policy, room_G, size_L, semantics, **start)
        self.caches.on_leave = self._left
        self.outcome, self.time_S = [MISS] * work.n_accesses, [0] * work.n_steps
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self.now = self.host = self.link_free = 0
        self.queue: list[Copy] = []  # first come first
        self.most_waiting = (guesses.ahead + 1) * self.guesses.ids_VW.shape[1] + machine.uploads
        self.arrives: dict[
            Entry, int | None
        ] = {}  # copied ahead, not landed; None: chunks are missing
        self.unused: set[Entry] = set()  # copied ahead and not used since
        self.beside: dict[
            Entry, int
        ] = {}  # copied ahead and not in the cache yet: the event that it is meant for
        self.storage = Storage(machine, self.counts, self._rank)
        self.missing = list[int]()  # of the event, as they are loaded or computed
        self.spent = 0  # bytes that guesses have moved in this step

    def run(self) -> TimedReplay:
        n_layers = self.work.card.n_layers
        for event in range(len(self.work.start_V) - 1):
            (step, layer), began = divmod(event, n_layers), self.now
            self.spent = 0 if layer == 0 else self.spent
            if layer == 0 and self._guesses():
                self.host = max(self.host, self.now)
                for target in range(event, event + min(self.guesses.ahead, n_layers)):
                    self._enqueue(target)
            accesses = range(self.work.start_V[event], self.work.start_V[event + 1])
            if accesses:
                self._event(event, step, layer, accesses)
            else:
                self.caches.tell(event)
            self.time_S[step] += self.now - began
        self.counts["now_ns"] = self.now
        return self

    def _guesses(self) -> bool:
        return self.guesses.ids_VW.shape[1] > 0

    def _event(self, event: int, step: int, layer: int, accesses: range) -> None:
        caches, before = self.caches, int(self.machine.before_S[step])
        now = self.now + before
        self.counts["compute_ns"] += before
        self.host = max(self.host, now)
        self._run_link(now, step, ())
        self._land(now)
        entries = {a: caches.entry(a, layer) for a in accesses}
        arrival = {
            a: self._promote(entry, now) for a, entry in entries.items() if entry in self.arrives
        }
        self.storage.take_over({e for e in entries.values() if not self._is_there(e)})
        if self.machine.cancels:
            self._drop_stale(event)
        caches.tell(event)

        brought = {a for a, entry in entries.items() if entry in self.beside}
        order, missing, at_once = list[int](), list[int](), 0
        is_big = caches.is_big(accesses, layer)
        for number, wave in enumerate(caches.waves(accesses, layer)):
            order += wave
            for a in wave:
                is_there = caches.has(entries[a]) or a in brought
                self.outcome[a] = LATE if a in arrival else HIT if is_there else MISS
                missing += [] if is_there else [a]
                if is_there and entries[a] in self.unused:
                    self.unused.discard(entries[a])
                    self.counts["prefetch_used"] += 1
            placed = caches.run(
                wave,
                step,
                layer,
                pinned=set(self.arrives),
                loads=self.machine.miss_way == WAIT,
                brought={entries[a] for a in brought},
            )
            if number == 0:
                at_once = sum(entries[a] in placed for a in missing)
        for a in brought:
            del self.beside[entries[a]]
        self._drop_beside(event, now)

        pinned = set(entries.values())
        gpu, done = now, list[int]()

        def compute(a: int, ready: int, stall: str, in_memory: int = 0) -> None:
            """`in_memory`: since when the host has it; until then it is the disk that is waited for."""
            nonlocal gpu
            weight, token = self.machine.weight_ns_L[layer], self.machine.token_ns_L[layer]
            took = max(int(weight), int(token) * int(self.work.tokens_A[a]))
            self.counts["disk_stall_ns"] += max(0, in_memory - gpu)
            gpu = max(gpu, in_memory)
            self.counts[stall] += max(0, ready - gpu)
            self.counts["compute_ns"] += took
            gpu = max(gpu, ready) + took
            done.append(gpu)

        for a in order:
            if self.outcome[a] == HIT:
                compute(a, now, "stall_ns")
        for a in sorted(arrival, key=lambda a: (arrival[a], a)):
            compute(a, arrival[a], "late_stall_ns")
        asked, in_memory = self.host, dict.fromkeys(missing, 0)
        if self.storage.is_limited and missing:
            while read := self.storage.read_ahead(asked):
                self.queue.append(read)
            in_memory = self.storage.fetch(now, asked, {a: entries[a] for a in missing})
            missing = list(in_memory)
        self.missing = missing
        if self.machine.miss_way == WAIT:
            self.host += len(missing) * self.machine.issue_ns
        elif self.machine.miss_way == BOTH:
            for a in missing:
                self._upload(entries[a], in_memory[a])
        if self._guesses() and layer + self.guesses.ahead < self.work.card.n_layers:
            self._enqueue(event + self.guesses.ahead)
        if self.machine.miss_way == WAIT:
            if is_big or caches.semantics == AFTER_USE:
                room = caches.of(layer).room // caches.size_L[layer]
                at_once = max(0, min(at_once, room - len(done)))
            at_once += self.machine.staging
            for m, a in enumerate(missing):
                may = asked + (m + 1) * self.machine.issue_ns
                if m >= at_once and caches.semantics != OVERSHOOT:
                    may = max(may, done[m - at_once])  # the place of one that is done
                may = max(may, in_memory[a])
                self._run_link(may, step, pinned)
                ready = self._move(max(may, self.link_free), layer, range(self._n_chunks(layer)))
                self.counts["demand_loads"] += 1
                self.counts["moved_bytes"] += int(self.machine.bytes_L[layer])
                compute(a, ready, "stall_ns", in_memory[a])
        elif missing:
            finished = self._on_host(asked, layer, missing)
            self.counts["on_host"] += len(missing)
            self.counts["host_stall_ns"] += max(0, finished - gpu)
            gpu = max(gpu, finished)
            for m, a in enumerate(missing):
                left = sum(self._host_ns(layer, later) for later in missing[m:])
                finished = max(finished, in_memory[a] + left)
            self.counts["disk_stall_ns"] += max(0, finished - gpu)
            gpu, self.host = max(gpu, finished), max(self.host, finished)
        self._run_link(gpu, step, pinned)
        self.now = gpu

    def _n_chunks(self, layer: int) -> int:
        return int(self.machine.n_chunks_L[layer])

    def _move(self, begin: int, layer: int, chunks: range) -> int:
        """When these chunks of a copy are over; the link is theirs."""
        took = sum(int(self.machine.chunk_ns_LX[layer, x]) for x in chunks)
        self.counts["link_ns"] += took
        self.link_free = begin + took
        return self.link_free

    def _left(self, entry: Entry) -> None:
        self.arrives.pop(entry, None)
        if entry in self.unused:
            self.unused.discard(entry)
            self.counts["prefetch_unused"] += 1
            self.counts["wasted_bytes"] += int(self.machine.bytes_L[entry[0]])

    def _land(self, now: int) -> None:
        landed = [entry for entry, at in self.arrives.items() if at is not None and at <= now]
        for entry in landed:
            del self.arrives[entry]

    def _run_link(
        self, until: int, step: int, pinned: Sequence[Entry] | set[Entry] | tuple[()]
    ) -> None:
        """Chunks of queued copies, as long as they begin before `until`."""
        while True:
            copy = self._next()
            begin = max(self.link_free, copy.issued_ns) if copy else NEVER_STALE
            if read := self.storage.read_ahead(min(begin, until)):
                self.queue.append(read)
                continue
            if copy is None or begin >= until:
                return
            layer = copy.entry[0]
            self._land(begin)
            if copy.chunks_done == 0 and not self._start(copy, step, pinned):
                self.counts["prefetch_dropped"] += 1
                self.queue.remove(copy)
                continue
            self._move(begin, layer, range(copy.chunks_done, copy.chunks_done + 1))
            copy.chunks_done += 1
            if copy.chunks_done == self._n_chunks(layer):
                self.arrives[copy.entry] = self.link_free
                self.counts["moved_bytes"] += int(self.machine.bytes_L[layer])
                self.queue.remove(copy)

    def _next(self) -> Copy | None:
        is_full = 0 < self.machine.landing == len(self.beside)  # guesses wait for a place
        waiting = [copy for copy in self.queue if not (copy.is_guess and is_full)]
        begun = [copy for copy in self.queue if copy.chunks_done]
        return next_of(begun or waiting, self.link_free, self._rank)

    def _rank(self, copy: Copy) -> int:
        if not copy.is_guess:
            return -NEVER_STALE
        return copy.score if self.machine.by_score else -copy.target

    def _start(
        self, copy: Copy, step: int, pinned: Sequence[Entry] | set[Entry] | tuple[()]
    ) -> bool:
        """It takes its place when its first chunk moves: in the cache, or beside it."""
        size = int(self.machine.bytes_L[copy.entry[0]]) if copy.is_guess else 0
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

    def _is_there(self, entry: Entry) -> bool:
        return self.caches.has(entry) or entry in self.beside

    def _take_place(
        self, copy: Copy, step: int, pinned: Sequence[Entry] | set[Entry] | tuple[()]
    ) -> bool:
        """In the cache, in the place of others, where anybody may leave for it."""
        caches, layer = self.caches, copy.entry[0]
        meant_for = min(step + 1, copy.target // self.work.card.n_layers)
        seen = caches.seen(copy.entry, meant_for, score=copy.score)
        held = set[Entry]()
        if self.machine.protects and copy.target < len(self.guesses.ids_VW):
            held = {(layer, expert) for expert in self.guesses.ids_VW[copy.target].tolist()}
        if not caches.make_room(copy.entry, {*pinned, *self.arrives, *held}, seen):
            return False
        caches.of(layer).fill(copy.entry, caches.size_L[layer], seen)
        return True

    def _promote(self, entry: Entry, now: int) -> int:
        """A copy under way is needed: what is left of it goes before all others. When it is there."""
        arrival = self.arrives.pop(entry)
        if arrival is not None:
            return arrival
        copy = next(copy for copy in self.queue if copy.entry == entry)
        self.queue.remove(copy)
        layer = entry[0]
        self.counts["moved_bytes"] += int(self.machine.bytes_L[layer])
        chunks = range(copy.chunks_done, self._n_chunks(layer))
        return self._move(max(now, self.link_free), layer, chunks)

    def _drop_stale(self, event: int) -> None:
        """The routing of this event is known: what is queued for it is not needed, or is wanted at once."""
        self.storage.drop_stale(event)
        for copy in [copy for copy in self.queue if copy.target <= event]:
            self.queue.remove(copy)
            if not copy.chunks_done:
                self.counts["prefetch_dropped"] += 1
                continue
            whole = int(self.machine.bytes_L[copy.entry[0]])
            moved = min(whole, copy.chunks_done * self.machine.chunk_bytes)
            self.counts["moved_bytes"] += moved
            self.counts["wasted_bytes"] += moved - whole  # `_left` counts all of it
            if self.beside.pop(copy.entry, None) is None:
                self.caches.of(copy.entry[0]).remove(copy.entry)
            self._left(copy.entry)

    def _drop_beside(self, event: int, now: int) -> None:
        """What lies beside the cache and was meant for an event that did not ask for it; unless it is still copied."""
        for entry, target in [*self.beside.items()]:
            if target <= event and self.arrives.get(entry, 0) is not None:
                del self.beside[entry]
                self._left(entry)
        if self.machine.landing:  # no guess that waited for a place begins before
            self.link_free = max(self.link_free, now)

    def _enqueue(self, target: int) -> None:
        """Guesses about an event join the queue, where they are neither there nor queued."""
        self.host += self.machine.predict_ns
        if target >= len(self.guesses.ids_VW):
            return
        layer = target % self.work.card.n_layers
        scores = self.guesses.score_VW[target].tolist()
        for expert, score in zip(self.guesses.ids_VW[target].tolist(), scores, strict=True):
            queue = [*self.queue, *self.storage.queue]
            if expert == EMPTY or len(queue) == self.most_waiting:
                return
            entry = (layer, expert)
            if not self._is_there(entry) and all(copy.entry != entry for copy in queue):
                self.host += self.machine.issue_ns
                joined = self.queue if self.storage.has(entry) else self.storage.queue
                # its last chunk may still be read
                may = max(self.host, self.storage.there.get(entry, 0))
                joined.append(Copy(entry, target, may, score))

    def _upload(self, entry: Entry, in_memory: int) -> None:
        """An expert that the host computes is copied behind everything else, for its next use."""
        queue = [*self.queue, *self.storage.queue]
        is_full = len(queue) >= min(self.machine.uploads, self.most_waiting)
        if not is_full and all(copy.entry != entry for copy in queue):
            self.host += self.machine.issue_ns
            self.queue.append(Copy(entry, NEVER_STALE, max(self.host, in_memory), 0))

    def _on_host(self, begin: int, layer: int, missing: list[int]) -> int:
        """When the host has computed them; copies that run meanwhile take their share of its memory."""
        work = sum(self._host_ns(layer, a) for a in missing)
        copying, shared = max(0, self.link_free - begin), self.machine.shared_per_1000
        for copy in self.queue:
            left = range(copy.chunks_done, self._n_chunks(copy.entry[0]))
            copying += sum(int(self.machine.chunk_ns_LX[copy.entry[0], x]) for x in left)
        meanwhile = copying * shared // 1000
        if work <= meanwhile:
            return begin + -(-work * 1000 // max(1, shared))
        return begin + copying + work - meanwhile

    def _host_ns(self, layer: int, a: int) -> int:
        weight, token = self.machine.host_weight_ns_L[layer], self.machine.host_token_ns_L[layer]
        return max(int(weight), int(token) * int(self.work.tokens_A[a]))
