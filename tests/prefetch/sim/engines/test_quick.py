"""Caches that are quick decide what those of the definition decide: who leaves, for whom, into which slot."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.pool import ATOMIC, NOTHING_TOLD, OVERSHOOT, SEQUENTIAL, TOLD, Told
from prefetch.sim.engines.quick import QuickCaches, compiled
from prefetch.sim.engines.reference import Caches
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lfru import Lfru
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.moe_infinity import MoeInfinity
from prefetch.sim.policies.random import Random
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn

KEYED = (Lru(), Lfu(), LfuPersistent(), Fifo(), LeastStale(), Belady())
STATED = (Sieve(), S3Fifo(), Arc(), Lfru(), Random(3), MoeInfinity())


def story(kind: type[Caches], work: Workload, policy: Any, *how: Any, **start: Any) -> list[Any]:
    """Everything that becomes of a workload, with guesses copied between its events."""
    caches, told, rng = kind(work, policy, *how, **start), list[Any](), np.random.default_rng(0)
    caches.on_leave = lambda entry: told.append(("left", entry))
    n_layers, n_experts = work.card.n_layers, work.card.n_experts
    for event in range(len(work.start_V) - 1):
        step, layer = divmod(event, n_layers)
        caches.tell(event)
        for wave in caches.waves(range(work.start_V[event], work.start_V[event + 1]), layer):
            told.append(caches.run(wave, step, layer, pinned={(layer, int(rng.integers(4)))}))
        entry = (int(rng.integers(n_layers)), int(rng.integers(n_experts)))
        seen = caches.seen(entry, step, score=7)
        if not caches.has(entry) and caches.make_room(entry, {(entry[0], 0)}, seen):
            caches.of(entry[0]).fill(entry, caches.size_L[entry[0]], seen)
        told.append([dict(cache.slot) for cache in caches.caches])
    return [*told, caches.now, caches.uses]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from((*KEYED, *STATED)),
    room=st.integers(0, 9),
    is_global=st.booleans(),
    semantics=st.sampled_from([ATOMIC, ATOMIC, ATOMIC, OVERSHOOT, SEQUENTIAL]),
    sizes=st.sampled_from([[1, 1, 1], [2, 1, 3]]),
    n_warm=st.integers(0, 9),
    n_pinned=st.integers(0, 3),
)
def test_quick_caches_decide_as_their_definition(
    seed, policy, room, is_global, semantics, sizes, n_warm, n_pinned
):
    work = drawn(seed, n_tokens=20, batch=1 + seed % 2)
    rooms = [3 * room] if is_global else [room] * 3
    draw, n_events = np.random.default_rng(seed), len(work.start_V) - 1
    some = draw.permutation(3 * work.card.n_experts)
    start: dict[str, Any] = {"warm": some[:n_warm], "pinned": some[n_warm : n_warm + n_pinned]}
    rows_VE = draw.integers(0, 3, (n_events, work.card.n_experts)).astype(np.int32)
    told = Told(rows_VE, np.full(n_events, TOLD, np.uint8), 0)
    start["told"] = told if "tokens" in policy.needs else NOTHING_TOLD
    how = (work, policy, rooms, sizes, semantics)
    assert story(QuickCaches, *how, **start) == story(Caches, *how, **start)


def test_a_victim_that_cannot_be_compiled_runs_as_it_stands(caplog):
    def odd(state: Any, n_slots: int, busy_N: Any, seen: Any) -> int:
        return int(str(state)[0])  # no such thing is compiled

    with caplog.at_level(logging.WARNING):
        assert compiled(odd) is odd
    assert "odd runs uncompiled" in caplog.text
    assert compiled(Sieve().rules.victim) is not Sieve().rules.victim


@pytest.mark.parametrize("n_slots", [4, 300])
def test_a_full_cache_of_busy_experts_gives_nobody(n_slots):
    work = drawn(0, n_tokens=4)
    caches = QuickCaches(work, Lru(), [n_slots], [1, 1, 1])
    cache = caches.caches[0]
    entries = [(0, expert) for expert in range(min(4, cache.n_slots))]
    for entry in entries:
        cache.fill(entry, 1, caches.seen(entry, 0))
    assert cache.evict(entries, caches.seen((1, 0), 0)) is None
    assert cache.evict(entries[1:], caches.seen((1, 0), 0)) == entries[0]
