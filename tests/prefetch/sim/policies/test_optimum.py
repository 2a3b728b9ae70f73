"""Belady's loads are the fewest there are: every way to run a small cache is tried."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sticky_workloads import sticky

from prefetch.sim.engines.pool import MISS
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn

Content = frozenset[tuple[int, int]]


def fewest_loads(work: Workload, capacity: int, *, is_forced: bool) -> int:
    """Over all contents that one cache for all layers may have after each event. Forced: all of the event stay."""
    loads: dict[Content, int] = {frozenset(): 0}
    for event in range(len(work.start_V) - 1):
        layer = event % work.card.n_layers
        ids = work.ids_A[work.start_V[event] : work.start_V[event + 1]]
        needed = frozenset((layer, int(expert)) for expert in ids)
        after: dict[Content, int] = {}
        for content, so_far in loads.items():
            cost, kept = so_far + len(needed - content), needed if is_forced else frozenset()
            others = sorted((content | needed) - kept)
            n_others = min(len(others), capacity - len(kept))
            for some in combinations(others, n_others):
                key = kept | frozenset(some)
                after[key] = min(cost, after.get(key, cost))
        loads = after
    return min(loads.values())


small = st.tuples(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(1, 6), (2, 4)]), st.integers(0, 6)
)


@settings(max_examples=60, deadline=None)
@given(small)
def test_with_a_way_around(case):
    seed, top_k, (n_layers, n_experts), capacity = case
    work = drawn(seed, n_tokens=12, n_layers=n_layers, n_experts=n_experts, top_k=top_k)
    loads = int(np.sum(replay(work, Belady(), [capacity], [1] * n_layers) == MISS))
    assert loads == fewest_loads(work, capacity, is_forced=False)


@settings(max_examples=60, deadline=None)
@given(small)
def test_without(case):
    seed, top_k, (n_layers, n_experts), more = case
    work = sticky(seed, 12, n_layers, n_experts, top_k)
    loads = int(np.sum(replay(work, BeladyForced(), [top_k + more], [1] * n_layers) == MISS))
    assert loads == fewest_loads(work, top_k + more, is_forced=True)
