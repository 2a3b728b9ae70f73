"""Every policy decides the same compiled and in plain Python, in small caches and in large ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines import reference
from prefetch.sim.engines.pool import ATOMIC, OVERSHOOT, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lfru import Lfru
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.random import Random
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policy import FEW
from tests.prefetch.sim.engines.test_replay import drawn

POLICIES = (
    Lru(), Fifo(), Lfu(), LfuPersistent(), Lfru(), Random(), Random(7), Sieve(), S3Fifo(), Arc(), LeastStale(),
    Belady(), BeladyForced(),
)  # fmt: skip
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)


@each_policy
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 10),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]),
    st.booleans(),
)
def test_compiled_equals_plain(policy, seed, room, batch, semantics, is_global):
    work = drawn(seed, batch=batch)
    rooms = [3 * room] if is_global else [room, room + 1, max(0, room - 1)]
    plain = reference.replay(work, policy, rooms, [1, 1, 1], semantics)
    assert replay(work, policy, rooms, [1, 1, 1], semantics).tolist() == plain


@each_policy
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]))
def test_compiled_equals_plain_with_unequal_sizes(policy, seed, room, semantics):
    work = drawn(seed, batch=2)
    plain = reference.replay(work, policy, [room], [3, 2, 4], semantics)
    assert replay(work, policy, [room], [3, 2, 4], semantics).tolist() == plain


@each_policy
@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(FEW + 1, 210),
    st.sampled_from([1, 8]),
    st.sampled_from([ATOMIC, SEQUENTIAL]),
)
def test_compiled_equals_plain_where_slots_share_bounds(policy, seed, room, batch, semantics):
    work = drawn(seed, n_tokens=150, n_experts=70, top_k=4, batch=batch)
    plain = reference.replay(work, policy, [room], [1, 1, 1], semantics)
    assert replay(work, policy, [room], [1, 1, 1], semantics).tolist() == plain


@each_policy
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.integers(FEW + 1, 160), st.sampled_from([ATOMIC, SEQUENTIAL]))
def test_compiled_equals_plain_with_bounds_in_every_layer(policy, seed, room, semantics):
    work = drawn(seed, n_tokens=60, n_layers=2, n_experts=180, top_k=12)
    rooms = [room, room - 30]
    plain = reference.replay(work, policy, rooms, [1, 1], semantics)
    assert replay(work, policy, rooms, [1, 1], semantics).tolist() == plain
