"""No run is under its bound; the relaxation is the optimum where that is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.bounds import bound_of
from prefetch.sim.cell import Cell
from prefetch.sim.machine import BOTH
from prefetch.sim.memory import Budget
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.pool import HIT, MISS, OVERSHOOT
from prefetch.sim.relaxed import fewest
from prefetch.sim.run import replay
from prefetch.sim.start import NOBODY
from tests.prefetch.sim.test_replay import drawn
from tests.prefetch.sim.test_timed import guesses_of, machine_of

EVEN, UNEVEN = [1, 1, 1], [3, 2, 4]


def budget_of(rooms, sizes) -> Budget:
    names = Budget.__dataclass_fields__
    zeros = {name: 0 for name in names if name.endswith("_bytes")}
    largest = sizes if len(rooms) == len(sizes) else [max(sizes)]
    slots = tuple(room // size for room, size in zip(rooms, largest, strict=True))
    scope = "per_layer" if len(rooms) > 1 else "global"
    return Budget(scope, tuple(rooms), tuple(sizes), slots, **(zeros | {"all_expert_bytes": 1}))


def rooms_of(room, sizes, is_global):
    return [room * sum(sizes)] if is_global else [room * size for size in sizes]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 3]),
    is_global=st.booleans(),
    n_warm=st.integers(0, 20),
)
def test_the_relaxation_of_equal_experts_is_the_optimum(seed, room, batch, is_global, n_warm):
    work = drawn(seed, batch=batch, phase="decode")
    warm = np.random.default_rng(seed).permutation(27)[:n_warm].astype(np.int64)
    rooms = rooms_of(room, EVEN, is_global)
    missed = (replay(work, Belady(), rooms, EVEN, warm=warm) == MISS).sum()
    found = fewest(work, rooms, EVEN, warm, np.zeros(work.n_steps, np.bool_))
    assert found.missed == missed == found.units_G.sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([Lru(), Lfu(), Belady()]),
    room=st.integers(0, 8),
    is_global=st.booleans(),
    sizes=st.sampled_from([EVEN, UNEVEN]),
)
def test_nobody_loads_fewer_units_than_the_relaxation(seed, policy, room, is_global, sizes):
    work = drawn(seed, phase="decode")
    rooms = rooms_of(room, sizes, is_global)
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % 3, np.diff(work.start_V))
    is_miss_A = replay(work, policy, rooms, sizes) == MISS
    found = fewest(work, rooms, sizes, NOBODY, np.zeros(work.n_steps, np.bool_))
    assert found.units_G.sum() <= np.array(sizes)[layer_A[is_miss_A]].sum()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from([Lru(), Lfu(), Belady()]),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 3]),
    is_global=st.booleans(),
    sizes=st.sampled_from([EVEN, UNEVEN]),
    phase=st.sampled_from(["auto", "decode"]),
    width=st.integers(0, 4),
    landing=st.sampled_from([0, 2]),
)
def test_no_run_is_under_its_bound(
    seed, policy, room, batch, is_global, sizes, phase, width, landing
):
    """Also where prompts come between, and where experts differ in size."""
    work = drawn(seed, n_tokens=40, batch=batch, phase=phase)
    machine = machine_of(work, seed, landing=landing)
    guesses = guesses_of(work, seed, 2, width, 0.8) if width else None
    rooms = rooms_of(room, sizes, is_global)
    cell = Cell({}, policy, budget_of(rooms, sizes), machine, guesses)
    timed, bound = cell.run(work), bound_of(cell, work, 10)
    tokens, is_exact = int(work.decode_S.sum()), phase == "decode"
    is_even = sizes == EVEN or not is_global
    assert bound.name == ("optimum" if is_exact and is_even else "relaxation")
    assert timed.time_S[work.is_decode_S].sum() >= bound.tpot_ns * tokens - 1e-6
    if is_even and guesses is None:
        is_decode_A = np.repeat(np.repeat(work.is_decode_S, 3), np.diff(work.start_V))
        hit_rate = (timed.outcome_A[is_decode_A] == HIT).mean()
        assert hit_rate <= bound.hit_rate + 1e-12
        if isinstance(policy, Belady) and is_exact:
            assert hit_rate == pytest.approx(bound.hit_rate)


def test_where_there_is_none_the_name_says_why():
    work = drawn(1, phase="decode")
    budget = budget_of([2, 2, 2], EVEN)

    def named(work=work, semantics=0, **how):
        return bound_of(
            Cell({}, Lru(), budget, machine_of(work, **how), semantics=semantics), work, 10
        )

    host = named(miss_way=BOTH)
    assert host.name == "no bound: misses are not only copied" and np.isnan(host.tpot_ns)
    assert 0 < host.hit_rate < 1
    over = named(semantics=OVERSHOOT)
    assert over.name.startswith("no bound: an event larger than its cache")
    prompts = named(drawn(1, phase="prefill"))
    assert prompts.name == "no bound: no token is generated"
