"""What uneven routing costs, against numbers that can be had by hand, and the exact in place of the uniform."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiler_traces import launched, operation, shipped_hardware, written
from routing_traces import random_trace

from analysis.device.diagnosis import Beside, diagnose, read
from analysis.device.names import load_names
from analysis.device.offload import offloaded, perfect
from analysis.device.roofline import Peaks, active_experts
from analysis.device.routing_tables import routing_tables
from analysis.device.shapes import Given, Known, Shape
from analysis.device.step_routing import balanced_twin, imbalance, sent_tokens, step_routing
from analysis.device.steps import steps_of
from prefetch.errors import ConfigError, FormatError
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of

NAMES = load_names()
TOKENS, HIDDEN, INNER = 64, 32, 16
SHAPE = Shape(
    tokens=TOKENS,
    hidden=HIDDEN,
    inner=INNER,
    experts=8,
    top_k=2,
    gated=True,
    weight="bf16",
    activation="bf16",
)
COMPUTE_BOUND = Peaks("all bytes at once", 1e18, {"bf16": 1e9})
MEMORY_BOUND = Peaks("all operations at once", 1e9, {"bf16": 1e18})


def routed(ids_TK: np.ndarray, n_layers: int = 2) -> RoutingTrace:
    card = plain_card("by hand", n_experts=8, top_k=2, layer_numbers=tuple(range(n_layers)))
    ids_TLK = np.repeat(ids_TK[:, None, :], n_layers, axis=1)
    return trace_of(card, ids_TLK, request_T=np.arange(len(ids_TK)) // 16)


def even(n: int = TOKENS) -> RoutingTrace:
    return routed(np.stack([2 * np.arange(n) % 8, (2 * np.arange(n) + 1) % 8], axis=1))


def uneven(n: int = TOKENS) -> RoutingTrace:
    """Everybody takes experts 0 and 1."""
    return routed(np.tile([0, 1], (n, 1)))


def cost_us(trace: RoutingTrace, peaks: Peaks, ranks: int, tile: int = 1) -> float:
    return (
        imbalance(step_routing(trace, TOKENS, is_decode=False), SHAPE, peaks, ranks, tile).cost_ns
        / 1e3
    )


def test_a_synthetic_imbalance_and_its_balanced_twin_differ_by_what_the_hand_computes():
    """Four ranks of two experts, bound by operations: one rank has all choices, where each should have a quarter."""
    choices, layers = TOKENS * 2, 2
    one_choice_us = 2 * HIDDEN * INNER * 3 / 1e9 * 1e6
    by_hand = layers * (choices - choices / 4) * one_choice_us
    assert cost_us(even(), COMPUTE_BOUND, 4) == pytest.approx(0)
    assert cost_us(uneven(), COMPUTE_BOUND, 4) == pytest.approx(by_hand)
    assert cost_us(uneven(), COMPUTE_BOUND, 1) == pytest.approx(
        0
    )  # one rank computes as much either way


def test_bound_by_bytes_uneven_routing_is_cheaper_on_one_rank():
    one_expert_us = HIDDEN * INNER * 3 * 2 / 1e9 * 1e6
    assert cost_us(uneven(), MEMORY_BOUND, 1) == pytest.approx(2 * (2 - 8) * one_expert_us)
    assert cost_us(uneven(), MEMORY_BOUND, 4) == pytest.approx(
        0
    )  # the busy rank reads its two, as each would


def test_tiles_cost_what_their_padding_computes():
    """8 choices of 8 tokens, even: one each. In tiles of 16 every expert computes 16."""
    trace = routed(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]))
    routing = step_routing(trace, 4, is_decode=False)
    assert routing.padding(16) == 16 and routing.padding(1) == 1
    assert step_routing(uneven(), TOKENS, is_decode=False).padding(16) == 1


@given(st.lists(st.integers(0, 50), min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_a_balanced_twin_has_as_many_choices_and_no_rank_has_more_than_one_too_many(counts, ranks):
    twin_E = balanced_twin(np.array(counts)[None, None])[0, 0]
    assert twin_E.sum() == sum(counts) and np.ptp(twin_E) <= 1
    assert np.ptp(twin_E.reshape(ranks, -1).sum(axis=1)) <= 1


def test_decode_steps_take_one_token_of_as_many_requests():
    ids = np.tile(np.arange(16) % 8, 4)  # four requests of 16 tokens that choose alike
    trace = routed(np.stack([ids, (ids + 1) % 8], axis=1))
    decode = step_routing(trace, 4, is_decode=True)
    assert (decode.counts_SLE.max(axis=2) == 4).all() and decode.active == 2
    assert step_routing(trace, 4, is_decode=False).active == 5
    with pytest.raises(FormatError, match=r"at least the 65 tokens of one step .* found 64"):
        step_routing(trace, 65, is_decode=False)


def test_tokens_that_are_sent_are_counted_one_by_one():
    ids = np.array(
        [[[0, 1]], [[0, 7]], [[4, 7]]]
    )  # homes 0, 1, 0 of two ranks; experts 4 to 7 on rank 1
    assert sent_tokens(ids, 8, 2) == (
        3 - 1,
        3,
    )  # token 0 stays; 1 sends one of two; 2 sends both, once


def fused(folder, experts: int = 8):
    dims = [[TOKENS, HIDDEN], [experts, 2 * INNER, HIDDEN], [experts, HIDDEN, INNER], [TOKENS, 2]]
    events = [
        operation("vllm::rocm_aiter_fused_moe", 0, 50, dims),
        *launched(1, "aiter_fused_moe", 5, 60, 50.0),
    ]
    return read(written(folder, events), NAMES)


def test_recorded_routing_replaces_the_uniform_assumption(tmp_path):
    profile = fused(tmp_path)
    blind = diagnose(profile, Known(NAMES), Beside(MEMORY_BOUND))
    assert blind.operations[0].cost.active_experts == pytest.approx(active_experts(TOKENS, 8, 2))
    assert all(not one.is_computed for one in blind.recommendations if one.kind == "algorithmic")
    routing = step_routing(uneven(), TOKENS, is_decode=False)
    told = diagnose(profile, Known(NAMES), Beside(MEMORY_BOUND, routing))
    assert told.operations[0].cost.active_experts == 2 and told.operations[0].is_exact
    saved = (blind.operations[0].cost.n_bytes - told.operations[0].cost.n_bytes) / (
        HIDDEN * INNER * 3 * 2
    )
    assert saved == pytest.approx(active_experts(TOKENS, 8, 2) - 2)


def test_the_cost_of_imbalance_becomes_a_recommendation_with_its_number(tmp_path):
    routing = step_routing(uneven(), TOKENS, is_decode=False)
    found = diagnose(
        fused(tmp_path, 2), Known(NAMES, Given(expert_parallel=4)), Beside(COMPUTE_BOUND, routing)
    )
    assert [one.ranks for one in found.imbalances] == [4]
    (advice,) = [one for one in found.recommendations if one.title.startswith("Balance")]
    assert advice.impact_us == pytest.approx(cost_us(uneven(), COMPUTE_BOUND, 4))


def test_routing_of_another_model_is_refused(tmp_path):
    routing = step_routing(random_trace(), TOKENS, is_decode=False, source="there")
    with pytest.raises(ConfigError, match=r"trace=there: .* has 16 experts, the profiled one 8"):
        diagnose(fused(tmp_path), Known(NAMES), Beside(MEMORY_BOUND, routing))


def test_tables_of_routing_are_those_of_the_analyses_and_what_lacks_is_said():
    trace = random_trace()
    steps = steps_of(trace, TOKENS, is_decode=False, source="")
    found = routing_tables(trace, steps)
    assert {"expert_load", "utilisation", "hotspots", "capacity", "remedies"} <= set(found.tables)
    assert "scores" in found.missing["gating"]
    drops = found.tables["capacity"]
    assert (
        len(drops)
        and found.tables["remedies"].remedy.isin(["pin experts", "replicate experts"]).any()
    )


def test_pinning_and_perfect_prefetch_are_simulated():
    trace = random_trace(n_requests=6, tokens=20)
    card = dataclasses.replace(
        trace.card, expert_bytes_L=(1 << 20,) * 4, expert_precision="bf16", hidden_size=64, dense_bytes=1 << 20,
        shared_bytes=0, kv_bytes_per_token=64,
    )  # fmt: skip
    machine = shipped_hardware("rtx4090_pcie4")
    found = offloaded(dataclasses.replace(trace, card=card), card, machine, horizon=2)
    assert (found.slots, found.pinned, found.horizon) == (4, 1, 2)
    assert 0 < found.perfect_ns < found.demand_ns
    work = workload_of(trace, phase="decode")
    told = perfect(work, 2)
    first = told.ids_VW[0]
    assert first[first >= 0].tolist() == work.ids_A[: work.start_V[1]].tolist()
