"""The disk behind a host memory that cannot hold all experts: nanoseconds computed by hand, and sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.machine import BOTH, ON_HOST, WAIT, Disk, Guesses
from prefetch.sim.engines.pool import ATOMIC, HIT, LATE, MISS
from prefetch.sim.engines.run import Timed, replay, timed_replay
from prefetch.sim.engines.timed_reference import TimedReplay
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import disk_of, guesses_of, machine_of

BYTES = 3000


def ran(
    ids: list[Any],
    room: int,
    memory: int,
    guessed: list[int] | None = None,
    ahead: int = 1,
    predict_ns: int = 0,
    **how: Any,
) -> Timed:
    """One token per step. A layer 100 ns, an expert 10, its copy 40, its read 3 times 80, on the host 200."""
    ids_TLK = np.array(ids)
    n_tokens, n_layers, top_k = ids_TLK.shape
    card = plain_card("s", n_experts=6, top_k=top_k, layer_numbers=tuple(range(n_layers)))
    work, each_L = workload_of(trace_of(card, ids_TLK)), np.ones(n_layers, np.int64)
    reads_LX = np.full((n_layers, 3), 80)
    machine = machine_of(
        work, before_S=np.full(n_tokens, 100), weight_ns_L=10 * each_L, token_ns_L=each_L,
        host_weight_ns_L=200 * each_L, host_token_ns_L=each_L, bytes_L=BYTES * each_L,
        chunk_ns_LX=np.full((n_layers, 1), 40), n_chunks_L=each_L, issue_ns=0, predict_ns=predict_ns,
        disk=Disk(reads_LX, 3 * each_L, reads_LX.sum(axis=1), 1000, BYTES * memory), **how,
    )  # fmt: skip
    ids_VW = np.array(guessed or [], np.int32).reshape(-1, 1)
    guesses = Guesses(ids_VW, np.zeros_like(ids_VW, np.int64), ahead) if guessed else None
    timed = timed_replay(work, Lru(), [room] * n_layers, [1] * n_layers, machine, guesses)
    empty = Guesses(np.empty((0, 0), np.int32), np.empty((0, 0), np.int64), 1)
    plain = TimedReplay(work, Lru(), [room] * n_layers, each_L, machine, guesses or empty, ATOMIC)
    assert timed.counts == dict(plain.run().counts)
    return timed


def counted(timed: Timed, *names: str) -> list[int]:
    return [timed.counts[name] for name in names]


def test_a_guess_that_is_being_read_goes_on_from_where_it_was():
    """Layer 0: read 100 to 340, copied to 380, computed to 390. The guess is read from 340 on, in chunks of 80.

    At 490 its layer needs it: two chunks are there by 500, the third by 580; copied to 620, computed to 630.
    """
    timed = ran([[[0], [4]]], room=2, memory=9, guessed=[-1, 4])
    assert timed.time_S.tolist() == [630]
    waits = counted(timed, "disk_stall_ns", "stall_ns", "compute_ns")
    assert waits == [240 + (580 - 490), 40 + 40, 2 * 100 + 2 * 10]
    assert counted(timed, "disk_ns", "disk_loads", "disk_bytes") == [2 * 240, 2, 2 * BYTES]
    assert counted(timed, "demand_loads", "prefetch_loads", "moved_bytes") == [2, 0, 2 * BYTES]


def test_a_wrong_guess_that_is_being_read_is_read_no_further():
    """As above, but 5 is needed: the chunk in hand ends at 500, three of 5 at 740; copied to 780, computed to 790."""
    timed = ran([[[0], [5]]], room=2, memory=9, guessed=[-1, 4])
    assert timed.time_S.tolist() == [790]
    assert counted(timed, "disk_ns", "disk_loads") == [240 + 160 + 240, 2]
    assert counted(timed, "disk_bytes", "moved_bytes") == [2 * BYTES + 2000, 2 * BYTES]
    assert counted(timed, "prefetch_dropped", "prefetch_loads") == [1, 0]


def test_a_guess_whose_last_chunk_is_being_read_is_copied_when_it_is_there():
    """Token 1 begins at 3 * 390. The guess is asked for at 1270 and read to 1510; its layer needs it at 1490.

    So it is copied from 1510 to 1550 and computed to 1560.
    """
    timed = ran([[[0], [3], [4]], [[0], [3], [5]]], 2, 9, [-1] * 5 + [5], ahead=2)
    assert timed.time_S.tolist() == [1170, 1560 - 1170]
    assert counted(timed, "disk_stall_ns", "stall_ns") == [3 * 240 + 20, 4 * 40]
    assert counted(timed, "disk_loads", "demand_loads") == [4, 4]


def test_a_guess_that_was_read_and_copied_is_there():
    """A layer more: read to 340 of its token, copied to 380, needed at 430."""
    timed = ran([[[0], [3], [4], [1]], [[0], [3], [4], [5]]], 2, 9, [-1] * 7 + [5], ahead=3)
    assert timed.time_S.tolist() == [4 * 390, 4 * 110]
    assert timed.outcome_A.tolist() == [MISS] * 4 + [HIT] * 4
    assert counted(timed, "disk_loads", "prefetch_used", "moved_bytes") == [5, 1, 5 * BYTES]


def test_a_guess_that_is_read_while_the_host_still_predicts_is_copied_too():
    """Three predictions of 500 ns each: 4 is guessed at 1000 and read to 1240; 0 is asked for at 1500.

    0 is read to 1740, copied to 1780, computed to 1790; 4 has been copied meanwhile, to 1280: layer 1 takes 110.
    """
    timed = ran([[[0], [4], [5]]], 2, 9, guessed=[-1, 4, -1], ahead=3, predict_ns=500)
    assert timed.time_S.tolist() == [1790 + 110 + 390]
    assert timed.outcome_A.tolist() == [MISS, HIT, MISS]


def test_who_is_in_memory_is_copied_first():
    """A slot and two staging slots. Reads end at 340, 580, 820, each copied and computed in 50: 870.

    The memory holds 1 and 2 then, the slot 2. Token 1, from 970: 2 to 980, 1 copied 970 to 1010 and computed to 1020,
    0 read to 1210, copied to 1250, computed to 1260.
    """
    timed = ran([[[0, 1, 2]], [[0, 1, 2]]], room=1, memory=2)
    assert timed.time_S.tolist() == [870, 390]
    assert timed.outcome_A.tolist() == [MISS] * 3 + [MISS, MISS, HIT]
    waits = [240 + 190 + 190 + (1210 - 1020), 3 * 40 + (1010 - 980) + 40]
    assert counted(timed, "disk_stall_ns", "stall_ns") == waits
    assert counted(timed, "disk_loads", "demand_loads") == [4, 5]


def test_the_host_computes_what_it_has_read():
    """Memory for two. 0 and 1 are read by 340 and 580, and 1 is the last of 400 ns of work: 580 + 200.

    Token 1, from 880: 1 is there, 2 read by 1120, its 200 ns after that. Token 2, from 1420: 0 was forgotten, read by
    1660, computed by 1860.
    """
    timed = ran([[[0, 1]], [[1, 2]], [[0, 2]]], room=2, memory=2, miss_way=ON_HOST)
    assert timed.time_S.tolist() == [780, 1320 - 780, 1860 - 1320]
    assert counted(timed, "host_stall_ns", "disk_stall_ns") == [3 * 400, 280 + 40 + 40]
    assert counted(timed, "disk_loads", "disk_bytes", "moved_bytes") == [4, 4 * BYTES, 0]


def test_an_upload_begins_when_its_expert_is_read():
    """Read by 340, computed by the host to 540, copied meanwhile from 340 to 380: the next token finds it."""
    timed = ran([[[0]], [[0]]], room=1, memory=1, miss_way=BOTH, uploads=1, shared_per_1000=1000)
    assert timed.time_S.tolist() == [540, 110]
    assert counted(timed, "host_stall_ns", "disk_stall_ns") == [200, 240]
    assert counted(timed, "disk_loads", "prefetch_used", "moved_bytes") == [1, 1, BYTES]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    room=st.integers(0, 6),
    batch=st.sampled_from([1, 3]),
    memory=st.integers(0, 16),
    way=st.sampled_from([WAIT, ON_HOST, BOTH]),
    recall=st.sampled_from([None, 0.0, 0.7]),
)
def test_sums_of_reads(seed, room, batch, memory, way, recall):
    """Time is computing and waiting, bytes are whole reads and chunks of dropped ones, the link moves what it did."""
    work = drawn(seed, n_tokens=40, batch=batch)
    guesses = None if recall is None else guesses_of(work, seed, 1, 3, recall)
    machine = machine_of(work, seed, miss_way=way, bytes_L=np.full(3, 1000))
    disk = disk_of(1000 * memory, seed)
    counts = timed_replay(
        work, Lru(), [room] * 3, [1] * 3, machine._replace(disk=disk), guesses
    ).counts
    stalls = sum(counts[name] for name in counts if name.endswith("stall_ns"))
    assert counts["now_ns"] == counts["compute_ns"] + stalls
    assert counts["disk_bytes"] >= 1000 * counts["disk_loads"]
    assert counts["disk_ns"] <= counts["now_ns"] + disk.whole_ns_L.sum()  # one read at a time
    if guesses is None:
        assert counts["disk_bytes"] == 1000 * counts["disk_loads"]
    if guesses is None and way != BOTH:
        alone = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine).counts
        same = ("moved_bytes", "demand_loads", "on_host", "link_ns")
        assert [counts[name] for name in same] == [alone[name] for name in same]
        assert counts["now_ns"] >= alone["now_ns"]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    room=st.integers(0, 6),
    batch=st.sampled_from([1, 3]),
    memory=st.integers(9, 27),
    way=st.sampled_from([WAIT, ON_HOST]),
)
def test_the_hosts_memory_is_an_lru_cache_of_misses(seed, room, batch, memory, way):
    """What is read is what a global LRU cache as large as that memory misses, asked for nothing but the misses."""
    work = drawn(seed, n_tokens=40, batch=batch)
    disk = disk_of(1000 * memory, seed)
    machine = machine_of(work, seed, miss_way=way, bytes_L=np.full(3, 1000), disk=disk)
    timed = timed_replay(work, Lru(), [room] * 3, [1] * 3, machine)
    is_missed_A = timed.outcome_A == MISS
    asked = dataclasses.replace(
        work,
        ids_A=work.ids_A[is_missed_A],
        tokens_A=work.tokens_A[is_missed_A],
        start_V=np.append(0, is_missed_A.cumsum())[work.start_V],
    )
    reads = (replay(asked, Lru(), [memory], [1] * 3) == MISS).sum()
    assert timed.counts["disk_loads"] == reads


def test_no_copy_begins_before_its_read_is_over():
    """A layer of 200 ns, copies of 190. Token 0 ends at 200 + 240 + 190 + 10 = 640.

    Token 1 guesses 4: read 640 to 880, in vain when its routing is known at 840. Token 2, from 850, guesses 4 again:
    it is copied from 880, not 850, to 1070, and is late at 1050.
    """
    ids_TLK, each_L = np.array([[[0]], [[0]], [[4]]]), np.ones(1, np.int64)
    work = workload_of(trace_of(plain_card("s", n_experts=6, top_k=1, layer_numbers=(0,)), ids_TLK))
    machine = machine_of(
        work, before_S=np.full(3, 200), weight_ns_L=10 * each_L, token_ns_L=each_L, bytes_L=BYTES * each_L,
        chunk_ns_LX=np.full((1, 1), 190), n_chunks_L=each_L, issue_ns=0, predict_ns=0,
        disk=Disk(np.full((1, 3), 80), 3 * each_L, 240 * each_L, 1000, 9 * BYTES),
    )  # fmt: skip
    guesses = Guesses(np.array([[-1], [4], [4]], np.int32), np.zeros((3, 1), np.int64), 1)
    plain = TimedReplay(work, Lru(), [2], [1], machine, guesses).run()
    timed = timed_replay(work, Lru(), [2], [1], machine, guesses)
    assert timed.time_S.tolist() == plain.time_S == [640, 210, 1080 - 850]
    assert timed.outcome_A.tolist() == [MISS, HIT, LATE]
    assert timed.counts["late_stall_ns"] == 1070 - 1050


@pytest.mark.parametrize(
    ("seed", "by_score", "landing"), [(5, False, 0), (88, True, 0), (50, False, 3)]
)
def test_reads_and_copies_take_turns_in_time(seed, by_score, landing):
    """Experts take long, so that many guesses are read and copied meanwhile: a copy begins before the next is read."""
    work = drawn(seed, n_tokens=25)
    machine = machine_of(
        work,
        seed,
        staging=1 + seed % 2,
        by_score=by_score,
        landing=landing,
        disk=disk_of(9000, seed),
    )
    machine = machine._replace(weight_ns_L=20 * machine.weight_ns_L)
    guesses = guesses_of(work, seed, 2, 4, 0.0 if landing else 0.5)
    rooms = [1 if landing else 3] * 3
    plain = TimedReplay(work, Lru(), rooms, [1] * 3, machine, guesses).run()
    timed = timed_replay(work, Lru(), rooms, [1] * 3, machine, guesses)
    assert timed.counts == dict(plain.counts)
    assert timed.time_S.tolist() == plain.time_S
