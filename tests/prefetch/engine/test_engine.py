"""The engine on a clock that is not real: decisions are the simulator's, and nobody reads what is not there yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.engine.backend import COMPUTE, COPY, EngineError
from prefetch.engine.engine import Engine
from prefetch.engine.fake import FakeBackend
from prefetch.engine.replay import Ran, drive
from prefetch.sim.engines.machine import WAIT, Guesses, Machine, no_guesses
from prefetch.sim.engines.pool import ATOMIC, HIT, LATE
from prefetch.sim.engines.recorded import Recorded, RecordError
from prefetch.sim.engines.run import replay, timed_replay
from prefetch.sim.limits.bounds import compute_S
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.workload import Workload
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of

POLICIES = (Lru(), Lfu(), Arc(), S3Fifo(), Belady())
WHOLE = {"n_chunks_L": np.ones(3, np.int64), "bytes_L": np.full(3, 700), "miss_way": WAIT}
DECIDED = ("demand_loads", "prefetch_loads", "prefetch_used", "prefetch_unused", "prefetch_dropped")


def ran(
    work: Workload,
    policy: Any,
    rooms: list[int],
    machine: Machine,
    guesses: Guesses | None = None,
    *,
    engine: type[Engine] = Engine,
    **options: Any,
) -> tuple[Ran, FakeBackend]:
    n_entries = 3 * work.card.n_experts // len(rooms)
    slots = sum(min(room, n_entries) for room in rooms) + machine.staging + machine.landing
    backend = FakeBackend(machine)
    told = (work, policy, rooms, [1, 1, 1], machine, guesses or no_guesses(), ATOMIC)
    return drive(engine(backend, slots, *told, **options), work), backend


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 2, 4]),
    is_global=st.booleans(),
)
def test_without_guesses_every_access_is_the_simulators(seed, policy, room, batch, is_global):
    work = drawn(seed, n_tokens=40, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    machine = machine_of(work, seed, staging=1 + seed % 2, **WHOLE)
    found, backend = ran(work, policy, rooms, machine)
    expected_A = replay(work, policy, rooms, [1, 1, 1])
    assert found.timed.outcome_A.tolist() == expected_A.tolist()
    assert found.copied_bytes == 700 * len(backend.copies) == 700 * int((expected_A != HIT).sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 3]),
    is_global=st.booleans(),
    ahead=st.integers(1, 4),
    width=st.integers(1, 4),
    recall=st.sampled_from([0.0, 0.5, 1.0]),
    cancels=st.booleans(),
    landing=st.sampled_from([0, 0, 1, 3]),
    budget_bytes=st.sampled_from([10**12, 3000]),
    by_score=st.booleans(),
    in_flight=st.integers(1, 3),
)
def test_with_guesses_the_simulator_decides_the_same_of_what_happened(
    seed, policy, room, batch, is_global, ahead, width, recall, in_flight, **options
):
    work = drawn(seed, n_tokens=30, batch=batch)
    rooms = [3 * room] if is_global else [room] * 3
    machine = machine_of(work, seed, staging=1 + seed % 2, **WHOLE, **options)
    guesses = guesses_of(work, seed, ahead, width, recall)
    found, backend = ran(work, policy, rooms, machine, guesses, in_flight=in_flight)
    again = Recorded(work, policy, rooms, [1, 1, 1], machine, guesses, ATOMIC).run(found.record)
    assert found.timed.outcome_A.tolist() == again.outcome
    for name in (*DECIDED, "moved_bytes", "wasted_bytes"):
        assert found.timed.counts[name] == again.counts[name], name
    assert found.copied_bytes == 700 * len(backend.copies) == again.counts["moved_bytes"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from((Lru(), Lfu(), Arc())),
    room=st.integers(8, 9),
    is_global=st.booleans(),
)
def test_a_host_that_takes_no_time_makes_the_simulated_clock(seed, policy, room, is_global):
    """As long as an event fits into its cache: beyond it the simulator waits for places in another order."""
    work = drawn(seed, n_tokens=40, batch=2)
    rooms = [3 * room] if is_global else [room] * 3
    machine = machine_of(work, seed, issue_ns=0, predict_ns=0, **WHOLE)
    found, _ = ran(work, policy, rooms, machine)
    expected = timed_replay(work, policy, rooms, [1, 1, 1], machine)
    assert found.timed.time_S.tolist() == expected.time_S.tolist()
    assert found.timed.counts["stall_ns"] == expected.counts["stall_ns"]


class Asks(FakeBackend):
    """Counts how often the host waits for a routing."""

    waits = 0

    def wait(self, any_of: Any) -> None:
        self.waits += 1
        super().wait(any_of)


def test_with_guesses_the_compiled_simulator_comes_to_the_same():
    """Another program than the engine's own base. Where they part, it is by a copy that begins as an event ends."""
    same, took, simulated = 0, 0, 0
    for seed in range(60):
        work = drawn(seed, n_tokens=40, batch=1, phase="decode")
        options = {"cancels": seed % 2 == 0, "by_score": seed % 3 == 0, "staging": 9}
        machine = machine_of(work, seed, issue_ns=0, predict_ns=0, **options, **WHOLE)
        guesses = guesses_of(work, seed, 1 + seed % 4, 1 + seed % 3, (0.0, 0.5, 1.0)[seed % 3])
        found, _ = ran(work, Lru(), [6] * 3, machine, guesses)
        expected = timed_replay(work, Lru(), [6] * 3, [1, 1, 1], machine, guesses)
        same += found.timed.outcome_A.tolist() == expected.outcome_A.tolist()
        took, simulated = took + found.timed.time_S.sum(), simulated + expected.time_S.sum()
    assert same >= 54 and abs(took / simulated - 1) < 0.005


