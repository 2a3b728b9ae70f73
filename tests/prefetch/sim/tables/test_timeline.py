"""The recorder hears everything: its spans are the engine's counts, and no lane does two things at once."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.sim.engines.machine import BOTH, ON_HOST, WAIT, no_guesses
from prefetch.sim.engines.pool import ATOMIC, LATE, MISS, OVERSHOOT
from prefetch.sim.engines.recorder import (
    AHEAD,
    BEFORE,
    COMPUTES,
    DEMAND,
    EXPERT,
    GPU,
    HOST,
    LANES,
    LATE_COPY,
    LINK,
    STALLS,
    UPLOAD,
    Recorder,
)
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.timeline import Timeline, cut, timeline_of, write_chrome_trace
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import POLICIES, guesses_of, machine_of
from tests.prefetch.sim.limits.test_bounds import budget_of


def recording(seed, **told):
    """A recorder that has run, and the compiled engine's counts of the same run."""
    work = drawn(seed, n_tokens=told.get("n_tokens", 30), batch=told.get("batch", 1))
    how = {name: told[name] for name in ("landing", "by_score", "cancels") if name in told}
    machine = machine_of(work, seed, miss_way=told.get("way", WAIT), **how)
    guesses = no_guesses()
    if told.get("width", 3):
        guesses = guesses_of(work, seed, told.get("ahead", 2), told.get("width", 3), 0.7)
    given = (work, told.get("policy", Lru()), [told.get("room", 4)] * 3, [1] * 3, machine, guesses)
    recorder = Recorder(*given, told.get("semantics", ATOMIC))
    recorder.run()
    return recorder, timed_replay(*given, told.get("semantics", ATOMIC))


def total(spans, *kinds):
    return sum(span.took_ns for span in spans if span.kind in kinds)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    room=st.integers(0, 9),
    batch=st.sampled_from([1, 3]),
    semantics=st.sampled_from([ATOMIC, ATOMIC, OVERSHOOT]),
    way=st.sampled_from([WAIT, WAIT, BOTH, ON_HOST]),
    ahead=st.integers(1, 4),
    width=st.integers(0, 4),
    landing=st.sampled_from([0, 0, 2]),
    by_score=st.booleans(),
)
def test_spans_are_the_engines_counts(seed, **told):
    recorder, timed = recording(seed, **told)
    spans, counts = recorder.spans, timed.counts
    assert dict(recorder.counts) == counts
    assert total(spans, BEFORE, EXPERT) == counts["compute_ns"]
    for name, kind in STALLS.items():
        assert total(spans, kind) == counts[name]
    assert total(spans, DEMAND, AHEAD, LATE_COPY, UPLOAD) == counts["link_ns"]
    assert (
        recorder.begins()[-1] == counts["now_ns"] == max(s.end_ns for s in spans if s.lane == GPU)
    )
    assert {span.lane for span in spans} <= set(LANES)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([WAIT, BOTH]), st.integers(0, 9))
def test_no_lane_does_two_things_at_once(seed, way, room):
    recorder, _ = recording(seed, way=way, room=room)
    for lane in (GPU, LINK):
        own = sorted((s for s in recorder.spans if s.lane == lane), key=lambda s: s.begin_ns)
        assert all(a.end_ns <= b.begin_ns for a, b in itertools.pairwise(own))
    gpu = [s for s in recorder.spans if s.lane == GPU]  # it computes or waits, all the time
    assert sum(s.took_ns for s in gpu) == recorder.now


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(POLICIES), st.integers(0, 9), st.booleans())
def test_every_expert_is_named(seed, policy, room, by_score):
    """Computed: all that an event needs, each once. Copied on demand: those that were missing."""
    recorder, timed = recording(seed, policy=policy, room=room, by_score=by_score)
    work = recorder.work
    for event in range(len(work.start_V) - 1):
        at = slice(work.start_V[event], work.start_V[event + 1])
        step, layer = divmod(event, 3)
        own = [s for s in recorder.spans if (s.step, s.layer) == (step, layer)]
        computed = sorted(s.expert for s in own if s.kind == EXPERT)
        assert computed == sorted(work.ids_A[at].tolist())
        missing = work.ids_A[at][timed.outcome_A[at] == MISS].tolist()
        assert sorted(s.expert for s in own if s.kind == DEMAND) == sorted(missing)
        late = set(work.ids_A[at][timed.outcome_A[at] == LATE].tolist())
        assert {s.expert for s in own if s.kind == LATE_COPY} <= late


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([WAIT, BOTH]), st.booleans())
def test_the_chunks_of_a_copy_are_the_whole_of_one_expert(seed, way, by_score):
    recorder, _ = recording(seed, way=way, by_score=by_score, cancels=False)
    begun: dict[tuple[int, int], int] = {}
    moved = [s for s in recorder.spans if s.kind in (AHEAD, LATE_COPY, UPLOAD)]
    whole_L = recorder.machine.whole_ns_L
    for span in moved:
        who = (span.layer, span.expert)
        begun[who] = begun.get(who, 0) + span.took_ns
        if span.kind == LATE_COPY or begun[who] == whole_L[span.layer]:
            assert begun.pop(who) == whole_L[span.layer]
    assert len(begun) <= 1  # under way when the run was over


