"""Policies beside the lists and counters that their papers speak of: the same one leaves, whoever has to stay.

Rules are driven straight, one cache at a time: events of several experts, larger than the cache too, copies made
ahead that nobody has used yet, and experts that are taken away without a word.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.reference import NOBODY, Cache
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lfru import Lfru
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.random import Random
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policy import BUSY, STAYS, Policy, Seen, StateRules

Entry = tuple[int, int]
LAYER = 2  # whose cache it is: names of its experts do not begin at 0


class Ranked:
    """Whoever ranks lowest by what is known of it leaves, of equals the one in the lowest slot."""

    most_gone = 2

    def __init__(self, rank: Callable[[Ranked, Entry], Any]) -> None:
        self.rank, self.now = rank, 0
        self.loaded: dict[Entry, int] = {}
        self.touched: dict[Entry, tuple[int, int]] = {}  # for which step, and when
        self.uses, self.uses_in_all = Counter[Entry](), Counter[Entry]()

    def filled(self, entry: Entry, seen: Seen) -> None:
        self.loaded[entry], self.uses[entry] = seen.now, 0
        self._touch(entry, seen)

    def used(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        self.uses[entry] += 1
        self.uses_in_all[entry] += 1
        self._touch(entry, seen)

    def _touch(self, entry: Entry, seen: Seen) -> None:
        self.touched[entry], self.now = (seen.step, seen.now), seen.now

    def passed(self, entry: Entry) -> None:
        """Used, and not kept."""
        self.uses_in_all[entry] += 1

    def gone(self, entry: Entry) -> None:
        """Only those who are there are ranked."""

    def leaver(self, comes: Entry | None, slots: dict[Entry, int], seen: Seen) -> Entry | None:
        """`slots`: of those who may leave."""
        self.now = max(self.now, seen.now)
        return min(slots, key=lambda one: (self.rank(self, one), slots[one]), default=None)


class Queues:
    """Lists, oldest first: who must stay is passed over, and keeps its place."""

    lists: tuple[list[Entry], ...]  # of those who are there
    most_gone = 2  # at once

    def gone(self, entry: Entry) -> None:
        next(one for one in self.lists if entry in one).remove(entry)

    def passed(self, entry: Entry) -> None:
        """Nobody remembers."""


class BookSieve(Queues):
    """One queue, marks, and a hand that goes from old to new and then to the oldest."""

    most_gone = 1  # of two, the hand would stay with the newest until its slot is taken

    def __init__(self, capacity: int) -> None:
        self.queue, self.marked = list[Entry](), set[Entry]()
        self.lists, self.hand = (self.queue,), None

    def filled(self, entry: Entry, seen: Seen) -> None:
        self.queue.append(entry)
        self.marked.discard(entry)

    def used(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        if not is_new:
            self.marked.add(entry)

    def gone(self, entry: Entry) -> None:
        if entry == self.hand:
            self.hand = ([*self.queue, None])[self.queue.index(entry) + 1]
        super().gone(entry)

    def leaver(self, comes: Entry | None, slots: dict[Entry, int], seen: Seen) -> Entry | None:
        at = self.queue.index(self.hand) if self.hand else 0
        while slots:
            one = self.queue[at % len(self.queue)]
            if one in slots and one not in self.marked:
                self.hand = one
                self.gone(one)
                return one
            self.marked -= {one} & slots.keys()
            at += 1
        return None


class BookS3Fifo(Queues):
    """A small queue, a main one, and whom the small one has sent away."""

    def __init__(self, capacity: int) -> None:
        self.small, self.main, self.ghosts = list[Entry](), list[Entry](), list[Entry]()
        self.lists = self.small, self.main
        self.small_room, self.ghost_room = max(1, capacity // 10), capacity * 9 // 10
        self.main_room, self.has_evicted = capacity - self.small_room, False
        self.uses, self.back = Counter[Entry](), set[Entry]()

    def recall(self, entry: Entry) -> None:
        if entry in self.ghosts:
            self.ghosts.remove(entry)
            self.back.add(entry)

    def filled(self, entry: Entry, seen: Seen) -> None:
        self.recall(entry)
        is_early = not self.has_evicted and len(self.small) >= self.small_room
        (self.main if entry in self.back or is_early else self.small).append(entry)
        self.back.discard(entry)
        self.uses[entry] = 0

    def used(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        self.uses[entry] = min(3, self.uses[entry] + (not is_new))

    def leaver(self, comes: Entry | None, slots: dict[Entry, int], seen: Seen) -> Entry | None:
        if comes:
            self.recall(comes)
        self.has_evicted = True
        found = self.from_main(slots) if len(self.main) > self.main_room else None
        return found or self.from_small(slots) or self.from_main(slots)

    def from_small(self, slots: dict[Entry, int]) -> Entry | None:
        for one in [one for one in self.small if one in slots]:
            self.small.remove(one)
            if self.uses[one] < 2:
                self.ghosts.append(one)
                del self.ghosts[: max(0, len(self.ghosts) - self.ghost_room)]
                return one
            self.main.append(one)
            self.uses[one] = 0
        return None

    def from_main(self, slots: dict[Entry, int]) -> Entry | None:
        while one := next((one for one in self.main if one in slots), None):
            self.main.remove(one)
            if self.uses[one] == 0:
                return one
            self.main.append(one)
            self.uses[one] -= 1
        return None


class BookArc(Queues):
    """Used once, used more than once, and whom each of the two has sent away; the share of the first is learned."""

    def __init__(self, capacity: int) -> None:
        self.lists, self.ghosts = ([], []), ([], [])
        self.capacity, self.target = capacity, Fraction(0)
        self.back: dict[Entry, int] = {}  # from which ghosts

    def recall(self, entry: Entry) -> None:
        for which, sign in (0, 1), (1, -1):
            if entry in self.ghosts[which]:
                ratio = Fraction(len(self.ghosts[1 - which]), len(self.ghosts[which]))
                target = self.target + sign * max(1, ratio)
                self.target = min(Fraction(self.capacity), max(Fraction(0), target))
                self.ghosts[which].remove(entry)
                self.back[entry] = which
                return

    def filled(self, entry: Entry, seen: Seen) -> None:
        self.recall(entry)
        self.lists[self.back.pop(entry, None) is not None].append(entry)

    def used(self, entry: Entry, is_new: bool, seen: Seen) -> None:
        if not is_new:
            self.gone(entry)
            self.lists[1].append(entry)

    def leaver(self, comes: Entry | None, slots: dict[Entry, int], seen: Seen) -> Entry | None:
        if comes:
            self.recall(comes)
        which = self.back.get(comes) if comes else None
        is_remembered = which is not None or self.forget_one()
        n_once = len(self.lists[0])
        is_once = n_once > self.target or (n_once == self.target and which == 1)
        for number in (0, 1) if is_once else (1, 0):
            for one in [one for one in self.lists[number] if one in slots]:
                self.lists[number].remove(one)
                self.ghosts[number].extend([one] * is_remembered)
                return one
        return None

    def forget_one(self) -> bool:
        """A newcomer's place in the directory; False where whoever leaves has none any more."""
        (once, often), (no_more, no_longer) = self.lists, self.ghosts
        if len(once) + len(no_more) >= self.capacity:
            if not no_more:
                return False
            del no_more[0]
        elif len(once) + len(often) + len(no_more) + len(no_longer) >= 2 * self.capacity:
            del no_longer[:1]
        return True


