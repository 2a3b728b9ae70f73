"""What holds of every policy, whatever it decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sticky_workloads import sticky

from prefetch.sim.engines.pool import ATOMIC, MISS, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.limits.stacks import LruStacks
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.random import Random
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.policies.test_twins import POLICIES, each_policy

seeds = st.integers(0, 10**6)


def loads(work, policy, rooms, semantics=ATOMIC) -> int:
    return int(np.sum(replay(work, policy, rooms, [1] * work.card.n_layers, semantics) == MISS))


@each_policy
@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([1, 4]), st.sampled_from([ATOMIC, SEQUENTIAL]), st.booleans())
def test_where_all_fit_every_expert_is_loaded_once(policy, seed, batch, semantics, is_global):
    work = drawn(seed, batch=batch)
    layer_V = np.arange(len(work.start_V) - 1) % 3
    entries = np.repeat(layer_V, np.diff(work.start_V)) * 9 + work.ids_A
    rooms = [27] if is_global else [9, 10, 11]
    assert loads(work, policy, rooms, semantics) == len(np.unique(entries))


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 12), st.sampled_from([1, 3]), st.booleans())
def test_nobody_loads_less_than_belady_with_a_way_around(seed, room, batch, is_global):
    work = drawn(seed, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    fewest = loads(work, Belady(), rooms)
    assert all(fewest <= loads(work, policy, rooms) for policy in POLICIES)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_lru_is_what_its_stacks_say(seed):
    n_layers, n_experts, top_k = 3, 9, 3
    work = sticky(seed, 60, n_layers, n_experts, top_k)
    stacks = LruStacks(n_layers, n_experts, top_k)
    for layer, ids_TK in enumerate(work.ids_A.reshape(-1, n_layers, top_k).swapaxes(0, 1)):
        stacks.replay(layer, ids_TK, np.zeros(len(ids_TK), np.uint8), n_experts)
    hist_D = stacks.hist_LCD.sum(axis=(0, 1))
    for capacity in range(top_k, n_experts + 1):
        assert loads(work, Lru(), [capacity] * 3) == work.n_accesses - hist_D[:capacity].sum()


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 9), st.sampled_from([1, 4]))
def test_least_stale_is_lru_where_nothing_is_copied_ahead(seed, room, batch):
    work = drawn(seed, batch=batch)
    least_stale = replay(work, LeastStale(), [3 * room], [1] * 3)
    np.testing.assert_array_equal(least_stale, replay(work, Lru(), [3 * room], [1] * 3))


def test_random_draws_are_those_of_its_seed():
    work = drawn(0, n_tokens=300)
    first, again, other = (replay(work, Random(seed), [9], [1] * 3) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_random_draws_everybody_as_often():
    """One expert at a time, of 64 that take turns, in 32 slots: an age that hits is as likely as in theory."""
    capacity, n_experts = 32, 64
    work = drawn(3, n_tokens=20_000, n_layers=1, n_experts=n_experts, top_k=1)
    turns = np.tile(np.arange(n_experts, dtype=np.uint16), work.n_accesses // n_experts + 1)
    work.ids_A[:] = turns[: work.n_accesses]
    hit_rate = 1 - loads(work, Random(5), [capacity], SEQUENTIAL) / work.n_accesses
    # survival of the misses between two uses of an expert: h = (1 - 1/C)^((1 - h) E)
    expected = 0.5
    for _ in range(200):
        expected = (1 - 1 / capacity) ** ((1 - expected) * n_experts)
    assert hit_rate == pytest.approx(expected, abs=0.02)
