"""The caches of `reference`, sooner: the same decisions in the same order, for whoever cannot look through them.

They know no clock either. Who may leave, and with which key, is an array that is kept as it changes: a victim is its
lowest number. A policy with a state is handed that array, and asked compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numba import njit, typeof
from numba.core.errors import NumbaError

from prefetch.sim.engines.pool import ATOMIC
from prefetch.sim.engines.reference import NOBODY, Cache, Caches, Entry
from prefetch.sim.policy import BUSY, KeyRules, Policy, Seen
from prefetch.sim.workload import Workload

log = logging.getLogger(__name__)
seen_as: Callable[[tuple[int, ...]], Seen] = partial(tuple.__new__, Seen)  # half the time of Seen()


class QuickCache(Cache):
    """`low_N`: of whoever may leave its key, with a state 0; BUSY of all other slots."""

    def __init__(self, policy: Policy, room: int, n_slots: int, *sizes: int) -> None:
        super().__init__(policy, room, n_slots, *sizes)
        self.who: list[Entry | None] = [None] * n_slots
        self.low_N = np.full(n_slots, BUSY)
        self.find = self._lowest if isinstance(self.rules, KeyRules) else self._victim

    def evict(self, busy: Collection[Entry], seen: Seen) -> Entry | None:
        slot = self.find(busy, seen)
        entry = self.who[slot] if slot >= 0 else None
        if entry is not None:
            del self.slot[entry]
            self._vacate(slot)
        return entry

    def remove(self, entry: Entry) -> None:
        self._vacate(self.slot.pop(entry))

    def _vacate(self, slot: int) -> None:
        self.left += self.size.pop(slot)
        self.free.append(slot)
        self.who[slot], self.low_N[slot] = None, BUSY

    def fill(self, entry: Entry, size: int, seen: Seen) -> None:
        slot = self.slot[entry] = self.free.pop()
        self.size[slot], self.who[slot] = size, entry
        self.left -= size
        low = 0
        if isinstance(self.rules, KeyRules):
            low = self.key[slot] = self.rules.on_fill(seen)
        else:
            self.rules.filled(self.state, self.n_slots, slot, seen)
        if entry not in self.pinned:
            self.low_N[slot] = low

    def use(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        super().use(entry, is_new, seen)
        slot = self.slot[entry]
        if isinstance(self.rules, KeyRules) and entry not in self.pinned:
            self.low_N[slot] = self.key[slot]

    def _lowest(self, busy: Collection[Entry], _: Seen) -> int:
        """The lowest slot of the lowest key. Whoever is in use was used lately: few are passed by."""
        low_N, who, passed, slot = self.low_N, self.who, list[int](), -1
        while self.n_slots:
            slot = int(low_N.argmin())
            if low_N[slot] == BUSY:
                slot = -1
                break
            if who[slot] not in busy:
                break
            passed.append(slot)
            low_N[slot] = BUSY
        for held in passed:
            low_N[held] = self.key[held]
        return slot

    def _victim(self, busy: Collection[Entry], seen: Seen) -> int:
        assert not isinstance(self.rules, KeyRules)
        held = [self.slot[entry] for entry in busy if entry in self.slot]
        before_H = self.low_N[held]
        self.low_N[held] = BUSY
        leaver = int(compiled(self.rules.victim)(self.state, self.n_slots, self.low_N, seen))
        self.low_N[held] = before_H
        return leaver


@cache
def compiled(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A policy's `victim`, kept on disk where it is in a file; what cannot be compiled runs as it stands."""
    told = (np.zeros(1, np.int64), 1, np.zeros(1, np.int64), NOBODY)
    try:
        made = njit(cache=Path(rule.__code__.co_filename).is_file())(rule)
        made.compile(tuple(map(typeof, told)))
    except NumbaError as error:
        text = str(error).strip().splitlines()[0]
        log.warning("%s.%s runs uncompiled: %s", rule.__module__, rule.__qualname__, text)
        return rule
    return cast(Callable[..., Any], made)


class QuickCaches(Caches):
    """Takes what `Caches` takes."""

    cache_of = QuickCache

    def __init__(self, work: Workload, policy: Policy, *told: Any, **start: Any) -> None:
        super().__init__(work, policy, *told, **start)
        self.n_experts = work.card.n_experts
        is_told = self.next_A is not None or len(self.told.kind_V)
        self.knows_uses_only = isinstance(policy.rules, KeyRules) and not is_told

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
        if not self.knows_uses_only or self.semantics != ATOMIC:
            return super().run(wave, step, layer, pinned=pinned, loads=loads, brought=brought)
        slots, ids_A = self.of(layer).slot, self.work.ids_A
        ids = (
            ids_A[wave.start : wave.stop].tolist() if type(wave) is range else ids_A[wave].tolist()
        )
        entries = [(layer, expert) for expert in ids]
        missing = [entry for entry in entries if entry not in slots]
        wanted = missing if loads else [entry for entry in missing if entry in brought]
        placed = self._place(wanted, {*entries, *pinned}, step, layer) if wanted else []
        self._use(entries, step, layer)
        return placed

    def _place(
        self, wanted: Sequence[Entry], busy: Collection[Entry], step: int, layer: int
    ) -> list[Entry]:
        """Of `make_room` and `fill`, for all that are missing: calls would take longer than what they do."""
        cache, size, placed = self.of(layer), self.size_L[layer], list[Entry]()
        assert isinstance(cache, QuickCache) and isinstance(cache.rules, KeyRules)
        slots, who, key, low_N = cache.slot, cache.who, cache.key, cache.low_N
        uses, first, on_fill = self.uses, layer * self.n_experts, cache.rules.on_fill
        for entry in wanted:
            self.now += 1
            seen = seen_as((self.now, step, first + entry[1], uses.get(entry, 0), 0, 0))
            while cache.left < size:
                if (leaver := cache.evict(busy, seen)) is None:
                    self.now += len(wanted) - len(placed) - 1  # nobody, for none of the others
                    return placed
                self.on_leave(leaver)
            slot = slots[entry] = cache.free.pop()
            cache.size[slot], who[slot] = size, entry
            cache.left -= size
            key[slot] = on_fill(seen)
            if entry not in cache.pinned:
                low_N[slot] = key[slot]
            placed.append(entry)
        return placed

    def _use(self, entries: Sequence[Entry], step: int, layer: int) -> None:
        """Of `QuickCache.use`, event by event."""
        cache, uses, first, now = self.of(layer), self.uses, layer * self.n_experts, self.now
        assert isinstance(cache, QuickCache) and isinstance(cache.rules, KeyRules)
        slots, key, pinned = cache.slot, cache.key, cache.pinned
        low_N, on_use = cache.low_N, cache.rules.on_use
        for entry in entries:
            uses[entry] = n_uses = uses.get(entry, 0) + 1
            if (slot := slots.get(entry)) is None:
                continue
            now += 1
            seen = seen_as((now, step, first + entry[1], n_uses, 0, 0))
            key[slot] = on_use(key[slot], seen)
            if entry not in pinned:
                low_N[slot] = key[slot]
        self.now = now
