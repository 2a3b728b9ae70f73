"""What a replay is, in plain Python: slow, and the definition that the compiled engine is held to.

It shares with the engine the rules of policies and nothing else, and takes any object that has rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.pool import (
    AFTER_USE,
    ATOMIC,
    FIRST,
    HIT,
    MISS,
    NOTHING_TOLD,
    OVERSHOOT,
    SEQUENTIAL,
    UNTOLD,
    Told,
)
from prefetch.sim.policy import BUSY, KeyRules, Policy, Seen, settings_of
from prefetch.sim.workload import Workload, next_uses

Entry = tuple[int, int]  # layer, expert
NOBODY = Seen(0, 0, 0, 0, 0, 0)


def replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    semantics: int = ATOMIC,
    **start: Any,
) -> list[int]:
    """HIT or MISS of every access. `size_L` are units per expert, `room_G` units per cache: one, or one per layer.

    `start`: rows that the policy is told, and who is there from the start, as `Caches` takes them.
    """
    caches = Caches(work, policy, room_G, size_L, semantics, **start)
    outcome = [MISS] * work.n_accesses
    for event in range(len(work.start_V) - 1):
        step, layer = divmod(event, work.card.n_layers)
        caches.tell(event)
        for wave in caches.waves(range(work.start_V[event], work.start_V[event + 1]), layer):
            for a in wave:
                outcome[a] = HIT if caches.has(caches.entry(a, layer)) else MISS
            caches.run(wave, step, layer)
    return outcome


class Cache:
    """One cache: who is in it, and in which slot."""

    def __init__(
        self, policy: Policy, room: int, n_slots: int, n_entries: int, capacity: int
    ) -> None:
        self.rules, self.room, self.left, self.n_slots = policy.rules, room, room, n_slots
        self.slot: dict[Entry, int] = {}
        self.pinned = set[Entry]()
        self.free = list(range(n_slots))[::-1]
        self.size: dict[int, int] = {}
        self.key = [0] * n_slots
        if not isinstance(self.rules, KeyRules):
            self.state = np.zeros(self.rules.state_size(n_slots, n_entries), np.int64)
            self.rules.start(self.state, capacity, *settings_of(policy))

    def evict(self, busy: Collection[Entry], seen: Seen) -> Entry | None:
        """Who leaves; None where nobody may."""
        stays = {*busy, *self.pinned}
        movable = {slot: entry for entry, slot in self.slot.items() if entry not in stays}
        if isinstance(self.rules, KeyRules):
            leaver = min(movable, key=lambda slot: (self.key[slot], slot), default=-1)
        else:
            busy_N = np.array([0 if slot in movable else BUSY for slot in range(self.n_slots)])
            leaver = int(self.rules.victim(self.state, self.n_slots, busy_N, seen))
        if leaver < 0:
            return None
        entry = movable[leaver]
        self.remove(entry)
        return entry

    def remove(self, entry: Entry) -> None:
        slot = self.slot.pop(entry)
        self.left += self.size.pop(slot)
        self.free.append(slot)

    def fill(self, entry: Entry, size: int, seen: Seen) -> None:
        slot = self.slot[entry] = self.free.pop()
        self.size[slot] = size
        self.left -= size
        if isinstance(self.rules, KeyRules):
            self.key[slot] = self.rules.on_fill(seen)
        else:
            self.rules.filled(self.state, self.n_slots, slot, seen)

    def use(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        slot = self.slot[entry]
        if isinstance(self.rules, KeyRules):
            self.key[slot] = self.rules.on_use(self.key[slot], seen)
        else:
            self.rules.used(self.state, self.n_slots, slot, is_new, seen)


class Caches:
    """All caches of a run, and what policies are told of experts."""

    cache_of: type[Cache] = Cache

    def __init__(
        self,
        work: Workload,
        policy: Policy,
        room_G: Sequence[int],
        size_L: Sequence[int],
        semantics: int = ATOMIC,
        *,
        told: Told = NOTHING_TOLD,
        warm: Sequence[int] = (),
        pinned: Sequence[int] = (),
    ) -> None:
        card, self.work, self.size_L, self.told = work.card, work, size_L, told
        self.semantics = AFTER_USE if policy.after_use and semantics == ATOMIC else semantics
        self.next_A: NDArray[np.int64] | None = None
        self.coming: dict[Entry, int] = {}  # the access that next needs an expert
        if "future" in policy.needs:
            self.next_A, first_LE = next_uses(work)
            self.coming = {(i, e): int(a) for (i, e), a in np.ndenumerate(first_LE)}
        self.uses: dict[Entry, int] = {}
        self.now = 0
        self.on_leave: Callable[[Entry], None] = lambda entry: None
        spare = 2 * card.n_experts if self.semantics in (OVERSHOOT, AFTER_USE) else 0
        layers_G = [[layer] for layer in range(card.n_layers)]
        if len(room_G) == 1:
            layers_G = [list(range(card.n_layers))]
        self.caches = []
        for room, layers in zip(room_G, layers_G, strict=True):
            n_entries = len(layers) * card.n_experts
            most = room // min(size_L[layer] for layer in layers)
            slots, capacity = min(n_entries, most + spare), min(n_entries, most)
            self.caches.append(self.cache_of(policy, room, slots, n_entries, capacity))
        for cache in self.caches:
            cache.pinned = {divmod(int(name), card.n_experts) for name in pinned}
        self.start([divmod(int(name), card.n_experts) for name in (*pinned, *warm)])

    def start(self, wished: Sequence[Entry]) -> None:
        """As many as there is room for, in their order; whoever stands last is put in first."""
        left, taken = [cache.room for cache in self.caches], dict[Entry, None]()
        for entry in wished:
            group, size = entry[0] if len(self.caches) > 1 else 0, self.size_L[entry[0]]
            if entry not in taken and size <= left[group]:
                left[group] -= size
                taken[entry] = None
        for entry in reversed(taken):
            self.of(entry[0]).fill(entry, self.size_L[entry[0]], self.seen(entry, 0))

    def tell(self, event: int) -> None:
        """Policies that are told rows get those that are known with this event's routing."""
        if not len(self.told.kind_V):
            return
        n_layers, ahead = self.work.card.n_layers, self.told.ahead
        step, layer = divmod(event, n_layers)
        for later in [*range(ahead)] * (layer == 0) + [ahead]:
            if layer + later < n_layers and (kind := self.told.kind_V[event + later]) != UNTOLD:
                cache, row_E = self.of(layer + later), self.told.row_VE[event + later]
                if not isinstance(cache.rules, KeyRules):
                    is_first = bool(kind == FIRST)
                    cache.rules.told(
                        cache.state, cache.n_slots, step, layer + later, row_E, is_first
                    )

    def of(self, layer: int) -> Cache:
        return self.caches[layer if len(self.caches) > 1 else 0]

    def entry(self, a: int, layer: int) -> Entry:
        return layer, int(self.work.ids_A[a])

    def has(self, entry: Entry) -> bool:
        return entry in self.of(entry[0]).slot

    def waves(self, accesses: range, layer: int) -> Sequence[Sequence[int]]:
        """Accesses that are needed at the same time; an event larger than its cache takes several."""
        if self.semantics == SEQUENTIAL:
            return [[a] for a in accesses]
        if not self.is_big(accesses, layer):
            return [accesses] if accesses else []
        order = sorted(accesses, key=lambda a: not self.has(self.entry(a, layer)))
        width = max(1, self.of(layer).room // self.size_L[layer])
        return [order[at : at + width] for at in range(0, len(order), width)]

    def is_big(self, accesses: range, layer: int) -> bool:
        size = len(accesses) * self.size_L[layer]
        return self.semantics == ATOMIC and size > self.of(layer).room

    def run(
        self,
        wave: Sequence[int],
        step: int,
        layer: int,
        *,
        pinned: Collection[Entry] = (),
        loads: bool = True,
        brought: Collection[Entry] = (),
    ) -> list[Entry]:
        """The missing take the places of others, all are used; who found a place.

        `loads`: misses are copied here; `brought`: who was copied beside the cache.
        """
        cache, entries = self.of(layer), [self.entry(a, layer) for a in wave]
        busy = {*entries, *pinned}
        missing = [entry not in cache.slot for entry in entries]
        makes_room_first, placed = self.semantics in (ATOMIC, SEQUENTIAL), list[Entry]()
        for a, entry, is_missing in zip(wave, entries, missing, strict=True):
            if is_missing and (loads or entry in brought):
                seen = self.seen(entry, step, a)
                if not makes_room_first or self.make_room(entry, busy, seen):
                    cache.fill(entry, self.size_L[layer], seen)
                    placed.append(entry)
        for a, entry, is_missing in zip(wave, entries, missing, strict=True):
            self.uses[entry] = self.uses.get(entry, 0) + 1
            if self.next_A is not None:
                self.coming[entry] = int(self.next_A[a])
            if entry in cache.slot:
                cache.use(entry, is_missing, self.seen(entry, step, a))
        if not makes_room_first:
            protected = {*pinned} if self.semantics == AFTER_USE else busy
            while cache.left < 0 and (leaver := cache.evict(protected, NOBODY)):
                self.on_leave(leaver)
        return placed

    def make_room(self, entry: Entry, busy: Collection[Entry], seen: Seen) -> bool:
        cache = self.of(entry[0])
        while cache.left < self.size_L[entry[0]]:
            leaver = cache.evict(busy, seen)
            if leaver is None:
                return False
            self.on_leave(leaver)
        return True

    def seen(self, entry: Entry, step: int, a: int | None = None, score: int = 0) -> Seen:
        """`a`: the access in which it is used; None where it is copied ahead."""
        self.now += 1
        coming = self.coming.get(entry, 0) if a is None else 0
        if a is not None and self.next_A is not None:
            coming = int(self.next_A[a])
        if a is not None and len(self.told.kind_V):
            event = step * self.work.card.n_layers + entry[0]
            score = int(self.told.row_VE[event, entry[1]])
        name = entry[0] * self.work.card.n_experts + entry[1]
        return Seen(self.now, step, name, self.uses.get(entry, 0), coming, score)
