"""What a timed replay is, in plain Python: slow, and the definition that the compiled engine is held to.

Copies are objects, the link is stepped chunk by chunk; what is decided stands in `ahead`, the caches in `reference`.
Read this to know what a stall is.
"""

from __future__ import annotations

from typing import Any

from prefetch.sim.engines.ahead import Ahead, Pinned
from prefetch.sim.engines.machine import BOTH, WAIT
from prefetch.sim.engines.pool import AFTER_USE, HIT, MISS, OVERSHOOT
from prefetch.sim.engines.reference import Entry
from prefetch.sim.engines.storage_reference import NEVER_STALE, Copy


class TimedReplay(Ahead):
    """Runs a workload event by event; afterwards `outcome`, `time_S` and `counts` say what happened."""

    def __init__(self, *told: Any, **start: Any) -> None:
        super().__init__(*told, **start)
        self.outcome, self.time_S = [MISS] * self.work.n_accesses, [0] * self.work.n_steps
        self.now = self.link_free = 0
        self.missing = list[int]()  # of the event, as they are loaded or computed

    def run(self) -> TimedReplay:
        n_layers = self.work.card.n_layers
        for event in range(len(self.work.start_V) - 1):
            (step, layer), began = divmod(event, n_layers), self.now
            if layer == 0:
                self.host = max(self.host, self.now) if self.width else self.host
                self._begin_step(event)
            accesses = range(self.work.start_V[event], self.work.start_V[event + 1])
            if accesses:
                self._event(event, step, layer, accesses)
            else:
                self.caches.tell(event)
            self.time_S[step] += self.now - began
        self.counts["now_ns"] = self.now
        return self

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
        needed = self._need(event, accesses, entries, arrival)
        order, missing, at_once = needed.order, needed.missing, needed.at_once
        if self.machine.landing:  # no guess that waited for a place begins before
            self.link_free = max(self.link_free, now)

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
        self._enqueue_next(event, layer)
        if self.machine.miss_way == WAIT:
            if needed.is_big or caches.semantics == AFTER_USE:
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

    def _land(self, now: int) -> None:
        landed = [entry for entry, at in self.arrives.items() if at is not None and at <= now]
        for entry in landed:
            del self.arrives[entry]

    def _run_link(self, until: int, step: int, pinned: Pinned) -> None:
        """Chunks of queued copies, as long as they begin before `until`."""
        while True:
            copy = self._next(self.link_free)
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
