"""Sentences and recommendations from a table made by hand: each number is known, each rule tried both ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest

from prefetch.engine.profiling import steps
from prefetch.engine.profiling.copies import CopyFit
from prefetch.engine.profiling.findings import HEADINGS
from prefetch.engine.profiling.rows import Rows, least, most, with_ratios
from prefetch.engine.profiling.steps import Step
from prefetch.engine.profiling.told import Told, shares

SIZES = {"experts": 8, "top_k": 2, "hidden": 64, "inner": 32, "dtype": "fp32"}
EXPERT_BYTES = 3 * 64 * 32 * 4
TIMES = {  # us, at 1 and at 512 tokens
    ("router", "ours"): (20, 400), ("dispatch", "ours"): (5, 100), ("experts", "ours"): (60, 5000),
    ("combine", "ours"): (4, 200), ("layer", "ours"): (100, 6000), ("router", "torch"): (40, 800),
    ("layer", "loop"): (300, 9000), ("layer", "grouped_mm"): (150, 7000), ("layer", "dense"): (200, 24000),
}  # fmt: skip


def row(part: str, name: str, tokens: int, us: float, **more: Any) -> dict[str, Any]:
    ns = us * 1000
    return {
        "tokens": tokens, "routing": "uniform", **SIZES, "part": part, "implementation": name, "direction": "forward",
        "status": "ran", "place": "a part", "path": "swapped", "median_ns": ns, "p25_ns": ns * 0.99,
        "p75_ns": ns * 1.01, "fastest_ns": ns * 0.98, "calls": 5, "bytes": 4 * EXPERT_BYTES, "flops": 10,
        "bound_ns": ns / 4, "bound_by": "memory", "distinct_experts": 4, "busiest_share": 0.5,
        "peak_bytes": 1000 * tokens,
    } | more  # fmt: skip


def table(*more: dict[str, Any], **changes: float) -> pd.DataFrame:
    """`changes`: times of an operation in us, written part_name=..., at both steps."""
    rows = []
    for (part, name), pair in TIMES.items():
        for tokens, us in zip((1, 512), pair, strict=True):
            us = changes.get(f"{part}_{name}", us)
            extra = {"place": "within experts"} if part == "dispatch" else {}
            extra |= (
                {"peak_bytes": 3000 * tokens, "predicted_bytes": 2500 * tokens}
                if name == "dense"
                else {}
            )
            rows.append(row(part, name, tokens, us, **extra))
    frame = pd.DataFrame([*rows, *more])
    integers = [name for name in frame.columns if name.endswith("_ns")]
    frame[integers] = frame[integers].round()
    return with_ratios(frame)


def utilisation(dropped: float = 0.01, *traced: float) -> pd.DataFrame:
    load = {
        "experts": 8,
        "top_k": 2,
        "busiest_share": 0.2,
        "idle_share": 0.0,
        "entropy": 0.9,
        "tokens": 512,
    }
    rows = [
        {
            **load,
            "source": "zipf",
            "layer": None,
            "busiest_times_mean": 1.6,
            "kind": "drawn",
            "dropped_share": dropped,
        }
    ]
    rows += [
        {**load, "source": "model", "layer": i, "busiest_times_mean": value, "kind": "trace", "dropped_share": None}
        for i, value in enumerate(traced)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64", "dropped_share": "Float64"})


def told(frame: pd.DataFrame | None = None, **changes: Any) -> Told:
    limits = pd.DataFrame([
        {**SIZES, "implementation": "dense_product", "first_that_does_not_fit": 4000, "needed_bytes": 2**33,
         "largest_tensor": "product_TECD", "largest_share": 0.99, "most_tokens": 3999},
        {**SIZES, "implementation": "dense", "first_that_does_not_fit": 9000, "needed_bytes": 2**33,
         "largest_tensor": "dispatch_TEC", "largest_share": 0.4, "most_tokens": 8999},
    ])  # fmt: skip
    fit = CopyFit(10_000, ((0, 10**9),), 0.0)
    whole = Told(
        Rows(table() if frame is None else frame),
        limits,
        utilisation(),
        fit,
        "pinned",
        2**33,
        "box",
        1.0,
    )
    return dataclasses.replace(whole, **changes)


def said(heading: str, of: Told | None = None) -> str:
    return "\n".join(HEADINGS[heading](of or told()))


def test_sentences_repeat_the_numbers_of_their_rows():
    router = said("Router Performance")
    assert (
        "1 token: the router takes 20 us, 20 % of the layer's 100 us; 25 % of its roofline bound"
        in router
    )
    assert "512 tokens: the router takes 400 us, 6.67 % of the layer's 6 ms" in router
    assert (
        "torch's softmax and top-k take 2x to 2x (median 2x of 2 layers) as long as ours" in router
    )
    layer = said("Full MoE Layer Performance")
    assert (
        "512 tokens: one layer takes 6 ms (11.7 us per token), 25 % of its roofline bound, which memory"
        in layer
    )
    assert (
        "A loop over experts takes 1.5x to 3x (median 2.25x of 2 layers) as long as ours" in layer
    )
    memory = said("MoE Layer Memory Usage")
    assert "512 tokens: ours needs 500 KiB beside experts and tokens, 1000 B per token" in memory
    assert "needs 1.46 MiB at 512 tokens, 3x ours (predicted 1.22 MiB)" in memory
    assert "No row was predicted to need more than the 8 GiB that may be used" in memory
    assert "dense_product 4,000 tokens and dense 9,000 tokens" in memory
    assert "99 % of all bytes where memory ends (8 GiB at 4,000 tokens)" in memory


def test_parts_within_the_experts_are_not_counted_twice():
    found = shares(Rows(table()), 1)
    assert found == pytest.approx(
        {"router": 0.2, "dispatch": 0.05, "experts": 0.55, "combine": 0.04}
    )
    assert (
        "1 token: of our layer's time, router 20 %, dispatch 5 %, experts 55 %, combine 4 %"
        in said("Computational Bottlenecks")
    )
    frame = table()
    frame.loc[frame.part == "dispatch", "place"] = "not used on this path"
    assert shares(Rows(frame), 1) == pytest.approx({"router": 0.2, "experts": 0.6, "combine": 0.04})


def test_a_copy_in_layers():
    text = said("Memory Bottlenecks")
    assert (
        "Copying one expert (24 KiB, pinned) takes 34.6 us, the time of 0.346 of our MoE layers at 1 token"
        in text
    )
    assert "the fit is 10 us and 1 GB/s" in text


def test_rows_that_did_not_fit_are_named():
    out = row(
        "layer",
        "dense_product",
        512,
        1,
        status="not run: memory",
        predicted_bytes=2**34,
        median_ns=None,
    )
    text = said("MoE Layer Memory Usage", told(table(out)))
    assert "1 row of 19 would need more than the 8 GiB that may be used, and was not run" in text
    assert "The smallest is dense_product at 512 tokens, 8 experts, k=2: 16 GiB predicted" in text


def test_without_a_trace_the_page_says_so():
    assert "holds no trace" in said("Expert Utilization Analysis")
    text = said("Expert Utilization Analysis", told(utilisation=utilisation(0.01, 1.5, 3.5, 2.5)))
    assert (
        "takes 2.5x the mean in the median layer, 3.5x in layer 1" in text
        and "holds no trace" not in text
    )


def rule(of: Told, start: str) -> Step:
    (found,) = [step for step in steps.steps(of) if step.text.startswith(start)]
    return found


def test_dense_tensors_that_cost_memory_are_a_step():
    assert rule(told(), "Route without dispatch").holds  # three times ours
    frame = table()
    frame.loc[frame.implementation == "dense", "peak_bytes"] = 1100
    frame.loc[frame.part == "layer", "peak_bytes"] = 1000
    assert not rule(told(frame), "Routing without dispatch").holds
    out = row(
        "layer",
        "dense_product",
        512,
        1,
        status="not run: memory",
        predicted_bytes=2**34,
        median_ns=None,
    )
    frame = table(out)
    frame.loc[frame.status == "ran", "peak_bytes"] = 1000
    step = rule(told(frame), "Route without dispatch")
    assert step.holds and "1 row did not fit" in step.text


@pytest.mark.parametrize(
    ("part", "start"),
    [("dispatch", "Make the dispatch cheaper"), ("combine", "Fold the weighted sum")],
)
def test_parts_are_worth_it_from_a_tenth_of_the_layer_on(part, start):
    assert not rule(told(), start).holds
    step = rule(told(table(**{f"{part}_ours": 11.0})), start)
    assert step.holds and f"{part} is 11 % of our layer at 1 token" in step.text


def test_balance_is_judged_by_time_seats_and_trace():
    start = "Balance the load"
    assert not rule(told(), start).holds
    step = rule(told(utilisation=utilisation(0.3)), start)
    assert step.holds and "drops 30 % of the choices under zipf routing" in step.text
    assert not rule(told(utilisation=utilisation(0.01, 1.5)), start).holds
    assert rule(told(utilisation=utilisation(0.01, 2.5)), start).holds
    for us, holds in ((105, False), (150, True)):
        step = rule(told(table(row("layer", "ours", 1, us, routing="zipf"))), start)
        assert step.holds == holds and f"{us / 100:.3g}x the time of uniform routing" in step.text


def test_fewer_bits_help_where_weights_are_read_well():
    start = ("Quantis",)
    for of_bound, weights, holds in ((0.25, 4, False), (0.8, 4, True), (0.8, 1, False)):
        frame = table()
        frame["of_bound"] = of_bound
        frame["distinct_experts"] = weights
        (step,) = [step for step in steps.bits(told(frame)) if step.text.startswith(start)]
        assert step.holds == holds
    frame["distinct_experts"], frame["bound_by"] = 4, "compute"
    assert not next(iter(steps.bits(told(frame)))).holds


def test_kernels_are_tuned_where_the_bound_is_far():
    frame = table()
    frame.loc[frame.tokens == 512, "of_bound"] = 0.8
    few, many = steps.kernels(told(frame))
    assert few.holds and "1 token: 25 % of the bound, 100 us per layer" in few.text
    assert not many.holds and "at most 1.25x faster" in many.text


def test_a_peer_is_worth_a_look_only_beyond_the_spread():
    assert not rule(told(), "grouped_mm's layer").holds
    step = rule(told(table(layer_grouped_mm=80.0)), "Look at grouped_mm's layer")
    assert (
        step.holds and "faster than ours in 2 of 2 cells" in step.text and "512 tokens" in step.text
    )
    frame = table(layer_grouped_mm=80.0)
    frame.loc[frame.implementation == "grouped_mm", "p75_ns"] = 10**9
    assert not rule(told(frame), "grouped_mm's layer is nowhere").holds
    assert rule(told(table(router_torch=10.0)), "Look at torch's router").holds


def test_copies_longer_than_a_layer_must_begin_earlier():
    assert not rule(told(), "Copying one layer ahead").holds
    slow = CopyFit(250_000, ((0, 10**9),), 0.0)
    step = rule(told(copy=slow), "Offloaded experts must be copied")
    assert (
        step.holds and "at least 3 layers ahead: one copy takes as long as 2.75 of our" in step.text
    )


def test_extremes_pass_over_what_is_missing():
    frame = pd.DataFrame({"a": pd.array([None, 3, 1, 3], "Int64"), "n": range(4)})
    assert (most(frame, "a").n, least(frame, "a").n) == (1, 2)


def test_the_headline_is_the_largest_layer():
    other = row("layer", "ours", 4, 50) | {"experts": 4}
    rows = Rows(table(other))
    assert rows.sizes == SIZES and (rows.small, rows.large) == (1, 512)
    assert rows.words == "8 experts, k=2, hidden 64, inner 32, fp32, uniform routing"
    nothing = table()
    nothing["median_ns"] = pd.array([None] * len(nothing), "Int64")
    with pytest.raises(LookupError, match="no layer of ours ran: ran"):
        Rows(nothing)
