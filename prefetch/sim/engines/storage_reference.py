"""A host memory that cannot hold all experts, and the disk behind it, in plain Python.

It knows no cache and no link: `timed_reference` asks when an expert is in the host's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from prefetch.sim.engines.machine import Machine
from prefetch.sim.engines.reference import Entry
from prefetch.sim.workload import NEVER

NEVER_STALE = int(NEVER)  # the event that an upload is meant for


@dataclass(eq=False)
class Copy:
    """A guess in a queue, or on its way."""

    entry: Entry
    target: int  # the event that it is meant for
    issued_ns: int
    score: int
    chunks_done: int = 0

    @property
    def is_guess(self) -> bool:
        return self.target < NEVER_STALE


def next_of(waiting: Sequence[Copy], free: int, rank: Callable[[Copy], int]) -> Copy | None:
    """Who has begun; else of those that may begin first the best, of equals the one that came first."""
    for copy in waiting:
        if copy.chunks_done:
            return copy
    earliest = max(free, min((copy.issued_ns for copy in waiting), default=0))
    may = [copy for copy in waiting if copy.issued_ns <= earliest]
    return max(may, key=rank, default=None)


class Storage:
    """Whoever the host's memory holds and was used longest ago leaves it first. A read waits for no place in it."""

    def __init__(self, machine: Machine, counts: Counter[str], rank: Callable[[Copy], int]) -> None:
        self.machine, self.disk, self.counts, self.rank = machine, machine.disk, counts, rank
        self.is_limited, self.left = self.disk.room_bytes < NEVER, int(self.disk.room_bytes)
        self.there: dict[Entry, int] = {}  # from when on; the one used longest ago first
        self.free = 0
        self.queue: list[Copy] = []
        self.resumed: Copy | None = None  # a read that a demand takes over

    def has(self, entry: Entry) -> bool:
        return not self.is_limited or entry in self.there

    def remember(self, entry: Entry, there_ns: int) -> None:
        """Used now; who was not there is from this time on."""
        size = int(self.machine.bytes_L[entry[0]])
        if not self.is_limited or (entry not in self.there and size > self.disk.room_bytes):
            return
        if entry in self.there:
            there_ns = self.there.pop(entry)
        else:
            while self.left < size:
                oldest = next(iter(self.there))
                del self.there[oldest]
                self.left += int(self.machine.bytes_L[oldest[0]])
            self.left -= size
        self.there[entry] = there_ns

    def read_ahead(self, until: int) -> Copy | None:
        """Chunks of guesses that begin before `until`, to the end of one: it can be copied from now on."""
        while copy := next_of(self.queue, self.free, self.rank):
            begin = max(self.free, copy.issued_ns)
            if begin >= until:
                return None
            self._read(begin, copy.entry[0], range(copy.chunks_done, copy.chunks_done + 1))
            copy.chunks_done += 1
            if copy.chunks_done == self._n_chunks(copy.entry[0]):
                self.queue.remove(copy)
                self._count(copy.entry[0])
                self.remember(copy.entry, self.free)
                copy.chunks_done, copy.issued_ns = 0, self.free
                return copy  # it may be copied before the next is read
        return None

    def take_over(self, needed: Collection[Entry]) -> None:
        """A guess that is being read is needed: what is left of it is read first, for whoever needs it."""
        for copy in self.queue:
            if copy.chunks_done and copy.entry in needed and not self.has(copy.entry):
                self.resumed = copy
                self._drop(copy)
                return

    def drop_stale(self, event: int) -> None:
        """The routing of this event is known: guesses about it are read no further."""
        for copy in [copy for copy in self.queue if copy.target <= event]:
            self._drop(copy)
            whole = int(self.machine.bytes_L[copy.entry[0]])
            self.counts["disk_bytes"] += min(whole, copy.chunks_done * self.disk.chunk_bytes)

    def fetch(self, now: int, asked: int, missing: Mapping[int, Entry]) -> dict[int, int]:
        """When each missing expert is in the host's memory, in that order.

        First who is there, then who arrives, then who is being read, then the others, read one after the other.
        """
        there = {a: max(now, self.there.get(entry, NEVER_STALE)) for a, entry in missing.items()}
        for entry in missing.values():
            self.remember(entry, now)
        resumed, self.resumed = self.resumed, None
        if resumed is not None:
            there |= {a: NEVER_STALE - 1 for a, entry in missing.items() if entry == resumed.entry}
        for a in sorted(missing, key=lambda a: there[a]):
            entry, at = missing[a], there.pop(a)
            if at < NEVER_STALE - 1:
                there[a] = at
                continue
            begun = resumed.chunks_done if resumed and resumed.entry == entry else 0
            chunks = range(begun, self._n_chunks(entry[0]))
            there[a] = self._read(max(asked, self.free), entry[0], chunks)
            self._count(entry[0])
            if entry in self.there:
                self.there[entry] = there[a]
        return there

    def _drop(self, copy: Copy) -> None:
        self.queue.remove(copy)
        self.counts["prefetch_dropped"] += 1

    def _n_chunks(self, layer: int) -> int:
        return int(self.disk.n_chunks_L[layer])

    def _count(self, layer: int) -> None:
        self.counts["disk_loads"] += 1
        self.counts["disk_bytes"] += int(self.machine.bytes_L[layer])

    def _read(self, begin: int, layer: int, chunks: range) -> int:
        took = sum(int(self.disk.chunk_ns_LX[layer, x]) for x in chunks)
        self.counts["disk_ns"] += took
        self.free = begin + took
        return self.free
