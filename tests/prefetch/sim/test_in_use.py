"""Where the compiled timed engine marks nobody as in use, nobody in use leaves: it stays the plain one."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.pool import ATOMIC, OVERSHOOT
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.engines.timed_reference import TimedReplay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of

# caches, whether what is stale is dropped; every second a cache per layer that drops it, where nobody is marked
NEAR = [(False, True), (True, True), (False, True), (False, False)]


def with_holes(work: Workload, seed: int) -> Workload:
    """Some layers of some steps need nobody."""
    sizes_V = np.diff(work.start_V)
    sizes_V[np.random.default_rng(seed).random(len(sizes_V)) < 0.2] = 0
    is_kept_A = np.repeat(sizes_V > 0, np.diff(work.start_V))
    return dataclasses.replace(
        work,
        ids_A=work.ids_A[is_kept_A],
        tokens_A=work.tokens_A[is_kept_A],
        start_V=np.append(0, sizes_V.cumsum()),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([Lru(), Lfu(), Belady()]),
    room=st.integers(0, 6),
    batch=st.sampled_from([1, 3]),
    semantics=st.sampled_from([ATOMIC, ATOMIC, OVERSHOOT]),
    near=st.sampled_from(NEAR),
    ahead=st.integers(1, 4),
    width=st.integers(1, 5),
    recall=st.sampled_from([0.0, 0.5, 1.0]),
    landing=st.sampled_from([0, 0, 3]),
    by_score=st.booleans(),
    slow=st.sampled_from([1, 8]),
    heavy=st.sampled_from([1, 20, 20]),
)
def test_compiled_equals_plain_whether_who_is_in_use_is_marked_or_not(
    seed, policy, room, batch, semantics, near, ahead, width, recall, slow, heavy, **options
):
    """Horizons up to beyond the three layers, events that need nobody or take long, a link that is always behind."""
    work, (is_global, cancels) = with_holes(drawn(seed, n_tokens=40, batch=batch), seed), near
    machine = machine_of(work, seed, cancels=cancels, staging=1 + seed % 2, **options)
    machine = machine._replace(
        chunk_ns_LX=slow * machine.chunk_ns_LX,
        whole_ns_L=slow * machine.whole_ns_L,
        weight_ns_L=heavy * machine.weight_ns_L,
    )
    guesses = guesses_of(work, seed, ahead, width, recall)
    rooms = [2 * room] if is_global else [room] * 3
    plain = TimedReplay(work, policy, rooms, [1] * 3, machine, guesses, semantics).run()
    fast = timed_replay(work, policy, rooms, [1] * 3, machine, guesses, semantics)
    assert fast.outcome_A.tolist() == plain.outcome
    assert fast.counts == dict(plain.counts)
    assert fast.time_S.tolist() == plain.time_S
