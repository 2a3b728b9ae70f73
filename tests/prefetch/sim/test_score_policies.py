"""Policies that are told more than uses: the compiled engines are the plain ones, and both are textbook replays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.engines import reference
from prefetch.sim.engines.machine import BOTH, ON_HOST, WAIT
from prefetch.sim.engines.pool import (
    ATOMIC,
    FIRST,
    HIT,
    MISS,
    OVERSHOOT,
    SEQUENTIAL,
    TOLD,
    UNTOLD,
    Told,
)
from prefetch.sim.engines.run import replay, timed_replay
from prefetch.sim.engines.timed_reference import TimedReplay
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.hobbit import Hobbit
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.moe_infinity import MoeInfinity
from prefetch.sim.policies.mrs import Mrs
from prefetch.sim.policies.predicted_use import PredictedUse
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policies.static import Static
from prefetch.sim.policy import ROWS, STAYS, KeyRules, Seen, State, StateRules
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of

TOLD_ROWS = (Mrs(), Mrs(share=0.3), PredictedUse(), MoeInfinity(), Hobbit(), Hobbit(lhu=0))
POLICIES = (*TOLD_ROWS, Static(), Lru(), Sieve(), Arc(), Belady(), LeastStale())


def rows_of(work: Workload, seed: int, ahead: int = 0, n_caches: int = 3) -> Told:
    """Anything; every third event is the first of a sequence, some are not told."""
    rng, n_events = np.random.default_rng(seed), len(work.start_V) - 1
    row_VE = rng.integers(0, 1_000_000, (n_events, work.card.n_experts)).astype(np.int32)
    row_VE[rng.random(row_VE.shape) < 0.3] = 0
    kind_V = rng.choice([UNTOLD, TOLD, TOLD, FIRST], n_events).astype(np.uint8)
    return Told(row_VE, kind_V, ahead)


def start_of(work: Workload, policy: Any, seed: int, n_warm: int, n_pinned: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(work.card.n_layers * work.card.n_experts)
    pinned = order[:n_pinned]
    if "counts" in policy.needs:
        n_warm = len(order)
    ahead = seed % 5 if "guesses" in policy.needs else 0
    told = {"told": rows_of(work, seed, ahead)} if {*policy.needs} & {*ROWS} else {}
    return {"warm": order[:n_warm], "pinned": pinned, **told}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 2, 4]),
    semantics=st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]),
    is_global=st.booleans(),
    n_warm=st.integers(0, 30),
    n_pinned=st.integers(0, 6),
    sizes=st.sampled_from([[1, 1, 1], [3, 2, 4]]),
)
def test_compiled_equals_plain(
    seed, policy, room, batch, semantics, is_global, n_warm, n_pinned, sizes
):
    work = drawn(seed, batch=batch)
    semantics = ATOMIC if isinstance(policy, Static) and semantics == OVERSHOOT else semantics
    rooms = [3 * room * max(sizes)] if is_global else [room * size for size in sizes]
    start = start_of(work, policy, seed, n_warm, min(n_pinned, room))
    plain = reference.replay(work, policy, rooms, sizes, semantics, **start)
    assert replay(work, policy, rooms, sizes, semantics, **start).tolist() == plain


def on_fill(seen: Seen) -> int:
    told = seen.now * 7 + seen.step * 31 + seen.entry * 5 + seen.uses * 11 + seen.score * 17
    return (told + seen.next_use % 1000 * 13) % 1009


def on_use(key: int, seen: Seen) -> int:
    told = seen.now * 3 + seen.step * 19 + seen.entry * 23 + seen.uses * 29 + seen.score * 2
    return (key * 5 + told + seen.next_use % 1000 * 37) % 1009


def state_size(n_slots: int, n_entries: int) -> int:
    return 1


def start(state: State, capacity: int) -> None:
    state[0] = capacity


def filled(state: State, n_slots: int, slot: int, seen: Seen) -> None:
    told = seen.now * 7 + seen.step * 31 + seen.entry * 5 + seen.uses * 11 + seen.score * 17
    state[0] = (state[0] * 3 + slot * 41 + told + seen.next_use % 1000 * 13) % 1009


def used(state: State, n_slots: int, slot: int, is_new: bool, seen: Seen) -> None:
    told = seen.now * 3 + seen.step * 19 + seen.entry * 23 + seen.uses * 29 + seen.score * 2
    state[0] = (state[0] * 5 + slot * 43 + is_new + told + seen.next_use % 1000 * 37) % 1009


def victim(state: State, n_slots: int, busy_N: NDArray[np.int64], seen: Seen) -> int:
    told = seen.now * 3 + seen.step * 31 + seen.entry * 5 + seen.uses * 11 + seen.score * 17
    lowest, found = 10_000, STAYS
    for slot in range(n_slots):
        rank = (state[0] + told + slot * 47 + seen.next_use % 1000 * 13) % 1009
        if busy_N[slot] == 0 and rank < lowest:
            lowest, found = rank, slot
    return found


def told(
    state: State, n_slots: int, step: int, layer: int, row_E: NDArray[np.int32], is_first: bool
) -> None:
    state[0] = (state[0] + step * 3 + layer * 7 + row_E[0] + row_E[-1] * 5 + is_first) % 1009


class ByAll:
    """Senseless, and depends on everything that a policy is told."""

    needs = ("future", "scores")
    after_use = False
    rules: KeyRules | StateRules = KeyRules(on_fill, on_use)


class ByAllWithState(ByAll):
    rules = StateRules(state_size, start, filled, used, victim, told)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([ByAll(), ByAllWithState()]),
    room=st.integers(1, 9),
    batch=st.sampled_from([1, 3]),
    semantics=st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]),
    is_global=st.booleans(),
    n_warm=st.integers(0, 30),
    n_pinned=st.integers(0, 6),
)
def test_both_tell_a_policy_the_same(
    seed, policy, room, batch, semantics, is_global, n_warm, n_pinned
):
    """Of every use, load and eviction: the time, the step, who it is, its uses, its next use and its score."""
    work = drawn(seed, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    start = start_of(work, policy, seed, n_warm, min(n_pinned, room))
    plain = reference.replay(work, policy, rooms, [1, 1, 1], semantics, **start)
    assert replay(work, policy, rooms, [1, 1, 1], semantics, **start).tolist() == plain


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([Mrs(), PredictedUse(), MoeInfinity(), Static(), Lru()]),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 3]),
    is_global=st.booleans(),
    way=st.sampled_from([WAIT, WAIT, BOTH, ON_HOST]),
    ahead=st.integers(1, 4),
    width=st.integers(0, 4),
    n_warm=st.integers(0, 30),
    n_pinned=st.integers(0, 6),
    nobody=st.sampled_from([0.05, 0.6]),
)
def test_compiled_equals_plain_with_a_clock(
    seed, policy, room, batch, is_global, way, ahead, width, n_warm, n_pinned, nobody
):
    work = drawn(seed, n_tokens=40, batch=batch, nobody=nobody)
    rooms = [3 * room] if is_global else [room] * 3
    start = start_of(work, policy, seed, n_warm, min(n_pinned, room))
    machine, guesses = (
        machine_of(work, seed, miss_way=way),
        guesses_of(work, seed, ahead, width, 0.5),
    )
    plain = TimedReplay(work, policy, rooms, [1, 1, 1], machine, guesses, **start).run()
    fast = timed_replay(work, policy, rooms, [1, 1, 1], machine, guesses, **start)
    assert fast.outcome_A.tolist() == plain.outcome
    assert fast.counts == dict(plain.counts)
    assert fast.time_S.tolist() == plain.time_S


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([Lru(), Sieve(), Mrs()]), st.booleans())
def test_pinned_experts_always_hit(seed, policy, is_global):
    work = drawn(seed, batch=2)
    start = start_of(work, policy, seed, 0, 4)
    rooms = [15] if is_global else [5] * 3
    is_hit = replay(work, policy, rooms, [1] * 3, **start) == HIT
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % 3, np.diff(work.start_V))
    assert is_hit[np.isin(layer_A * work.card.n_experts + work.ids_A, start["pinned"])].all()


def test_a_warm_start_with_room_for_all_never_misses():
    work = drawn(1)
    everybody = np.arange(27)
    assert (replay(work, Lru(), [9] * 3, [1] * 3, warm=everybody) == HIT).all()
    cold, warm = (
        replay(work, Belady(), [4] * 3, [1] * 3, warm=entries)
        for entries in (everybody[:0], everybody)
    )
    assert (warm == HIT).sum() >= (cold == HIT).sum()


def test_a_policy_that_never_evicts_cannot_evict_afterwards():
    with pytest.raises(ConfigError, match="Static never evicts"):
        replay(drawn(0), Static(), [4] * 3, [1] * 3, OVERSHOOT, warm=np.arange(27))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([Lru(), Mrs()]), st.integers(130, 170))
def test_a_warm_start_of_many_slots(seed, policy, room):
    """More than FEW: keys of blocks are bounds."""
    work = drawn(seed, n_experts=60, top_k=6, batch=2)
    start = start_of(work, policy, seed, room + 5, 12)
    plain = reference.replay(work, policy, [room], [1, 1, 1], **start)
    assert replay(work, policy, [room], [1, 1, 1], **start).tolist() == plain


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(0, 27), st.integers(0, 3))
def test_nobody_loads_less_than_the_optimum_with_the_same_start(seed, room, n_warm, n_pinned):
    work = drawn(seed, batch=2)
    for policy in (Mrs(), MoeInfinity(), Hobbit(), Lru(), Static()):
        start = start_of(work, policy, seed, n_warm, min(n_pinned, room))
        everybody = np.concatenate([start["pinned"], start["warm"]])
        fewest = (replay(work, Belady(), [room] * 3, [1] * 3, warm=everybody) == MISS).sum()
        assert fewest <= (replay(work, policy, [room] * 3, [1] * 3, **start) == MISS).sum()