RANKS: dict[Policy, Callable[[Ranked, Entry], Any]] = {
    Lru(): lambda book, one: book.touched[one][1],
    Fifo(): lambda book, one: book.loaded[one],
    Lfu(): lambda book, one: (book.uses[one], book.touched[one][1]),
    LfuPersistent(): lambda book, one: (book.uses_in_all[one], book.touched[one][1]),
    LeastStale(): lambda book, one: book.touched[one],
    Lfru(): lambda book, one: Fraction(book.uses[one], book.now - book.touched[one][1] + 1),
}
BOOKS: list[tuple[Policy, Callable[[int], Any]]] = [
    *[(policy, lambda capacity, rank=rank: Ranked(rank)) for policy, rank in RANKS.items()],
    (Sieve(), BookSieve),
    (S3Fifo(), BookS3Fifo),
    (Arc(), BookArc),
]


class Driven:
    """One cache and its book, asked the same; some experts are liked more than others, and come back soon."""

    def __init__(
        self, policy: Policy, book: Any, seed: int, capacity: int, *, is_after: bool = False
    ) -> None:
        """`is_after`: all of an event are loaded first, and room is made when they are used."""
        self.n_experts, self.is_after = 2 * capacity + 2, is_after
        n_slots = self.n_experts if is_after else capacity
        self.cache = Cache(policy, capacity, n_slots, self.n_experts, capacity)
        self.book, self.rng, self.now, self.step = book, random.Random(seed), 0, 0
        self.liked = sorted(range(self.n_experts), key=lambda _: self.rng.random())
        self.uses = Counter[Entry]()

    def some(self, most: int) -> list[Entry]:
        """Different experts; who was drawn comes to the front, as often as not."""
        chosen = dict[int, None]()
        for _ in range(self.rng.randint(0, most)):
            expert = self.liked[int(self.n_experts * self.rng.random() ** 2)]
            chosen[expert] = None
            if self.rng.random() < 0.5:
                self.liked.remove(expert)
                self.liked.insert(0, expert)
        return [(LAYER, expert) for expert in chosen]

    def seen(self, entry: Entry, step: int) -> Seen:
        self.now += 1
        name = entry[0] * self.n_experts + entry[1]
        return Seen(self.now, step, name, self.uses[entry], 0, 0)

    def event(self, entries: list[Entry], busy: set[Entry]) -> None:
        """As `reference.Caches` runs one."""
        is_new = {entry: entry not in self.cache.slot for entry in entries}
        for entry in entries:
            if is_new[entry]:
                self.load(entry, {*entries, *busy}, self.step)
        for entry in entries:
            self.uses[entry] += 1
            if entry in self.cache.slot:
                seen = self.seen(entry, self.step)
                self.cache.use(entry, is_new[entry], seen)
                self.book.used(entry, is_new[entry], seen)
            else:
                self.book.passed(entry)
        while self.cache.left < 0 and self.evict(None, {*entries}, NOBODY):
            pass

    def load(self, entry: Entry, busy: set[Entry], step: int) -> None:
        seen = self.seen(entry, step)
        if self.is_after or self.cache.left or self.evict(entry, busy, seen):
            self.cache.fill(entry, 1, seen)
            self.book.filled(entry, seen)

    def evict(self, comes: Entry | None, busy: set[Entry], seen: Seen) -> bool:
        slots = {one: slot for one, slot in self.cache.slot.items() if one not in busy}
        expected = self.book.leaver(comes, slots, seen)
        assert self.cache.evict(busy, seen) == expected
        return expected is not None

    def ahead(self, entries: list[Entry], busy: set[Entry]) -> None:
        for entry in entries:
            if entry not in self.cache.slot:
                self.load(entry, busy, self.step + 1)

    def take_away(self, most: int) -> None:
        """Without a word; of two who go both come back, each to the other's slot."""
        here = [*self.cache.slot] if self.cache.left == 0 else []
        gone = self.rng.sample(here, min(self.rng.randint(1, most), len(here)))
        for entry in gone:
            self.cache.remove(entry)
            self.book.gone(entry)
        if len(gone) > 1:
            self.ahead(gone, set())

    def run(self, n_events: int, most: int) -> None:
        for n in range(n_events):
            self.event(self.some(most), set(self.some(most // 2)))
            way, self.step = self.rng.random(), self.step + 1
            if way < 0.2:
                self.ahead(self.some(2), set(self.some(most)))
            elif way < 0.3:
                self.take_away(self.book.most_gone if n > n_events // 2 else 1)
            elif way < 0.4 and not self.cache.left:
                self.evict(None, set(self.some(most)), NOBODY)


@pytest.mark.parametrize(("policy", "book_of"), BOOKS, ids=[repr(one[0]) for one in BOOKS])
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    capacity=st.sampled_from([1, 2, 3, 5, 8, 13]),
    most=st.sampled_from([1, 3, 7]),
    is_after=st.booleans(),
)
def test_the_same_one_leaves(
    policy: Policy, book_of: Any, seed: int, capacity: int, most: int, is_after: bool
) -> None:
    Driven(policy, book_of(capacity), seed, capacity, is_after=is_after).run(50, most)


@pytest.mark.parametrize("capacity", [19, 20, 25, 30])
def test_a_tenth_of_the_cache_is_for_newcomers(capacity: int) -> None:
    for seed in range(5):
        Driven(S3Fifo(), BookS3Fifo(capacity), seed, capacity).run(150, 5)


def known_to_all(seed: int, n_slots: int) -> tuple[StateRules, np.ndarray[Any, Any]]:
    rules = Random.rules
    assert isinstance(rules, StateRules)
    state = np.zeros(rules.state_size(n_slots, n_slots), np.int64)
    rules.start(state, n_slots, *Random(seed).settings)
    for slot in range(n_slots):
        rules.filled(state, n_slots, slot, NOBODY)
    return rules, state


def test_random_draws_are_those_of_minstd_rand() -> None:
    """The 10,000th is the one that the C++ standard names, [rand.predef]."""
    rules, state = known_to_all(0, 1)
    for _ in range(10_000):
        assert rules.victim(state, 1, np.zeros(1, np.int64), NOBODY) == 0
    assert state[0] == 399_268_537


@pytest.mark.parametrize("first", [1, 2**31 - 2])
@pytest.mark.parametrize("modulus", [2**31 - 2, 2**31 - 1, 2**31])
def test_random_never_draws_nothing_but_zeros(first: int, modulus: int) -> None:
    """Whatever the seed: also where its multiple comes to where such a generator would stay."""
    rules, state = known_to_all(first * pow(7919, -1, modulus) % modulus, 8)
    drawn = [int(rules.victim(state, 8, np.zeros(8, np.int64), NOBODY)) for _ in range(50)]
    assert len(set(drawn)) > 4 and Random(2**53 - 1).settings == (2**53 - 1,)


@pytest.mark.parametrize("n_movable", [0, 1, 2, 40])
def test_random_takes_anybody_who_may_leave(n_movable: int) -> None:
    """As often as any other, also where the first draws all meet somebody who has to stay."""
    rules, state = known_to_all(3, 400)
    movable = random.Random(n_movable).sample(range(400), n_movable)
    busy_N = np.full(400, BUSY)
    busy_N[movable] = 0
    taken = Counter(int(rules.victim(state, 400, busy_N, NOBODY)) for _ in range(100 * n_movable))
    assert set(taken) == set(movable)
    assert not movable or (min(taken.values()) > 50 and max(taken.values()) < 160)
    if not movable:
        assert rules.victim(state, 400, busy_N, NOBODY) == STAYS
