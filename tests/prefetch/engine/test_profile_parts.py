"""What a profile is made of: peers that compute the same, bounds, clocks, memory counts, drawn routing."""

from __future__ import annotations

import dataclasses
import platform
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefetch.config import ProfileConfig
from prefetch.engine.profiling import words
from prefetch.engine.profiling.device import facts, free_threads, place_of, using
from prefetch.engine.profiling.grid import Cell, drawn_logits, grid_of
from prefetch.engine.profiling.limits import limits, needs
from prefetch.engine.profiling.measure import dropped_share
from prefetch.engine.profiling.memory import peak_bytes
from prefetch.engine.profiling.operations import N_OPERATIONS, operands, operations
from prefetch.engine.profiling.peers import grouped_moe, loop_moe, torch_router
from prefetch.engine.profiling.timing import Clock, times_of
from prefetch.engine.profiling.utilisation import Load
from prefetch.engine.profiling.work import (
    BACKWARD,
    FORWARD,
    LAYER,
    PARTS,
    Roofs,
    Work,
    bound_ns,
    work_of,
)
from prefetch.kernels.dense import dense_moe
from prefetch.kernels.experts import moe_torch
from prefetch.kernels.routing import route_torch

CPU = place_of("cpu")
CELL = Cell(9, 6, 2, 16, 24, "fp32", "uniform")
ROOFS = Roofs(10**9, {"fp32": 10**12, "bf16": 10**13, "fp16": 10**13})


def of(cell: Cell = CELL, seed: int = 0):
    return operands(cell, cell.layout.random(cell.experts, seed), 1.0, seed)


@pytest.mark.parametrize("cell", [CELL, dataclasses.replace(CELL, tokens=1, top_k=6)])
def test_peers_compute_the_definition(cell):
    one = of(cell)
    given_ = one.x_TD, one.ids_TK, one.weights_TK, one.pool_EN, cell.layout
    expected = moe_torch(*given_, one.slot_E)
    torch.testing.assert_close(loop_moe(*given_), expected)
    torch.testing.assert_close(grouped_moe(*given_), expected)