def test_a_miss_is_computed_after_its_copy():
    recorder, _ = recording(7, room=3)
    for copy in (s for s in recorder.spans if s.kind == DEMAND):
        where = (copy.step, copy.layer, copy.expert)
        computed = [
            s for s in recorder.spans if s.kind == EXPERT and (s.step, s.layer, s.expert) == where
        ]
        assert len(computed) == 1 and computed[0].begin_ns >= copy.end_ns


def test_the_host_computes_what_it_is_said_to():
    recorder, timed = recording(3, way=ON_HOST, width=0)
    assert timed.counts["on_host"] > 0
    ends = {s.end_ns for s in recorder.spans if s.kind == COMPUTES}
    waited = [s for s in recorder.spans if s.kind == STALLS["host_stall_ns"] and s.took_ns]
    assert waited and all(s.end_ns in ends for s in waited)


def test_the_trace_file_has_the_engines_sums_and_names_its_lanes(tmp_path):
    recorder, timed = recording(11)
    begins = recorder.begins()
    shown = Timeline(cut(recorder.spans, 0, begins[-1]), tuple(begins), 0, "an empty cache", 0)
    write_chrome_trace(tmp_path / "timeline.json", shown, "a test")
    told = json.loads((tmp_path / "timeline.json").read_text())
    names = {e["tid"]: e["args"]["name"] for e in told["traceEvents"] if e["name"] == "thread_name"}
    events = [e for e in told["traceEvents"] if e["ph"] == "X"]
    assert list(names.values()) == list(LANES) == [GPU, LINK, HOST]
    assert {e["ph"] for e in told["traceEvents"]} == {"M", "X"} and len(
        {e["pid"] for e in events}
    ) == 1
    took = {lane: 0 for lane in LANES}
    for event in events:
        assert event["ts"] >= 0 and event["dur"] > 0
        took[names[event["tid"]]] += round(event["dur"] * 1000)
    assert took[GPU] == timed.counts["now_ns"]
    in_run = timed.counts["link_ns"] - max(0, recorder.link_free - begins[-1])
    assert took[LINK] <= timed.counts["link_ns"] and took[LINK] >= in_run
    waits = sum(round(e["dur"] * 1000) for e in events if e["name"] in STALLS.values())
    assert waits == sum(timed.counts[name] for name in STALLS)


def test_what_is_shown_is_cut_to_it():
    recorder, _ = recording(5)
    begins = recorder.begins()
    a, b = begins[4], begins[7]
    spans = cut(recorder.spans, a, b)
    assert (
        sum(s.took_ns for s in spans if s.lane == GPU) == b - a == int(np.sum(recorder.time_S[4:7]))
    )
    assert all(s.begin_ns >= 0 and s.end_ns <= b - a for s in spans)


def test_it_says_what_its_run_began_with():
    """Pinned and warm experts are no empty cache, and steps that several share are no request's."""
    budget = budget_of([4, 4, 4], [1, 1, 1])
    for batch, is_request in ((1, True), (3, False)):
        work = drawn(2, n_tokens=120, batch=batch, phase="decode")
        cell = Cell({}, Lru(), budget, machine_of(work, 2))
        shown = timeline_of(cell, work)
        assert shown.start == "an empty cache" and (shown.request >= 0) == is_request
    begun = dataclasses.replace(cell, pinned=np.array([0]), warm=np.array([1, 2]))
    shown = timeline_of(begun, work)
    assert shown.start == "a start with pinned experts and the most used experts"