def test_a_copy_out_of_turn_is_found():
    work = drawn(5, n_tokens=40, batch=1)
    machine, guesses = machine_of(work, 5, **WHOLE), guesses_of(work, 5, 3, 3, 0.5)
    told = (work, Lru(), [4, 4, 4], [1, 1, 1], machine, guesses, ATOMIC)

    class Backwards(Engine):
        def _next(self, link_free: int) -> Any:
            return self.queue[-1] if self.queue else None

    found, _ = ran(work, Lru(), [4, 4, 4], machine, guesses, engine=Backwards)
    with pytest.raises(RecordError, match="began where"):
        Recorded(*told).run(found.record)


@pytest.mark.parametrize("rooms", [[9, 9, 9], [27]])
def test_with_every_expert_there_the_host_waits_once_a_step(rooms):
    work = drawn(2, n_tokens=60, batch=2)
    machine = machine_of(work, 2, issue_ns=0, **WHOLE)
    everyone = {"warm": np.arange(27)}
    told = (work, Lru(), rooms, [1, 1, 1], machine, no_guesses(), ATOMIC)
    backend = Asks(machine)
    engine = Engine(backend, 29, *told, **everyone)
    backend.waits, began = 0, backend.host_ns
    found = drive(engine, work)
    assert (found.timed.outcome_A == HIT).all() and found.copied_bytes == 0
    assert backend.waits == work.n_steps
    assert backend.host_ns - began == compute_S(work, machine).sum()
    again = Recorded(*told, **everyone).run(found.record)
    assert again.outcome == found.timed.outcome_A.tolist()


def test_true_guesses_hide_copies_and_false_ones_cost_bytes():
    work = drawn(3, n_tokens=60, batch=1)
    before_S = np.full(work.n_steps, 400)
    machine = machine_of(work, 3, cancels=True, before_S=before_S, **WHOLE)
    none, _ = ran(work, Lru(), [4, 4, 4], machine)
    true, _ = ran(work, Lru(), [4, 4, 4], machine, guesses_of(work, 3, 2, 3, 1.0))
    false, _ = ran(work, Lru(), [4, 4, 4], machine, guesses_of(work, 3, 2, 2, 0.0))
    assert true.timed.time_S.sum() < none.timed.time_S.sum()
    assert true.timed.counts["prefetch_used"] > 0
    at_once = machine._replace(before_S=np.ones(work.n_steps, np.int64))
    late, _ = ran(work, Lru(), [4, 4, 4], at_once, guesses_of(work, 3, 2, 3, 1.0))
    assert (late.timed.outcome_A == LATE).any() and late.timed.counts["late_stall_ns"] > 0
    assert false.timed.counts["wasted_bytes"] > 0 and false.copied_bytes > none.copied_bytes