def test_gradients_of_all_baselines_are_equal():
    found = {
        one.implementation: one.make()()
        for one in operations(of(), 6.0, BACKWARD)  # with so many seats nothing is dropped
    }
    assert set(found) == {"loop", "grouped_mm", "dense"}
    for name in ("grouped_mm", "dense"):
        for ours, theirs in zip(found["loop"], found[name], strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_every_operation_is_counted_and_runs():
    for direction in (FORWARD, BACKWARD):
        found = list(operations(of(), 1.0, direction))
        assert len(found) == N_OPERATIONS[direction]
        assert len({(one.part, one.implementation) for one in found}) == len(found)
        for one in found:
            one.make()()


def test_torch_router_chooses_the_same():
    logits_TE = drawn_logits(CELL, 1.0, 0, "cpu")
    ids_TK, weights_TK = torch_router(logits_TE, 2)
    expected = route_torch(logits_TE, 2)
    assert torch.equal(ids_TK.int(), expected.ids_TK)
    torch.testing.assert_close(weights_TK, expected.weights_TK)


@given(
    st.integers(1, 600), st.integers(1, 40), st.sampled_from(PARTS), st.sampled_from([FORWARD, BACKWARD]),
    st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_bounds_are_positive_and_rise_with_work(tokens, distinct, part, direction, dtype):
    cell = Cell(tokens, 40, 2, 16, 24, dtype, "uniform")
    work = work_of(cell, part, direction, distinct)
    ns, _ = bound_ns(work, ROOFS, dtype)
    assert work.bytes > 0 and work.flops >= 0 and ns >= 1
    more = work_of(dataclasses.replace(cell, tokens=tokens + 1), part, direction, distinct)
    assert more.bytes >= work.bytes and more.flops >= work.flops
    wider = work_of(cell, part, direction, distinct + 1)
    assert wider.bytes >= work.bytes
    forward = work_of(cell, part, FORWARD, distinct)
    assert work.flops >= forward.flops and work.bytes >= forward.bytes


def test_a_layer_by_hand():
    work = work_of(Cell(3, 4, 2, 10, 20, "bf16", "uniform"), LAYER, FORWARD, 4)
    weights = 4 * 3 * 10 * 20 + 4 * 10
    assert work == Work(
        2 * (weights + 2 * 3 * 10), 2 * 3 * 10 * 4 + 6 * 3 * 2 * 10 * 20 + 3 * 2 * 10
    )
    assert bound_ns(Work(1000, 10), ROOFS, "fp32") == (1000, "memory")
    assert bound_ns(Work(1, 10**6), ROOFS, "fp32") == (1000, "compute")
    with pytest.raises(ValueError, match="no work is below 0"):
        Work(-1, 0)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_router_chooses_what_was_drawn(routing, dtype):
    cell = Cell(500, 16, 2, 32, 8, dtype, routing)
    one = of(cell)
    drawn_TK = one.drawn_TE.float().topk(2, dim=1).indices
    same = (one.ids_TK.long().sort(1).values == drawn_TK.sort(1).values).float().mean()
    assert same > 0.98  # its own logits are a thousandth of the drawn ones
    assert torch.equal(one.ids_TK, of(cell).ids_TK) and not torch.equal(
        one.ids_TK, of(cell, 1).ids_TK
    )
    counts_E = one.counts_E
    assert counts_E.sum() == 1000
    busiest = float(counts_E.max()) * 16 / 1000
    assert busiest < 1.6 if routing == "uniform" else busiest > 2.5


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_dropped_choices_are_those_that_the_baseline_drops(factor):
    cell = Cell(40, 8, 2, 16, 8, "fp32", "zipf")
    one = of(cell)
    dense = dense_moe(one.x_TD, one.ids_TK, one.weights_TK, one.pool_EN, cell.layout, factor=factor)
    assert dropped_share(one.counts_E, cell, factor) * 80 == pytest.approx(int(dense.n_dropped))


def test_memory_counts_what_is_alive_at_once():
    x = torch.ones(1000, 100)

    def chain():
        y = x + 1
        for _ in range(5):
            y = y * 2
        return y

    assert peak_bytes(chain, CPU)[0] == 2 * x.nbytes
    assert peak_bytes(lambda: x.T[:50], CPU)[0] == 0  # views
    assert peak_bytes(lambda: x.clone().add_(1), CPU)[0] == x.nbytes
    assert peak_bytes(lambda: [x + i for i in range(3)], CPU)[0] == 3 * x.nbytes


def test_memory_is_predicted():
    """What is predicted to fit does: a little less is needed, never much more."""
    cell = Cell(256, 8, 2, 64, 16, "fp32", "uniform")
    found = {
        one.implementation: one for one in operations(of(cell), 1.0, FORWARD) if one.part == LAYER
    }
    for name in ("dense", "dense_product"):
        predicted = found[name].predicted_bytes
        assert predicted == sum(needs(cell, 1.0)[name](256).values())
        assert 0.7 * predicted < peak_bytes(found[name].make(), CPU)[0] < 1.05 * predicted
    (dense,) = (one for one in operations(of(cell), 1.0, BACKWARD) if one.implementation == "dense")
    assert peak_bytes(lambda: dense.make()(), CPU)[0] < 1.05 * dense.predicted_bytes


def test_limits_stand_once_per_layer():
    cells = [
        dataclasses.replace(CELL, tokens=n, routing=r) for n in (1, 5) for r in ("uniform", "zipf")
    ]
    table = limits(cells, 10**6, 1.0)
    assert table.implementation.tolist() == ["dense", "dense_product", "ours"]
    none = limits(cells, 1, 1.0)
    assert (none.most_tokens == 0).all() and (none.room_bytes < 0).all()


def test_calls_take_turns_until_time_is_over():
    clock = Clock(dataclasses.replace(CPU, flush_bytes=1024))
    seen: list[str] = []
    found = clock.together([lambda: seen.append("a"), lambda: seen.append("b")], 3)
    assert seen == ["a", "b", "a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert [one.calls for one in found if one] == [3, 3]
    late = clock.together([lambda: None], 3, end_s=time.monotonic() - 1)
    assert late == [None]
    assert clock.times(lambda: None, 5, most_s=1e-12).calls == 1
    assert clock.together([], 3) == []


def test_quartiles():
    times = times_of([40, 10, 20, 30])
    assert (times.fastest_ns, times.median_ns, times.calls) == (10, 25, 4)
    assert times.p25_ns < times.median_ns < times.p75_ns and times.spread > 0


@given(st.integers(1, 64), st.floats(0, 100), st.integers(1, 64))
def test_threads_are_at_least_one_and_never_more_than_usual(usual, load, cores):
    n = free_threads(usual, load, cores)
    assert 1 <= n <= usual
    assert free_threads(usual, 0.0, 64) == usual


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with using(1) as n:
        assert n == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_machine_says_no_name_of_a_network():
    said = facts(CPU)
    assert platform.node() not in said.values() and said["device_kind"] == "cpu"
    assert all(isinstance(value, str | int) and value != "" for value in said.values())


def test_defaults_of_a_cpu_are_small_steps_first():
    grid = grid_of(ProfileConfig(), CPU)
    tokens = [cell.tokens for cell in grid.cells]
    assert tokens == sorted(tokens) and len(set(tokens)) > 2
    assert {cell.routing for cell in grid.cells} == {"uniform", "zipf"} and grid.seconds < 100
    few = grid_of(ProfileConfig(experts=[2, 8], top_k=[1, 4]), CPU)
    assert all(cell.top_k <= cell.experts for cell in few.cells)


def test_even_use_is_an_entropy_of_one():
    even = Load("x", 0, 10, 2, np.array([5, 5, 5, 5])).row()
    assert (even["entropy"], even["busiest_times_mean"], even["idle_share"]) == (1.0, 1.0, 0.0)
    one = Load("x", 0, 10, 1, np.array([10, 0, 0, 0])).row()
    assert (one["entropy"], one["busiest_times_mean"], one["idle_share"]) == (0.0, 4.0, 0.75)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.time(999.4), "999 ns"), (words.time(999.6), "1 us"), (words.time(1_234_000), "1.23 ms"),
        (words.time(61e9), "61 s"), (words.size(1023), "1023 B"), (words.size(1536), "1.5 KiB"),
        (words.size(0), "0 B"), (words.percent(0.0123), "1.23 %"), (words.percent(0.456), "46 %"),
        (words.percent(0), "0 %"), (words.times(2), "2x"), (words.digits(123456.7), "123,457"),
        (words.digits(0.00012), "0.00012"), (words.tokens(1), "1 token"), (words.tokens(4096), "4,096 tokens"),
        (words.one_of(["a", "b", "c"]), "a, b and c"), (words.one_of(["a"]), "a"),
    ],
)  # fmt: skip
def test_numbers_in_words(said, expected):
    assert said == expected
