"""The compiled timed engine is the plain one, event for event, and both obey the laws of time and bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.machine import BOTH, NO_DISK, ON_HOST, WAIT, Disk, Guesses, Machine
from prefetch.sim.engines.pool import ATOMIC, HIT, LATE, MISS, OVERSHOOT
from prefetch.sim.engines.run import replay, timed_replay
from prefetch.sim.engines.timed_reference import TimedReplay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import KeyRules
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
from tests.prefetch.sim.engines.test_replay import drawn

POLICIES = (Lru(), Lfu(), Belady(), LeastStale())


def machine_of(work: Workload, seed: int = 0, **settings: Any) -> Machine:
    """Layers of different sizes and speeds; nothing divides anything."""
    rng, n_layers = np.random.default_rng(seed), work.card.n_layers
    n_chunks_L = rng.integers(1, 4, n_layers)

    def ns(low: int, high: int, *shape: int) -> Any:
        return rng.integers(low, high, shape).astype(np.int64)

    given: dict[str, Any] = {
        "before_S": ns(50, 200, work.n_steps),
        "weight_ns_L": ns(10, 40, n_layers),
        "token_ns_L": ns(1, 20, n_layers),
        "host_weight_ns_L": ns(50, 200, n_layers),
        "host_token_ns_L": ns(10, 90, n_layers),
        "chunk_ns_LX": ns(20, 120, n_layers, 3),
        "n_chunks_L": n_chunks_L,
        "bytes_L": n_chunks_L * 1000 - 300,
        "chunk_bytes": 1000,
        "miss_way": WAIT,
        "staging": 2,
        "issue_ns": 3,
        "predict_ns": 5,
        "uploads": 3,
        "shared_per_1000": 600,
        "cancels": True,
        "protects": seed % 3 > 0,
    }
    given |= settings
    chunks = zip(given["chunk_ns_LX"], given["n_chunks_L"], strict=True)
    return Machine(**given, whole_ns_L=np.array([ns_X[:n].sum() for ns_X, n in chunks]))


def disk_of(room_bytes: int, seed: int = 0) -> Disk:
    """Reads of two or three chunks."""
    rng = np.random.default_rng(seed)
    chunk_ns_LX, n_chunks_L = rng.integers(50, 400, (3, 3)), rng.integers(1, 4, 3)
    whole_ns_L = np.array([ns_X[:n].sum() for ns_X, n in zip(chunk_ns_LX, n_chunks_L, strict=True)])
    return Disk(chunk_ns_LX, n_chunks_L, whole_ns_L, 900, room_bytes)


def guesses_of(work: Workload, seed: int, ahead: int, width: int, recall: float) -> Guesses:
    """The truth with this chance, else anybody; some rows are short."""
    rng, n_events = np.random.default_rng(seed), len(work.start_V) - 1
    ids_VW = rng.permuted(
        np.tile(np.arange(work.card.n_experts, dtype=np.int32), (n_events, 1)), axis=1
    )[:, :width]
    for v in range(n_events):
        true = [int(e) for e in work.ids_A[work.start_V[v] : work.start_V[v + 1]]]
        kept = [e for e in true if rng.random() < recall]
        row = (kept + [e for e in ids_VW[v].tolist() if e not in kept])[:width]
        ids_VW[v] = row
    ids_VW[rng.random(ids_VW.shape) < 0.1] = -1
    return Guesses(ids_VW, rng.integers(0, 1000, ids_VW.shape), ahead)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 2, 4]),
    semantics=st.sampled_from([ATOMIC, ATOMIC, OVERSHOOT]),
    is_global=st.booleans(),
    way=st.sampled_from([WAIT, WAIT, BOTH, ON_HOST]),
    ahead=st.integers(1, 4),
    width=st.integers(0, 4),
    recall=st.sampled_from([0.0, 0.5, 1.0]),
    cancels=st.booleans(),
    size_L=st.sampled_from([[1, 1, 1], [1, 1, 1], [2, 1, 3]]),
    landing=st.sampled_from([0, 0, 1, 3]),
    budget_bytes=st.sampled_from([10**12, 10**12, 1699, 3000, 6000]),
    by_score=st.booleans(),
    memory=st.sampled_from([None, None, 0, 3000, 9000, 20_000, 10**9]),
    slower=st.sampled_from([1, 20]),
)
def test_compiled_equals_plain(
    seed,
    policy,
    room,
    batch,
    semantics,
    is_global,
    way,
    ahead,
    width,
    recall,
    size_L,
    memory,
    slower,
    **options,
):
    """`slower`: experts take longer than their copies, which wait for places."""
    work = drawn(seed, n_tokens=40, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    options["disk"] = NO_DISK if memory is None else disk_of(memory, seed)
    machine = machine_of(work, seed, miss_way=way, staging=1 + seed % 3, **options)
    machine = machine._replace(weight_ns_L=slower * machine.weight_ns_L)
    guesses = guesses_of(work, seed, ahead, width, recall)
    plain = TimedReplay(work, policy, rooms, size_L, machine, guesses, semantics).run()
    fast = timed_replay(work, policy, rooms, size_L, machine, guesses, semantics)
    assert fast.outcome_A.tolist() == plain.outcome
    assert fast.counts == dict(plain.counts)
    assert fast.time_S.tolist() == plain.time_S


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(1, 9),
    batch=st.sampled_from([1, 3]),
    ahead=st.integers(1, 4),
    width=st.integers(0, 4),
    recall=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_sums_of_time_and_bytes(seed, policy, room, batch, ahead, width, recall):
    """Invariants 10 to 14 of every run in which misses wait for their copies."""
    work = drawn(seed, n_tokens=40, batch=batch)
    machine = machine_of(work, seed)
    guesses = guesses_of(work, seed, ahead, width, recall)
    timed = timed_replay(work, policy, [room] * 3, [1] * 3, machine, guesses)
    counts, layer_A = (
        timed.counts,
        np.repeat(np.arange(len(work.start_V) - 1) % 3, np.diff(work.start_V)),
    )
    assert np.isin(timed.outcome_A, (HIT, LATE, MISS)).all()
    assert counts["demand_loads"] == (timed.outcome_A == MISS).sum()
    assert counts["prefetch_used"] + counts["prefetch_unused"] <= counts["prefetch_loads"]
    waited = counts["stall_ns"] + counts["late_stall_ns"]
    assert timed.time_S.sum() == counts["now_ns"] == counts["compute_ns"] + waited
    # transfers in series with compute are the slowest order there is; host time is part of it
    asked = machine.issue_ns * (
        counts["demand_loads"] + guesses.ids_VW.size
    ) + machine.predict_ns * (len(work.start_V) + 3 * work.n_steps)
    assert counts["now_ns"] <= counts["compute_ns"] + counts["link_ns"] + asked
    fewest = (replay(work, Belady(), [room + 2] * 3, [1] * 3) == MISS).astype(np.int64)
    whole_L = np.array([machine.chunk_ns_LX[x, : machine.n_chunks_L[x]].sum() for x in range(3)])
    if batch == 1 and room >= 3:
        assert counts["now_ns"] + whole_L.sum() >= (fewest * whole_L[layer_A]).sum()
    assert counts["moved_bytes"] >= (machine.bytes_L[layer_A] * (timed.outcome_A == MISS)).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(POLICIES), st.integers(0, 9), st.sampled_from([1, 3]))
def test_without_guesses_the_clock_changes_no_hit(seed, policy, room, batch):
    work = drawn(seed, n_tokens=40, batch=batch)
    timed = timed_replay(work, policy, [room] * 3, [1] * 3, machine_of(work, seed))
    assert (timed.outcome_A == replay(work, policy, [room] * 3, [1] * 3)).all()


def test_all_miss_and_all_hit_in_closed_form():
    """Disjoint groups: a token waits for its k copies in turn; with room for all, only the first use of each waits."""
    n_layers, top_k, n_tokens = 2, 2, 6
    ids = np.array([[[2 * (t % 3), 2 * (t % 3) + 1]] * n_layers for t in range(n_tokens)])
    card = plain_card("turns", n_experts=6, top_k=top_k, layer_numbers=(0, 1))
    work = workload_of(trace_of(card, ids))
    machine = machine_of(
        work,
        before_S=np.full(n_tokens, 100),
        weight_ns_L=np.full(2, 10),
        token_ns_L=np.full(2, 1),
        chunk_ns_LX=np.array([[40, 30, 30]] * 2),
        n_chunks_L=np.full(2, 3),
        bytes_L=np.full(2, 3000),
        issue_ns=0,
        predict_ns=0,
    )
    missing = timed_replay(work, Lru(), [2, 2], [1, 1], machine)
    assert missing.time_S.tolist() == [n_layers * (100 + top_k * 100 + 10)] * n_tokens
    there = timed_replay(work, Lru(), [6, 6], [1, 1], machine)
    assert there.time_S.tolist()[3:] == [n_layers * (100 + top_k * 10)] * 3


def test_perfect_guesses_hide_copies_that_a_layer_can_hide():
    """Copies of one event take less than what stands before the experts: nothing waits once guesses are there."""
    work = drawn(3, n_tokens=40, phase="decode")
    machine = machine_of(
        work,
        before_S=np.full(work.n_steps, 2000),
        chunk_ns_LX=np.full((3, 3), 50),
        issue_ns=0,
        predict_ns=0,
        protects=True,
    )
    guesses = guesses_of(work, 0, 1, 3, 1.0)._replace(ids_VW=true_ids(work, 3))
    decoding = timed_replay(work, Lru(), [6] * 3, [1] * 3, machine, guesses)
    assert decoding.counts["stall_ns"] == decoding.counts["late_stall_ns"] == 0
    plain = timed_replay(work, Lru(), [6] * 3, [1] * 3, machine)
    assert plain.counts["stall_ns"] > 0


def true_ids(work: Workload, width: int) -> Any:
    ids_VW = np.full((len(work.start_V) - 1, width), -1, np.int32)
    for v in range(len(ids_VW)):
        true = work.ids_A[work.start_V[v] : work.start_V[v + 1]][:width]
        ids_VW[v, : len(true)] = true
    return ids_VW


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(POLICIES), st.integers(1, 9), st.integers(1, 4))
def test_guesses_beside_the_cache_evict_nobody(seed, policy, room, ahead):
    """Wrong guesses change no hit; right ones only make hits of misses, and leave the cache as it would be."""
    work, rooms = drawn(seed, n_tokens=40), [room] * 3
    machine = machine_of(work, seed, landing=2, protects=False)
    alone = timed_replay(work, policy, rooms, [1] * 3, machine)
    for recall in (0.0, 1.0):
        guesses = guesses_of(work, seed, ahead, 3, recall)
        timed = timed_replay(work, policy, rooms, [1] * 3, machine, guesses)
        counts, brought = timed.counts, (timed.outcome_A != MISS) & (alone.outcome_A == MISS)
        assert (timed.outcome_A[~brought] != MISS).sum() == (alone.outcome_A[~brought] == HIT).sum()
        assert brought.sum() == counts["prefetch_used"]
        unused = counts["prefetch_loads"] - counts["prefetch_used"]
        assert 0 <= unused - counts["prefetch_unused"] <= machine.landing  # of the last step's


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9000), st.booleans(), st.booleans())
def test_a_step_moves_no_more_guesses_than_its_budget(seed, room, most, is_beside, by_score):
    work = drawn(seed, n_tokens=40, phase="decode")
    n_bytes = np.full(3, 1700)
    machine = machine_of(
        work,
        seed,
        bytes_L=n_bytes,
        n_chunks_L=np.full(3, 2),
        budget_bytes=most,
        landing=2 * is_beside,
        by_score=by_score,
    )
    guesses = guesses_of(work, seed, 2, 3, 0.5)
    counts = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine, guesses).counts
    assert counts["prefetch_loads"] <= work.n_steps * (most // 1700)
    if most < 1700:
        plain = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine).outcome_A
        guessed = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine, guesses).outcome_A
        assert (plain == guessed).all()


def test_of_two_guesses_that_wait_the_link_takes_the_better():
    """4 is about the nearer layer, 5 has the higher score: the second is still under way when it is needed."""
    card = plain_card("two", n_experts=6, top_k=1, layer_numbers=(0, 1, 2))
    work = workload_of(trace_of(card, np.array([[[0], [4], [5]]])))
    settings = {"chunk_ns_LX": np.full((3, 1), 1000), "n_chunks_L": np.ones(3, np.int64)}
    settings |= {"bytes_L": np.full(3, 900), "before_S": np.array([100]), "issue_ns": 0}
    guesses = Guesses(
        np.array([[-1], [4], [5]], np.int32), np.array([[0], [10], [20]], np.int64), 3
    )
    for by_score, outcome in ((False, [MISS, HIT, LATE]), (True, [MISS, LATE, HIT])):
        machine = machine_of(work, predict_ns=0, by_score=by_score, **settings)
        found = timed_replay(work, Lru(), [2] * 3, [1] * 3, machine, guesses).outcome_A.tolist()
        assert found == outcome


def test_uploads_spend_nothing_of_what_guesses_may_move():
    """0 is computed by the host and copied for its next use; then 4, which a byte less cannot pay for."""
    card = plain_card("two", n_experts=6, top_k=1, layer_numbers=(0, 1))
    work = workload_of(trace_of(card, np.array([[[0], [4]]])))
    settings = {"chunk_ns_LX": np.full((2, 1), 100), "n_chunks_L": np.ones(2, np.int64)}
    settings |= {"bytes_L": np.full(2, 900), "before_S": np.array([100]), "uploads": 2}
    settings |= {"host_weight_ns_L": np.full(2, 1000), "miss_way": BOTH}
    guesses = Guesses(np.array([[-1], [4]], np.int32), np.full((2, 1), 7), 1)
    for budget_bytes, found in ((899, MISS), (900, HIT)):
        machine = machine_of(work, budget_bytes=budget_bytes, **settings)
        plain = TimedReplay(work, Lru(), [2] * 2, [1] * 2, machine, guesses).run()
        timed = timed_replay(work, Lru(), [2] * 2, [1] * 2, machine, guesses)
        assert timed.outcome_A.tolist() == plain.outcome == [MISS, found]
    told = list[int]()
    policy = SimpleNamespace(needs=(), after_use=False, rules=None)
    policy.rules = KeyRules(lambda seen: told.append(seen.score) or 0, lambda key, seen: key)
    TimedReplay(work, policy, [2] * 2, [1] * 2, machine, guesses).run()
    assert told == [0, 7]  # an upload is no guess


def test_a_host_that_copies_leave_a_thousandth_of_its_speed():
    """2 ns of work take 2000 beside its upload, which takes 5000; so in both layers, 100 after their begin."""
    card = plain_card("two", n_experts=6, top_k=1, layer_numbers=(0, 1))
    work = workload_of(trace_of(card, np.array([[[0], [4]]])))
    settings = {"chunk_ns_LX": np.full((2, 1), 5000), "n_chunks_L": np.ones(2, np.int64)}
    settings |= {"bytes_L": np.full(2, 900), "before_S": np.array([100]), "uploads": 2}
    settings |= {"host_weight_ns_L": np.full(2, 2), "host_token_ns_L": np.full(2, 1)}
    machine = machine_of(work, miss_way=BOTH, issue_ns=0, shared_per_1000=1, **settings)
    nobody = Guesses(np.empty((0, 0), np.int32), np.empty((0, 0), np.int64), 1)
    plain = TimedReplay(work, Lru(), [2] * 2, [1] * 2, machine, nobody).run()
    timed = timed_replay(work, Lru(), [2] * 2, [1] * 2, machine)
    assert timed.time_S.tolist() == plain.time_S == [2 * (100 + 2000)]


def test_who_was_brought_beside_the_cache_lends_no_place_to_others():
    """Room for three: 0 stays for ever, 1 and 2 leave for 4 and for 3, which lies beside the cache. 5 finds no place.

    The layer begins at 1000: 3 is computed to 2000, for ten tokens; 4 is copied to 1500, computed to 2100. 5 may be
    copied when 3 is done, from 2000 to 2500, and is computed for nine tokens to 3400.
    """
    ids_TLK = np.array([[[3, 4]]] + [[[3, 5]]] * 9)
    card = plain_card("beside", n_experts=6, top_k=2, layer_numbers=(0,))
    trace = trace_of(card, ids_TLK, request_T=np.arange(10))
    work, one_L = workload_of(trace, batch=10, phase="decode"), np.ones(1, np.int64)
    machine = machine_of(
        work, before_S=np.array([1000]), weight_ns_L=10 * one_L, token_ns_L=100 * one_L, bytes_L=900 * one_L,
        chunk_ns_LX=np.full((1, 1), 500), n_chunks_L=one_L, issue_ns=0, predict_ns=0, staging=0, landing=1,
    )  # fmt: skip
    guesses = Guesses(np.array([[3]], np.int32), np.zeros((1, 1), np.int64), 1)
    start = {"pinned": np.array([0]), "warm": np.array([1, 2])}
    timed = timed_replay(work, Lru(), [3], [1], machine, guesses, **start)
    plain = TimedReplay(work, Lru(), [3], [1], machine, guesses, **start).run()
    assert timed.time_S.tolist() == plain.time_S == [3400]
    assert timed.outcome_A.tolist() == plain.outcome == [MISS, HIT, MISS]


def test_a_link_that_costs_nothing_stalls_nobody():
    work = drawn(5, n_tokens=40)
    machine = machine_of(work, chunk_ns_LX=np.zeros((3, 3), np.int64), issue_ns=0, predict_ns=0)
    assert timed_replay(work, Lru(), [3] * 3, [1] * 3, machine).counts["stall_ns"] == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from([1, 3]), st.sampled_from([0, 1]))
def test_a_larger_host_memory_reads_no_more(seed, room, batch, way):
    """Without guesses: everything when it holds nothing, everybody once when it holds all; nothing between is worse."""
    work, reads = drawn(seed, n_tokens=40, batch=batch), list[int]()
    for memory in (0, 4, 9, 16, 10**6):
        machine = machine_of(
            work, seed, miss_way=way, bytes_L=np.full(3, 1000), disk=disk_of(1000 * memory, seed)
        )
        timed = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine)
        counts = timed.counts
        stalls = sum(counts[name] for name in counts if name.endswith("stall_ns"))
        assert counts["now_ns"] == counts["compute_ns"] + stalls
        assert counts["disk_bytes"] == 1000 * counts["disk_loads"]
        reads.append(counts["disk_loads"])
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % 3, np.diff(work.start_V))
    missed = timed.outcome_A == MISS
    assert reads[0] == missed.sum()
    assert reads[-1] == len(np.unique(layer_A[missed] * 1000 + work.ids_A[missed]))
    assert reads == sorted(reads, reverse=True)


def test_reads_and_copies_in_closed_form():
    """Disjoint pairs, read in turn and each copied while the next is read: two reads, the last copy, its compute."""
    ids = np.array([[[2 * (t % 3), 2 * (t % 3) + 1]] * 2 for t in range(6)])
    work = workload_of(trace_of(plain_card("t", n_experts=6, top_k=2, layer_numbers=(0, 1)), ids))
    numbers = np.full(2, 3)
    disk = Disk(np.full((2, 3), 50), numbers, np.full(2, 150), 1000, 0)
    machine = machine_of(
        work,
        before_S=np.full(6, 100),
        weight_ns_L=np.full(2, 10),
        token_ns_L=np.full(2, 1),
        chunk_ns_LX=np.array([[40, 30, 30]] * 2),
        n_chunks_L=numbers,
        bytes_L=np.full(2, 3000),
        issue_ns=0,
        disk=disk,
    )
    timed = timed_replay(work, Lru(), [2, 2], [1, 1], machine)
    assert timed.time_S.tolist() == [2 * (100 + 2 * 150 + 100 + 10)] * 6
    # per event: until the first is read, then (behind its copy and compute) until the second is
    assert timed.counts["disk_stall_ns"] == 12 * (150 + 300 - (150 + 100 + 10))
    assert timed.counts["disk_ns"] == 24 * 150
    all_there = machine._replace(disk=disk._replace(room_bytes=10**6))
    later = timed_replay(work, Lru(), [2, 2], [1, 1], all_there).time_S.tolist()[3:]
    assert later == [2 * (100 + 2 * 100 + 10)] * 3
