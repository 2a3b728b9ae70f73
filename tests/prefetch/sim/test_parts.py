"""A workload that comes in parts is replayed as if it were one, whatever the parts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.sim.engines.pool import ATOMIC, OVERSHOOT
from prefetch.sim.engines.run import replay, replay_parts, timed_parts, timed_replay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.tables.excerpt import work_of
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import machine_of


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([Lru(), Lfu(), Sieve()]),
    room=st.integers(1, 6),
    batch=st.sampled_from([1, 3]),
    semantics=st.sampled_from([ATOMIC, OVERSHOOT]),
    way=st.integers(0, 2),
    ends=st.sets(st.integers(1, 12), max_size=4),
)
def test_any_parts_give_the_same(seed, policy, room, batch, semantics, way, ends):
    work = drawn(seed, n_tokens=40, batch=batch)
    machine = machine_of(work, seed, miss_way=way, staging=2)
    places = sorted({0, *(end for end in ends if end < work.n_steps), work.n_steps})
    spans = list(itertools.pairwise(places))
    parts = [work_of(work, *span) for span in spans]
    whole = replay(work, policy, [room] * 3, [1] * 3, semantics)
    pieces = list(replay_parts(parts, policy, [room] * 3, [1] * 3, semantics))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    machines = [machine._replace(before_S=machine.before_S[first:stop]) for first, stop in spans]
    timed = timed_replay(work, policy, [room] * 3, [1] * 3, machine, None, semantics)
    found = list(
        timed_parts(zip(parts, machines, strict=True), policy, [room] * 3, [1] * 3, semantics)
    )
    np.testing.assert_array_equal(np.concatenate([one.outcome_A for one in found]), timed.outcome_A)
    np.testing.assert_array_equal(np.concatenate([one.time_S for one in found]), timed.time_S)
    assert found[-1].counts == timed.counts


def test_who_knows_the_future_must_have_it_whole():
    work = drawn(0, n_tokens=10)
    with pytest.raises(ConfigError, match="Belady needs future of the whole workload"):
        next(replay_parts([work], Belady(), [2] * 3, [1] * 3))
