"""No run is under its bound; the relaxation is the optimum where that is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.machine import BOTH
from prefetch.sim.engines.pool import HIT, MISS, OVERSHOOT
from prefetch.sim.engines.run import replay
from prefetch.sim.engines.start import NOBODY
from prefetch.sim.limits.bounds import bound_of, layers_of
from prefetch.sim.limits.relaxed import fewest
from prefetch.sim.memory import Budget
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables.cell import Cell
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of

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


def bound_by_hand(ids, rooms, sizes, **how):
    """One token per step; an expert takes 10 ns, what stands before a layer's 50."""
    n_layers = len(sizes)
    card = plain_card("hand", n_experts=6, top_k=len(ids[0][0]), layer_numbers=range(n_layers))
    work = workload_of(trace_of(card, np.array(ids)))
    given = {"before_S": np.full(len(ids), 50), "weight_ns_L": np.full(n_layers, 10)}
    machine = machine_of(work, **(given | {"token_ns_L": np.ones(n_layers, np.int64)} | how))
    return bound_of(Cell({}, Lru(), budget_of(rooms, sizes), machine), work, 10)


def test_a_bound_by_hand():
    """Three pairs in turn, room for one and two staging slots: two pairs stay, the third passes through.

    That is 6 + 2 loads in each of two layers, 90 ns each without latency; computing takes 2 (50 + 2 x 10) per token.
    """
    ids = [[[2 * (t % 3), 2 * (t % 3) + 1]] * 2 for t in range(6)]
    copies = {"chunk_ns_LX": np.full((2, 1), 100), "n_chunks_L": np.ones(2, np.int64)}
    bound = bound_by_hand(ids, [2, 2], [1, 1], **copies)
    assert (bound.tpot_ns, bound.name) == (2 * 8 * 90 / 6, "optimum")
    # without staging one pair stays: of 12 uses of a layer two are hits
    assert bound.hit_rate == pytest.approx(2 / 12)
    slow = bound_by_hand(ids, [2, 2], [1, 1], **copies, before_S=np.full(6, 1000))
    assert slow.tpot_ns == 2 * (1000 + 2 * 10)
    more = bound_by_hand(ids, [2, 2], [1, 1], **copies, landing=1, staging=0)
    assert more.tpot_ns == 2 * 9 * 90 / 6, "of three that stay three are hits"


def test_a_bound_of_experts_of_two_sizes_by_hand():
    """Everybody is used once: 3 x 2 and 3 x 3 units, all as cheap as the cheapest, 90 ns for two."""
    ids = [[[t], [t]] for t in range(3)]
    copies = {"chunk_ns_LX": np.array([[100], [160]]), "n_chunks_L": np.ones(2, np.int64)}
    bound = bound_by_hand(ids, [4], [2, 3], **copies)
    assert (bound.tpot_ns, bound.name) == (15 * 90 / 2 / 3, "relaxation")
    assert np.isnan(bound.hit_rate)


def test_where_sizes_differ_the_loads_are_those_of_the_relaxation():
    """100 ns a unit, nothing to compute: Belady's choice among whole experts would say too much."""
    work, beyond = drawn(4, phase="decode"), 0
    zeros, n_units = np.zeros(3, np.int64), np.array(UNEVEN)
    machine = machine_of(
        work, before_S=np.zeros(work.n_steps, np.int64), weight_ns_L=zeros, token_ns_L=zeros,
        chunk_ns_LX=100 * n_units[:, None], n_chunks_L=np.ones(3, np.int64), staging=0,
    )  # fmt: skip
    for room in range(6, 30, 4):
        bound = bound_of(Cell({}, Lru(), budget_of([room], UNEVEN), machine), work, 0)
        least = fewest(work, [room], UNEVEN, NOBODY, ~work.is_decode_S).units_G.sum()
        assert bound.tpot_ns == pytest.approx(100 * least / work.decode_S.sum())
        is_miss_A = replay(work, Belady(), [room], UNEVEN) == MISS
        beyond += n_units[layers_of(work)[is_miss_A]].sum() - least
    assert beyond > 0


def test_every_access_has_its_layer():
    work = drawn(2, batch=2)
    expected = []
    for event, (start, stop) in enumerate(zip(work.start_V[:-1], work.start_V[1:], strict=True)):
        expected += [event % 3] * int(stop - start)
    assert layers_of(work).tolist() == expected
