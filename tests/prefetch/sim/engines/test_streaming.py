"""Layers that are streamed: the closed form is a pipeline stepped nanosecond by nanosecond; other steps are as ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.sim.engines.machine import BOTH
from prefetch.sim.engines.pool import HIT, MISS
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.engines.streaming import BUFFERS, pipeline_ns, streamed_replay, without
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import disk_of, machine_of

LAYERS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=7
)


def stepped(layers: list[tuple[int, int, int]]) -> int:
    """Link and GPU do one nanosecond of work at a time; a buffer is taken by a copy and left by its experts."""
    copying, computing, now = 0, 0, 0
    left = [list(layer) for layer in layers]
    while computing < len(layers):
        is_moving = True
        while is_moving:  # what takes no time
            is_moving = copying < len(layers) and left[copying][2] == 0
            is_moving &= copying < computing + BUFFERS
            copying += is_moving
            before, experts, _ = left[min(computing, len(layers) - 1)]
            is_done = computing < len(layers) and computing < copying and before + experts == 0
            computing, is_moving = computing + is_done, is_moving or is_done
        if computing == len(layers):
            break
        is_copying = copying < len(layers) and copying < computing + BUFFERS
        here, has_arrived = left[computing], computing < copying
        if here[0]:
            here[0] -= 1
        elif has_arrived:
            here[1] -= 1
        if is_copying:
            left[copying][2] -= 1
        now += 1
    return now


@given(LAYERS)
def test_the_closed_form_is_the_pipeline(layers):
    assert pipeline_ns(*zip(*layers, strict=True)) == stepped(layers)


@given(*(st.integers(0, 50) for _ in range(3)), st.integers(1, 9))
def test_equal_layers(before, experts, copies, n_layers):
    """Bound by the link, or by computing behind the first layer's copies."""
    found = pipeline_ns([before] * n_layers, [experts] * n_layers, [copies] * n_layers)
    if copies >= before + experts:
        assert found == n_layers * copies + experts
    else:
        assert found == max(before, copies) + experts + (n_layers - 1) * (before + experts)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([Lru(), Lfu()]), st.integers(0, 8), st.booleans())
def test_prompts_stream_and_change_no_cache(seed, policy, room, is_global):
    work = drawn(seed, n_tokens=40)
    rooms = [3 * room] if is_global else [room] * 3
    machine, is_prompt_S = machine_of(work, seed), work.prefill_S > 0
    timed = streamed_replay(work, policy, rooms, [1] * 3, machine)
    rest = without(work, is_prompt_S)
    alone = timed_replay(
        rest, policy, rooms, [1] * 3, machine._replace(before_S=machine.before_S[~is_prompt_S])
    )
    assert timed.time_S[~is_prompt_S].tolist() == alone.time_S.tolist()
    is_rest_A = np.repeat(np.repeat(~is_prompt_S, 3), np.diff(work.start_V))
    assert timed.outcome_A[is_rest_A].tolist() == alone.outcome_A.tolist()
    assert timed.resident == alone.resident
    counts = timed.counts
    assert counts["now_ns"] == timed.time_S.sum() == counts["compute_ns"] + counts["stall_ns"]
    # whatever a prompt needs and is not there was copied, with all others of its layer
    assert counts["demand_loads"] >= (timed.outcome_A == MISS).sum()


def test_the_first_prompt_by_hand():
    """An empty cache: 8 experts of every layer, whatever the prompt needs."""
    work = drawn(1, n_tokens=40)
    machine = machine_of(work, 1)
    first = int(np.flatnonzero(work.prefill_S > 0)[0])
    assert first == 0
    n_experts, before = work.card.n_experts, int(machine.before_S[0])
    copies = (n_experts * np.maximum(machine.whole_ns_L, machine.issue_ns)).tolist()
    experts = [0, 0, 0]
    for layer in range(3):
        for a in range(work.start_V[layer], work.start_V[layer + 1]):
            each = int(machine.token_ns_L[layer]) * int(work.tokens_A[a])
            experts[layer] += max(int(machine.weight_ns_L[layer]), each)
    timed = streamed_replay(work, Lru(), [4] * 3, [1] * 3, machine)
    assert timed.time_S[0] == pipeline_ns([before] * 3, experts, copies)
    assert (timed.outcome_A[: work.start_V[3]] == MISS).all()


def test_a_prompt_and_what_follows_on_paper():
    """A prompt of two tokens, then two generated; later the same again. 4 experts, 100 ns before a layer's, 10 each.

    First copies are the bottleneck, 160 ns a layer: arrivals at 160, 320, 480, and the last expert's 16 ns. Then only
    the last layer's are slow: 40, 40, 400 ns. Layer 0 leaves its buffer at 116, so that they end at 516, not 480.
    """
    ids_TLK = np.array([[[0], [1], [2]], [[0], [3], [2]], [[1], [1], [1]], [[1], [1], [1]]] * 2)
    card = plain_card("paper", n_experts=4, top_k=1, layer_numbers=(0, 1, 2))
    work = workload_of(
        trace_of(
            card,
            ids_TLK,
            request_T=np.repeat([0, 1], 4),
            phase_T=np.array([0, 0, 1, 1] * 2, np.uint8),
        )
    )
    assert work.n_steps == 6
    each_L, took = np.ones(3, np.int64), []
    for chunks in ([40, 40, 40], [10, 10, 100]):
        machine = machine_of(
            work, before_S=np.full(6, 100), weight_ns_L=10 * each_L, token_ns_L=8 * each_L,
            chunk_ns_LX=np.array([[ns] for ns in chunks]), n_chunks_L=each_L, bytes_L=900 * each_L,
            issue_ns=0,
        )  # fmt: skip
        timed = streamed_replay(work, Lru(), [2] * 3, [1] * 3, machine)
        took.append(timed.time_S.tolist())
    # generated: three misses, then three hits; a second prompt copies three of four, and leaves them hits
    assert took[0] == [496, 3 * 150, 330, 3 * 120 + 16, 330, 330]
    # second prompt: copies of 30, 30 and 300; layer 1 copied to 60, layer 2 from 116 to 416, then its 16 ns
    assert took[1] == [532, 330 + 10 + 10 + 100, 330, 432, 330, 330]
    assert timed.counts["demand_loads"] == 12 + 3 + 9


def test_an_expert_that_is_there_is_not_streamed():
    work = drawn(2, n_tokens=40)
    machine, everybody = machine_of(work, 2), np.arange(3 * work.card.n_experts)
    timed = streamed_replay(
        work, Lru(), [work.card.n_experts] * 3, [1] * 3, machine, warm=everybody
    )
    assert (timed.outcome_A == HIT).all()
    assert timed.counts["stall_ns"] == timed.counts["moved_bytes"] == 0


def test_what_layers_are_not_streamed_with():
    work = drawn(2, n_tokens=40)
    for machine in (machine_of(work, 2, miss_way=BOTH), machine_of(work, 2, disk=disk_of(9000))):
        with pytest.raises(ConfigError, match="layers are streamed with misses=wait"):
            streamed_replay(work, Lru(), [4] * 3, [1] * 3, machine)
