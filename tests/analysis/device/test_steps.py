"""Steps of recorded tokens as an engine would batch them, and what is said of routing that fits the profile badly."""

import numpy as np
import pytest
from profiler_traces import launched, operation, written
from routing_traces import random_trace

from analysis.device.advice import NOT_COMPUTABLE
from analysis.device.diagnosis import Beside, Diagnosis, diagnose, read
from analysis.device.names import load_names
from analysis.device.roofline import Peaks
from analysis.device.routing_page import routing_page
from analysis.device.routing_tables import routing_tables
from analysis.device.shapes import Given, Known
from analysis.device.step_routing import step_routing
from analysis.device.steps import batched, steps_of
from prefetch.errors import ConfigError, FormatError
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of

NAMES = load_names()
PEAKS = Peaks("all bytes at once", 1e18, {"bf16": 1e9})


def routed(ids_TK: np.ndarray, request_T: np.ndarray, phase_T: object = DECODE) -> RoutingTrace:
    card = plain_card("by hand", n_experts=8, top_k=2, layer_numbers=(0, 1))
    ids_TLK = np.repeat(ids_TK[:, None, :], 2, axis=1)
    return trace_of(card, ids_TLK, request_T=request_T, phase_T=phase_T)


def fused(folder, tokens: int = 4, name: str = "aiter_fused_moe") -> object:
    dims = [[tokens, 32], [8, 32, 32], [8, 32, 16], [tokens, 2]]
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, dims), *launched(1, name, 5, 60, 50.0)]
    return read(written(folder, events), NAMES)


def diagnosed(
    folder, trace: RoutingTrace, given: Given | None = None, tokens: int = 4
) -> Diagnosis:
    routing = step_routing(trace, 4, is_decode=True, source="there")
    return diagnose(fused(folder, tokens), Known(NAMES, given or Given()), Beside(PEAKS, routing))


def test_who_ends_makes_room_for_the_next():
    """Two places: the first request holds one for three steps, the second and third share the other."""
    request_T = np.array([0, 0, 0, 1, 2, 2])
    assert batched(request_T, 2).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_step_never_holds_a_request_twice_where_there_are_enough():
    rng = np.random.default_rng(0)
    request_T = np.repeat(np.arange(40), rng.integers(1, 30, 40))
    order_T = batched(request_T, 8)
    steps = request_T[order_T].reshape(-1, 8)
    assert len(steps) > 20 and all(len(set(step)) == 8 for step in steps.tolist())
    assert len(set(order_T.tolist())) == len(order_T)


def test_too_few_requests_and_the_wrong_phase_are_said(tmp_path):
    ids = np.stack([np.arange(12) % 8, (np.arange(12) + 1) % 8], axis=1)
    found = diagnosed(tmp_path, routed(ids, np.repeat([0, 1], 6), PREFILL))
    assert any("a step holds tokens of 2.0 requests" in note for note in found.notes)
    assert any("no tokens marked as generated" in note for note in found.notes)
    assert "3 steps of 4 tokens (of 2.0 requests)" in routing_page(found)


def test_rows_of_the_other_phase_are_left_out():
    ids = np.stack([np.arange(8), (np.arange(8) + 1) % 8], axis=1)
    phases = np.array([PREFILL, PREFILL, DECODE, DECODE] * 2)
    steps = steps_of(routed(ids, np.repeat([0, 1], 4), phases), 2, is_decode=True, source="")
    assert steps.rows.ids_TLK[:, 0, 0].tolist() == [2, 6, 3, 7] and steps.is_phase_recorded
    with pytest.raises(FormatError, match="found 4 executed rows"):
        steps_of(routed(ids, np.repeat([0, 1], 4), phases), 5, is_decode=False, source="")


def test_drops_are_those_of_the_steps_and_not_of_neighbours():
    """Each request stays with its own two experts: in a step all eight are used once, and nothing is dropped."""
    request_T = np.repeat(np.arange(4), 16)
    trace = routed(np.stack([2 * request_T, 2 * request_T + 1], axis=1), request_T)
    for is_decode, dropped in ((True, 0.0), (False, 0.75)):
        steps = steps_of(trace, 4, is_decode=is_decode, source="")
        curve = routing_tables(trace, steps).tables["capacity"]
        assert curve[curve.capacity_factor == 1].dropped_share.tolist() == [dropped, dropped]


def test_a_call_of_another_size_than_the_steps_is_not_called_exact(tmp_path):
    trace = random_trace(n_requests=8, tokens=20)
    card = plain_card("x", n_experts=8, top_k=2, layer_numbers=tuple(range(trace.card.n_layers)))
    ids = trace.ids_TLK[:, :, :2] % 7
    ids[:, :, 1] = 7
    routing = trace_of(card, ids, request_T=trace.request_T, phase_T=DECODE)
    assert diagnosed(tmp_path, routing).operations[0].is_exact
    assert not diagnosed(tmp_path, routing, tokens=5).operations[0].is_exact


def test_routing_of_other_experts_is_refused_though_nothing_can_be_judged(tmp_path):
    events = [
        operation("vllm::moe_forward", 0, 50, [[4, 32], [4, 64]]),
        *launched(1, "k", 5, 60, 9),
    ]
    profile = read(written(tmp_path, events), NAMES)
    ids = np.stack([np.arange(8), (np.arange(8) + 1) % 8], axis=1)
    routing = step_routing(routed(ids, np.arange(8)), 4, is_decode=True, source="there")
    with pytest.raises(ConfigError, match=r"trace=there: .* has 8 experts, the profiled one 64"):
        diagnose(profile, Known(NAMES), Beside(None, routing))


def test_routing_of_other_layers_is_said(tmp_path):
    ids = np.stack([np.arange(8), (np.arange(8) + 1) % 8], axis=1)
    found = diagnosed(tmp_path, routed(ids, np.arange(8)))
    assert any("has 2 MoE layers, the profile 1" in note for note in found.notes)


def test_experts_that_are_cut_over_ranks_are_not_spread_over_them(tmp_path):
    """Each of 8 ranks computes a part of every expert: none is busier."""
    ids = np.stack([np.arange(8), (np.arange(8) + 1) % 8], axis=1)
    found = diagnosed(tmp_path, routed(ids, np.arange(8)), Given(tensor_parallel=8))
    assert [one.ranks for one in found.imbalances] == [1]


def test_a_tile_that_nobody_tells_is_not_made_up(tmp_path):
    ids = np.tile([0, 1], (8, 1))
    found = diagnosed(tmp_path, routed(ids, np.arange(8)))
    (advice,) = [one for one in found.recommendations if one.title.startswith("Choose the tile")]
    assert advice.impact == NOT_COMPUTABLE and "no kernel's name tells" in advice.action


def test_too_fast_a_call_is_not_explained_by_routing_that_is_known(tmp_path):
    """Blind, fewer experts might explain it; with their number recorded nothing does, and nobody is asked to record."""
    ids = np.tile([0, 1], (8, 1))
    routing = step_routing(routed(ids, np.arange(8)), 4, is_decode=True, source="there")
    slow = Peaks("a slow device", 50e6, {"bf16": 1e18})
    blind = diagnose(fused(tmp_path), Known(NAMES), Beside(slow)).operations[0]
    told = diagnose(fused(tmp_path), Known(NAMES), Beside(slow, routing)).operations[0]
    assert blind.anomaly and told.anomaly and "record the routing" not in told.anomaly
    assert (
        "with the recorded routing" in told.anomaly
        and told.judged.efficiency < blind.judged.efficiency
    )
