"""The compiled replay is the plain one, and both obey the laws of caches."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines import reference
from prefetch.sim.engines.pool import ATOMIC, HIT, MISS, OVERSHOOT, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of

POLICIES = (Lru(), Fifo(), Lfu(), LfuPersistent(), Belady(), BeladyForced())


def drawn(
    seed: int,
    n_tokens: int = 60,
    n_layers: int = 3,
    n_experts: int = 9,
    top_k: int = 3,
    batch: int = 1,
    phase: str = "auto",
    nobody: float = 0.05,
) -> Workload:
    """Skewed and sticky, so that policies differ; three requests, the second half of each generated.

    `nobody`: the share of choices that are no expert.
    """
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(n_layers, n_experts)) * 1.5
    noise = rng.gumbel(size=(n_tokens, n_layers, n_experts))
    ids = np.argsort(liking + noise, axis=2)[:, :, ::-1][:, :, :top_k].copy()
    ids[rng.random(ids.shape) < nobody] = -1
    card = plain_card(
        "drawn", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers))
    )
    request = np.sort(rng.integers(0, 3, n_tokens))
    first = np.searchsorted(request, request)
    place = np.arange(n_tokens) - first
    phase_T = (place >= np.bincount(request, minlength=3)[request] // 2).astype(np.uint8)
    return workload_of(
        trace_of(card, ids, request_T=request, phase_T=phase_T), batch=batch, phase=phase
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(POLICIES),
    st.integers(0, 10),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]),
    st.booleans(),
)
def test_compiled_equals_plain(seed, policy, room, batch, semantics, is_global):
    work = drawn(seed, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    plain = reference.replay(work, policy, rooms, [1, 1, 1], semantics)
    assert replay(work, policy, rooms, [1, 1, 1], semantics).tolist() == plain


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(POLICIES), st.integers(0, 60))
def test_compiled_equals_plain_with_unequal_sizes(seed, policy, room):
    work = drawn(seed, batch=2)
    plain = reference.replay(work, policy, [room], [3, 2, 4])
    assert replay(work, policy, [room], [3, 2, 4]).tolist() == plain


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 3),
    st.sampled_from([ATOMIC, SEQUENTIAL, OVERSHOOT]),
    st.booleans(),
)
def test_events_that_need_nobody_change_nothing(seed, room, semantics, is_global):
    """Also not what is held beyond the room, which waits for the next event that needs somebody."""
    work = drawn(seed, nobody=0.6)
    rooms = [room] if is_global else [room] * 3
    plain = reference.replay(work, Lru(), rooms, [1, 1, 1], semantics)
    assert replay(work, Lru(), rooms, [1, 1, 1], semantics).tolist() == plain


def test_two_caches_start_with_whom_they_have_room_for():
    """Entries 0 to 2 are layer 0's, 3 to 5 layer 1's: one of the first and two of the second find a place."""
    card = plain_card("two", n_experts=3, top_k=3, layer_numbers=(0, 1))
    work = workload_of(trace_of(card, np.array([[[0, 1, 2], [0, 1, 2]]])))
    expected = [HIT, MISS, MISS, HIT, HIT, MISS]
    for warm in ([0, 1, 2, 3, 4, 5], [3, 0, 3, 1, 0, 4, 5, 2]):
        start = {"warm": np.array(warm)}
        assert reference.replay(work, Lru(), [1, 2], [1, 1], **start) == expected
        assert replay(work, Lru(), [1, 2], [1, 1], **start).tolist() == expected
