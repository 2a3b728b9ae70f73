"""A device that is not there: a virtual clock, and a check that nothing is read before it was written, or overwritten
while it is read. Deterministic; the host takes no time but what a copy's issue costs.

The check does not depend on how long anything takes: every operation knows which earlier ones it is certain to follow
(vector clocks, Mattern 1988), so that a missing wait is found even where the order happened to be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefetch.engine.backend import COMPUTE, COPY, EngineError
from prefetch.sim.engines.machine import Machine
from prefetch.sim.engines.reference import Entry

Clock = Counter[str]  # operations of each stream that are certain to have ended


@dataclass(frozen=True)
class Moment:
    at_ns: int
    clock: Clock


@dataclass
class Slot:
    """Who was copied here last, by which operation, and who has read it since."""

    entry: Entry
    written: int
    readers: list[int] = field(default_factory=list)


class FakeBackend:
    """Runs the costs of a `Machine`. `copies` lists what was copied, in order."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.host_ns = self.link_ns = self.n_copies = 0
        self.free_ns = {COPY: 0, COMPUTE: 0}
        self.known: dict[str, Clock] = {COPY: Counter(), COMPUTE: Counter()}
        self.host: Clock = Counter()
        self.slots: dict[int, Slot] = {}
        self.table: dict[Entry, int] = {}
        self.waited_ns: Counter[str] = Counter()
        self.copies: list[tuple[Entry, int]] = []

    def now_ns(self) -> int:
        return self.host_ns

    def spend(self, ns: int) -> None:
        self.host_ns += ns

    def before(self, step: int, layer: int) -> None:
        self._run(COMPUTE, int(self.machine.before_S[step]))

    def copy(self, entry: Entry, slot: int) -> None:
        self.host_ns += self.machine.issue_ns
        self.n_copies += 1
        took = int(self.machine.whole_ns_L[entry[0]])
        self.link_ns += took
        now = self._run(COPY, took)
        held = self.slots.get(slot)
        for reader in held.readers if held else ():
            if self.known[COPY][COMPUTE] < reader:
                raise EngineError(
                    f"race: slot {slot} is overwritten with {entry} while launch {reader} may still read "
                    f"{held.entry if held else None} in it"
                )
        self.slots[slot] = Slot(entry, now)
        self.copies.append((entry, slot))

    def publish(self, layer: int, slots: Mapping[int, int]) -> None:
        for expert, slot in slots.items():
            self._need_payload((layer, expert), slot, "its slot is published")
            self.table[layer, expert] = slot

    def launch(self, layer: int, tokens: Mapping[int, int]) -> None:
        machine = self.machine
        weight, token = int(machine.weight_ns_L[layer]), int(machine.token_ns_L[layer])
        now = self._run(COMPUTE, sum(max(weight, token * n) for n in tokens.values()))
        for expert in tokens:
            slot = self.table.get((layer, expert), -1)
            self._need_payload((layer, expert), slot, "it is read")
            self.slots[slot].readers.append(now)

    def combine(self, layer: int) -> None: ...

    def record(self, stream: str) -> Moment:
        at_ns = max(self.free_ns[stream], self.host_ns)  # on a stream that is idle: now
        return Moment(at_ns, self.known[stream].copy())

    def after(self, stream: str, done: Moment, reason: str = "") -> None:
        idle = max(0, done.at_ns - max(self.free_ns[stream], self.host_ns))
        self.waited_ns[reason] += idle if reason else 0
        self.free_ns[stream] = max(self.free_ns[stream], done.at_ns)
        self.known[stream] |= done.clock

    def is_done(self, done: Moment) -> bool:
        if done.at_ns <= self.host_ns:
            self.host |= done.clock
            return True
        return False

    def wait(self, any_of: Sequence[Moment]) -> None:
        first = min(any_of, key=lambda done: done.at_ns)
        self.host_ns = max(self.host_ns, first.at_ns)
        self.host |= first.clock

    def close(self) -> None: ...

    def _run(self, stream: str, took_ns: int) -> int:
        """What is put on a stream follows what the host knows to have ended. Its number on the stream."""
        self.known[stream] |= self.host
        self.known[stream][stream] += 1
        self.free_ns[stream] = max(self.free_ns[stream], self.host_ns) + took_ns
        return self.known[stream][stream]

    def _need_payload(self, entry: Entry, slot: int, what: str) -> None:
        held = self.slots.get(slot)
        if held is None or held.entry != entry:
            found = held.entry if held else "nothing"
            raise EngineError(
                f"race: {entry} is looked for in slot {slot}, where {found} was copied to"
            )
        if (self.known[COMPUTE] | self.host)[COPY] < held.written:
            raise EngineError(f"race: {entry} may still be on its way to slot {slot} when {what}")
