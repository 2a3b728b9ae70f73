"""Steps and events are what a plain reading of the trace gives, by hand and by law."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.sim.workload import MIXED, NEVER, Workload, next_uses, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, no_expert, trace_of

BATCHES, CHUNKS = st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 3, 8])


def routed(prompts: list[int], generated: list[int], ids_TLK=None, **known) -> RoutingTrace:
    """Requests 10, 11, ... of so many tokens; every token chooses its row, modulo 8, if nothing else is given."""
    lengths = [p + g for p, g in zip(prompts, generated, strict=True)]
    phase_T = np.concatenate(
        [np.repeat([PREFILL, DECODE], pair) for pair in zip(prompts, generated, strict=True)]
    )
    if ids_TLK is None:
        ids_TLK = (np.arange(sum(lengths)) % 8)[:, None, None]
    ids_TLK = np.asarray(ids_TLK)
    layers = tuple(range(ids_TLK.shape[1]))
    card = plain_card("routed", n_experts=8, top_k=ids_TLK.shape[2], layer_numbers=layers)
    request_T = np.repeat(np.arange(10, 10 + len(lengths)), lengths)
    return trace_of(card, ids_TLK, request_T=request_T, phase_T=phase_T, **known)


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """A few requests, some without a prompt or without an answer, with choices that name nobody and rows not run."""
    n_requests = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 6), min_size=n_requests, max_size=n_requests)
    prompts, generated = draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_tokens = sum(prompts) + sum(generated)
    noise = rng.random((n_tokens, 2, 8))
    ids_TLK = np.argsort(noise, axis=2)[:, :, :3]
    ids_TLK[rng.random(ids_TLK.shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
    executed_T = rng.random(n_tokens) >= draw(st.sampled_from([0.0, 0.3]))
    return routed(prompts, generated, ids_TLK, executed_T=executed_T)


def rows_of(work: Workload) -> list[list[int]]:
    """Rows of every step."""
    return [part.tolist() for part in np.split(work.rows_R, work.row_start_S[1:-1])]


def plain_steps(trace: RoutingTrace, batch: int, chunk: int | None) -> list[list[int]]:
    """First come first served, with queues."""
    rows = np.flatnonzero(trace.executed_T)
    is_prompt = trace.phase_T == PREFILL
    if is_prompt[rows].all():
        is_prompt = np.zeros(len(is_prompt), bool)
    waiting = deque(
        deque(rows[trace.request_T[rows] == request].tolist())
        for request in dict.fromkeys(trace.request_T[rows].tolist())
    )
    lanes: list[deque[int]] = [deque() for _ in range(batch)]
    steps = []
    while True:
        lanes = [lane or (waiting.popleft() if waiting else lane) for lane in lanes]
        running = [lane for lane in lanes if lane]
        if not running:
            return steps
        in_prompt = [lane for lane in running if is_prompt[lane[0]]]
        if chunk is None and in_prompt:
            running = in_prompt[:1]
        step, left = [], chunk or len(rows)
        for lane in running:
            if not is_prompt[lane[0]]:
                step.append(lane.popleft())
                continue
            while lane and is_prompt[lane[0]] and left:
                step.append(lane.popleft())
                left -= 1
        steps.append(step)


def plain_event(trace: RoutingTrace, rows: list[int], layer: int) -> tuple[list[int], list[int]]:
    """Distinct experts by their last choice, and how many tokens chose each."""
    choices = trace.ids_TLK[rows, layer].ravel().tolist()
    named = [e for e in choices if e != no_expert(trace.card.n_experts)]
    last = {expert: place for place, expert in enumerate(named)}
    ids, counts = sorted(last, key=last.__getitem__), Counter(named)
    return ids, [counts[expert] for expert in ids]


def test_one_at_a_time():
    """A prompt is one step, a generated token another."""
    work = workload_of(routed([3, 1], [2, 1]))
    assert rows_of(work) == [[0, 1, 2], [3], [4], [5], [6]]
    assert work.prefill_S.tolist() == [3, 0, 0, 1, 0]
    assert work.decode_S.tolist() == [0, 1, 1, 0, 1]
    assert work.is_decode_S.tolist() == [False, True, True, False, True]
    assert work.context_S.tolist() == [3, 4, 5, 1, 2]
    assert work.pairs_S.tolist() == [1 + 2 + 3, 4, 5, 1, 2]
    assert work.request_S.tolist() == [10, 10, 10, 11, 11]
    assert not work.is_teacher_forced


def test_two_at_a_time():
    """Prompts are run one by one while nobody generates; whoever ends makes place for the next request."""
    work = workload_of(routed([2, 1, 0], [3, 1, 2]), batch=2)
    assert rows_of(work) == [[0, 1], [5], [2, 6], [3, 7], [4, 8]]
    assert work.context_S.tolist() == [2, 1, 3 + 2, 4 + 1, 5 + 2]
    assert work.request_S.tolist() == [10, 11, MIXED, MIXED, MIXED]


def test_four_at_a_time_and_a_fifth_that_waits():
    work = workload_of(routed([0] * 5, [1, 3, 2, 2, 2]), batch=4)
    assert rows_of(work) == [[0, 1, 4, 6], [8, 2, 5, 7], [9, 3]]
    assert work.decode_S.tolist() == [4, 4, 2]


def test_more_at_a_time_than_there_are_takes_no_more_memory():
    trace, most = routed([2, 1, 0, 4], [3, 1, 2, 0]), 2**40
    many, four = workload_of(trace, batch=most, chunk=most), workload_of(trace, batch=4, chunk=9)
    assert rows_of(many) == rows_of(four)


def test_chunks_of_prompts_beside_tokens_that_are_generated():
    """Three tokens of prompts per step: what the first one leaves goes to the next."""
    work = workload_of(routed([0, 5, 2], [4, 1, 1]), batch=3, chunk=3)
    assert rows_of(work) == [[0, 4, 5, 6], [1, 7, 8, 10], [2, 9, 11], [3, 12]]
    assert work.prefill_S.tolist() == [3, 3, 1, 0]
    assert work.decode_S.tolist() == [1, 1, 2, 2]
    assert work.context_S.tolist() == [1 + 3, 2 + 5 + 1, 3 + 6 + 2, 4 + 3]
    assert work.pairs_S.tolist() == [1 + (1 + 2 + 3), 2 + (4 + 5) + 1, 3 + 6 + 2, 4 + 3]


def test_a_trace_of_prompts_only_runs_as_if_they_had_been_generated():
    trace = routed([3, 2], [0, 0])
    for phase in ("auto", "decode"):
        work = workload_of(trace, phase=phase)
        assert rows_of(work) == [[0], [1], [2], [3], [4]]
        assert work.is_teacher_forced and work.is_decode_S.all() and not work.prefill_S.any()
    work = workload_of(trace, phase="prefill")
    assert rows_of(work) == [[0, 1, 2], [3, 4]] and not work.is_teacher_forced


def test_a_phase_that_is_asked_for():
    trace = routed([2, 2], [1, 2])
    assert rows_of(workload_of(trace, phase="decode")) == [[n] for n in range(7)]
    assert workload_of(trace, phase="decode").is_teacher_forced
    assert rows_of(workload_of(trace, phase="prefill")) == [[0, 1], [3, 4]]
    assert workload_of(routed([0], [3]), phase="prefill").n_steps == 0


def test_experts_stand_in_the_order_of_their_last_choice():
    ids_TLK = [[[5, 2], [0, 1]], [[2, 5], [3, 0]], [[7, 5], [-1, 3]]]
    work = workload_of(routed([3], [0], ids_TLK), phase="prefill")
    assert work.start_V.tolist() == [0, 3, 6]
    assert work.ids_A.tolist() == [2, 7, 5, 1, 0, 3]
    assert work.tokens_A.tolist() == [2, 1, 3, 1, 2, 2]


def test_rows_that_were_not_run_are_left_out():
    trace = routed([4], [1], executed_T=[False, False, True, True, True])
    work = workload_of(trace)
    assert rows_of(work) == [[2, 3], [4]]
    assert work.context_S.tolist() == [4, 5]  # keys and values of the others are there all the same
    assert work.pairs_S.tolist() == [3 + 4, 5]


def test_requests_may_have_any_number():
    trace = routed([0], [2])
    work = workload_of(trace_of(trace.card, trace.ids_TLK, request_T=-1, phase_T=DECODE))
    assert work.context_S.tolist() == [1, 2]


def test_an_empty_trace():
    work = workload_of(routed([1], [1]).rows(slice(0, 0)), batch=2)
    assert (work.n_steps, work.n_accesses, work.start_V.tolist()) == (0, 0, [0])
    assert not len(work.context_S) and not len(work.request_S)


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"batch": 0}, "batch=0"), ({"chunk": 0}, "chunk=0"), ({"phase": "both"}, "'both'.*prefill")],
)
def test_what_cannot_be_run(asked, message):
    with pytest.raises(ConfigError, match=message):
        workload_of(routed([1], [1]), **asked)


@settings(deadline=None)
@given(traces(), BATCHES, CHUNKS)
def test_steps_equal_plain_queues(trace, batch, chunk):
    work = workload_of(trace, batch=batch, chunk=chunk)
    assert [step for step in rows_of(work) if step] == plain_steps(trace, batch, chunk)
    assert sorted(work.rows_R.tolist()) == np.flatnonzero(trace.executed_T).tolist()


@settings(deadline=None)
@given(traces(), BATCHES, CHUNKS)
def test_events_equal_their_definition(trace, batch, chunk):
    work = workload_of(trace, batch=batch, chunk=chunk)
    n_layers = trace.card.n_layers
    for step in range(work.n_steps):
        for layer in range(n_layers):
            start, stop = work.start_V[step * n_layers + layer :][:2]
            ids, tokens = plain_event(trace, rows_of(work)[step], layer)
            assert work.ids_A[start:stop].tolist() == ids
            assert work.tokens_A[start:stop].tolist() == tokens
    named = trace.ids_TLK[trace.executed_T] != no_expert(trace.card.n_experts)
    assert work.tokens_A.sum() == named.sum()
    assert work.start_V[-1] == work.n_accesses


@settings(deadline=None)
@given(traces(), BATCHES, CHUNKS)
def test_what_a_step_says_of_itself(trace, batch, chunk):
    """Tokens by phase, contexts of its requests, and whose step it is."""
    work = workload_of(trace, batch=batch, chunk=chunk)
    for step, rows in enumerate(rows_of(work) if work.n_steps else []):
        is_prompt = (trace.phase_T[rows] == PREFILL) & (not work.is_teacher_forced)
        assert work.prefill_S[step] == is_prompt.sum()
        assert work.decode_S[step] == len(rows) - is_prompt.sum()
        requests, reach = trace.request_T[rows], trace.position_T[rows] + 1
        assert work.context_S[step] == sum(max(reach[requests == r]) for r in set(requests))
        assert work.pairs_S[step] == reach.sum()
        assert work.request_S[step] == (requests[0] if len(set(requests)) == 1 else MIXED)
        assert len(set(requests)) <= batch
        if chunk is not None:
            assert work.prefill_S[step] <= chunk
        elif is_prompt.any():
            assert is_prompt.all() and len(set(requests)) == 1


@settings(deadline=None)
@given(traces(), BATCHES)
def test_next_uses_equal_a_plain_search(trace, batch):
    work = workload_of(trace, batch=batch)
    event_A = np.repeat(np.arange(len(work.start_V) - 1), np.diff(work.start_V))
    entries = list(zip((event_A % trace.card.n_layers).tolist(), work.ids_A.tolist(), strict=True))
    next_A, first_LE = next_uses(work)
    for a, entry in enumerate(entries):
        later = [b for b in range(a + 1, len(entries)) if entries[b] == entry]
        assert next_A[a] == (later[0] if later else NEVER)
    for layer in range(trace.card.n_layers):
        for expert in range(trace.card.n_experts):
            uses = [a for a, entry in enumerate(entries) if entry == (layer, expert)]
            assert first_LE[layer, expert] == (uses[0] if uses else NEVER)