class Notes(Engine):
    """What was copied by the time that an event's last copy was given, and what it missed."""

    def __init__(self, *told: Any, **more: Any) -> None:
        self.noted: list[tuple[int, int, list[Any]]] = []  # copies before, queued guesses, missing
        super().__init__(*told, **more)

    def _run(self, layer: int, needed: Any, entries: Any, tokens: Any) -> None:
        before = len(self.backend.copies), len(self.queue)
        self.noted.append((*before, [entries[a] for a in needed.missing]))
        super()._run(layer, needed, entries, tokens)


def test_what_is_missing_goes_before_every_guess_that_waits():
    work = drawn(5, n_tokens=60, batch=2)
    at_once = machine_of(work, 5, cancels=False, before_S=np.ones(work.n_steps, np.int64), **WHOLE)
    guesses, backend = guesses_of(work, 5, 2, 4, 0.5), FakeBackend(at_once)
    told = (work, Lru(), [4, 4, 4], [1, 1, 1], at_once, guesses, ATOMIC)
    engine = Notes(backend, 12 + at_once.staging, *told)
    drive(engine, work)
    assert sum(queued > 0 and len(missing) > 0 for _, queued, missing in engine.noted) > 5
    for first, _, missing in engine.noted:
        assert [entry for entry, _ in backend.copies[first : first + len(missing)]] == missing


class Reuses(Engine):
    """Overwrites a slot without waiting for its last reader."""

    def _copy(self, entry: Any) -> None:
        self.last_use.clear()
        super()._copy(entry)


class Hurries(Engine):
    """Publishes and launches what is still being copied."""

    def _launch(self, *told: Any) -> None:
        self.ready.clear()
        super()._launch(*told)


class LooksAway(Engine):
    """Launches with slots of the event before."""

    def _copy(self, entry: Any) -> None:
        slot = self.free[0]
        super()._copy(entry)
        self.slot_of[entry] = (slot + 1) % 3


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Reuses, "race: slot .* is overwritten with .* while launch"),
        (Hurries, "may still be on its way to slot .* when its slot is published"),
        (LooksAway, "is looked for in slot"),
    ],
)
def test_a_planted_race_is_caught(engine, said):
    work = drawn(1, n_tokens=40, batch=1)
    machine = machine_of(work, 1, staging=1, **WHOLE)
    with pytest.raises(EngineError, match=said):
        ran(work, Lru(), [2, 2, 2], machine, engine=engine)


def test_a_race_is_caught_where_the_order_happened_to_be_right():
    """Copies that take forever: the reader has long ended when its slot is written, and still nobody waited."""
    work = drawn(1, n_tokens=20, batch=1)
    slow = machine_of(work, 1, staging=1, chunk_ns_LX=np.full((3, 3), 10**9), **WHOLE)
    with pytest.raises(EngineError, match="is overwritten"):
        ran(work, Lru(), [2, 2, 2], slow, engine=Reuses)


def test_a_pool_that_is_too_small_says_so():
    work = drawn(1, n_tokens=20, batch=4)
    machine = machine_of(work, 1, **WHOLE)
    told = (work, Lru(), [4, 4, 4], [1, 1, 1], machine, no_guesses(), ATOMIC)
    with pytest.raises(EngineError, match="no slot is left for layer"):
        drive(Engine(FakeBackend(machine), 5, *told), work)


def test_a_launch_waits_for_its_copy_and_a_copy_for_its_reader():
    machine = machine_of(drawn(0), 0, **WHOLE)
    backend = FakeBackend(machine)
    backend.copy((0, 1), 0)
    backend.after(COMPUTE, backend.record(COPY), "stall_ns")
    backend.publish(0, {1: 0})
    backend.launch(0, {1: 1})
    assert backend.waited_ns["stall_ns"] > 0
    backend.after(COPY, backend.record(COMPUTE))
    backend.copy((1, 0), 0)
    assert backend.free_ns[COPY] > backend.free_ns[COMPUTE]
