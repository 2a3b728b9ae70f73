"""What the tables of a profile say, as sentences with their numbers, each under the heading where a page has it.

It measures nothing and recommends nothing: a sentence repeats numbers of rows, and says of which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from prefetch.engine.profiling import words
from prefetch.engine.profiling.measure import NO_MEMORY
from prefetch.engine.profiling.operations import (
    DENSE,
    GROUPED,
    LOOP,
    OURS,
    PRODUCT,
    TORCH,
)
from prefetch.engine.profiling.rows import CELL, Rows, least, most
from prefetch.engine.profiling.told import (
    Told,
    drawn_of_headline,
    layers_per_copy,
    of_headline,
    shares,
    skewed,
    weight_share,
)
from prefetch.engine.profiling.utilisation import TRACE
from prefetch.engine.profiling.work import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    LAYER,
    MEMORY,
    ROUTER,
)

PEERS = (LOOP, GROUPED, DENSE, PRODUCT)
NAMES = {
    LOOP: "a loop over experts",
    GROUPED: "torch's grouped_mm",
    DENSE: "the dense baseline (dispatch and combine tensors)",
    PRODUCT: "the dense baseline with outputs times combine tensor as one product",
}
Sentences = Iterator[str]


def router(told: Told) -> Sentences:
    rows = told.rows
    for tokens in rows.ends:
        one, layer = rows.one(ROUTER, tokens), rows.one(LAYER, tokens)
        if one is None or layer is None:
            continue
        yield (
            f"{words.tokens(tokens)}: the router takes {words.time(one.median_ns)}, "
            f"{words.percent(one.median_ns / layer.median_ns)} of the layer's {words.time(layer.median_ns)}; "
            f"{words.percent(one.of_bound)} of its roofline bound, which {_set_by(one)} sets."
        )
    theirs = rows.of(ROUTER, TORCH)
    if len(theirs):
        yield f"torch's softmax and top-k take {_range(theirs)} as long as ours."


def layer(told: Told) -> Sentences:
    rows = told.rows
    for tokens in rows.ends:
        one = rows.one(LAYER, tokens)
        if one is not None:
            yield (
                f"{words.tokens(tokens)}: one layer takes {words.time(one.median_ns)} "
                f"({words.time(one.median_ns / tokens)} per token), {words.percent(one.of_bound)} of its roofline "
                f"bound, which {_set_by(one)} sets."
            )
    for name in PEERS:
        if len(theirs := rows.of(LAYER, name)):
            yield f"{_capital(NAMES[name])} takes {_range(theirs)} as long as ours."
    yield from _skew(told)
    yield from _backward(rows)
    yield from _agreement(rows)


def _skew(told: Told) -> Sentences:
    pairs = skewed(told.rows)
    if len(pairs):
        slowest, mildest = most(pairs, "ratio"), least(pairs, "ratio")
        yield (
            f"Zipf routing (exponent {told.skew:g}) takes {words.times(mildest.ratio)} to {words.times(slowest.ratio)} "
            f"the time of uniform routing (median {words.times(pairs.ratio.median())} of "
            f"{words.count(len(pairs), 'layer')}), most at {words.tokens(int(slowest.tokens))} and "
            f"{slowest.experts} experts."
        )


def _backward(rows: Rows) -> Sentences:
    loop = rows.of(LAYER, LOOP, BACKWARD)
    if loop.empty:
        return
    text = f"Gradients: a loop over experts takes {_of_forward(rows, loop)} the time of its forward pass"
    for name in (GROUPED, DENSE):
        if len(theirs := rows.of(LAYER, name, BACKWARD)):
            text += f"; {NAMES[name]} {_range(theirs)} as long as the loop"
    yield f"{text}. Ours has no backward pass."


def _of_forward(rows: Rows, backward: pd.DataFrame) -> str:
    forward = rows.of(LAYER, LOOP, FORWARD)
    both = backward.merge(forward, on=CELL, suffixes=("", "_forward"))
    ratio = words.times(float((both.median_ns / both.median_ns_forward).median()))
    return f"{ratio} (median of {words.count(len(both), 'layer')})"


def _agreement(rows: Rows) -> Sentences:
    layers = rows.ran[(rows.ran.part == LAYER) & rows.ran.deviation.notna()]
    whole = layers[layers.dropped_share.isna() | (layers.dropped_share == 0)]
    if len(whole):
        worst = most(whole, "deviation")
        off = (
            f"differ from ours by at most {worst.deviation:.2g} of the largest one ({worst.implementation}, "
            f"{worst['dtype']})"
            if worst.deviation
            else "equal ours bit for bit"
        )
        compared = words.count(len(whole), "layer")
        yield f"All compute the same: where no choice is dropped, outputs {off}; {compared} compared."


def router_memory(told: Told) -> Sentences:
    rows = told.rows
    for tokens in rows.ends:
        one, all_of = rows.one(ROUTER, tokens), rows.one(LAYER, tokens)
        if one is not None and all_of is not None:
            yield (
                f"{words.tokens(tokens)}: the router's peak is {words.size(one.peak_bytes)} beside its inputs, "
                f"{words.size(one.peak_bytes / tokens)} per token; the layer's is {words.size(all_of.peak_bytes)}."
            )
    theirs = rows.one(ROUTER, rows.large, TORCH)
    ours = rows.one(ROUTER, rows.large)
    if theirs is not None and ours is not None and ours.peak_bytes:
        yield (
            f"torch's softmax and top-k need {words.size(theirs.peak_bytes)} at {words.tokens(rows.large)}, "
            f"{words.times(theirs.peak_bytes / ours.peak_bytes)} as much."
        )


def layer_memory(told: Told) -> Sentences:
    rows = told.rows
    ours = rows.one(LAYER, rows.large)
    if ours is not None:
        yield (
            f"{words.tokens(rows.large)}: ours needs {words.size(ours.peak_bytes)} beside experts and tokens, "
            f"{words.size(ours.peak_bytes / rows.large)} per token."
        )
    for name in (DENSE, PRODUCT):
        yield from _dense_peak(rows, name)
    yield _out_of_memory(told)
    yield from _limits(told)


def _dense_peak(rows: Rows, name: str) -> Sentences:
    """At the most tokens at which it ran."""
    ran = rows.main[(rows.main.part == LAYER) & (rows.main.implementation == name)]
    ran = ran[ran.direction == FORWARD]
    if ran.empty:
        return
    one = most(ran, "tokens")
    ours = rows.one(LAYER, int(one.tokens))
    beside = "" if ours is None else f", {words.times(one.peak_bytes / ours.peak_bytes)} ours"
    yield (
        f"{_capital(NAMES[name])} needs {words.size(one.peak_bytes)} at {words.tokens(int(one.tokens))}{beside} "
        f"(predicted {words.size(one.predicted_bytes)})."
    )


def _out_of_memory(told: Told) -> str:
    table = told.rows.table
    out = table[table.status.str.startswith(NO_MEMORY)]
    if out.empty:
        return f"No row was predicted to need more than the {words.size(told.room_bytes)} that may be used."
    predicted = out[out.predicted_bytes.notna()]
    if predicted.empty:
        return f"Out of memory while they ran: {words.count(len(out), 'row')} of {len(table):,}, none predicted."
    smallest, out = least(predicted, "predicted_bytes"), predicted
    return (
        f"Out of memory: {words.count(len(out), 'row')} of {len(table):,} would need more than the "
        f"{words.size(told.room_bytes)} that may be used, and {'was' if len(out) == 1 else 'were'} not run. The "
        f"smallest is {smallest.implementation} at {words.tokens(int(smallest.tokens))}, {smallest.experts} experts, "
        f"k={smallest.top_k}: {words.size(smallest.predicted_bytes)} predicted."
    )


def _limits(told: Told) -> Sentences:
    here = of_headline(told)
    said = [
        f"{row.implementation} {words.tokens(int(row.first_that_does_not_fit))}"
        for _, row in here.iterrows()
    ]
    if said:
        yield f"Memory ends, by prediction, at: {words.one_of(said)} (ours: its kernels on a GPU)."
    product = here[here.implementation == PRODUCT]
    for _, row in product.iterrows():
        yield (
            "Primary memory bottleneck: the product of expert outputs and combine tensor is one tensor of tokens x "
            f"experts x seats x hidden, {words.percent(row.largest_share)} of all bytes where memory ends "
            f"({words.size(row.needed_bytes)} at {words.tokens(int(row.first_that_does_not_fit))})."
        )


def compute_bottlenecks(told: Told) -> Sentences:
    rows = told.rows
    for tokens in rows.ends:
        if said := shares(rows, tokens):
            parts = ", ".join(f"{part} {words.percent(share)}" for part, share in said.items())
            yield f"{words.tokens(tokens)}: of our layer's time, {parts}."
    layers = rows.of(LAYER, OURS)
    computes = layers[layers.bound_by == COMPUTE]
    if len(computes):
        yield (
            f"{words.count(len(computes), 'layer')} of {len(layers)} {'is' if len(computes) == 1 else 'are'} bound by "
            f"products, none under {words.tokens(int(computes.tokens.min()))}; memory traffic bounds the others."
        )
    else:
        yield f"None of {words.count(len(layers), 'layer')} is bound by products: memory traffic bounds them all."
    farthest = least(layers, "of_bound")
    yield (
        f"Farthest from its bound: {words.tokens(int(farthest.tokens))}, {farthest.experts} experts, "
        f"k={farthest.top_k}, {farthest['dtype']}, {farthest.routing} routing, at "
        f"{words.percent(farthest.of_bound)} of it."
    )


def memory_bottlenecks(told: Told) -> Sentences:
    rows = told.rows
    for tokens in rows.ends:
        one = rows.one(LAYER, tokens)
        if one is not None:
            share = weight_share(told, one)
            yield (
                f"{words.tokens(tokens)}: {words.size(one.bytes)} must be read or written at least, "
                f"{words.percent(share)} of them weights of the {one.distinct_experts} experts that are used."
            )
    yield _copy(told)
    for _, row in of_headline(told).iterrows():
        if row.implementation == DENSE:
            yield (
                f"Dense tensors: the largest is `{row.largest_tensor}`, {words.percent(row.largest_share)} of "
                f"{words.size(row.needed_bytes)} at {words.tokens(int(row.first_that_does_not_fit))}."
            )


def _copy(told: Told) -> str:
    n_bytes, rows = told.expert_bytes, told.rows
    rate = told.copy.bytes_per_s[-1][1]
    return (
        f"Copying one expert ({words.size(n_bytes)}, {told.copy_kind}) takes {words.time(told.copy.ns(n_bytes))}, "
        f"the time of {words.digits(layers_per_copy(told))} of our MoE layers at {words.tokens(rows.small)}; the fit "
        f"is {words.time(told.copy.latency_ns)} and {words.digits(rate / 1e9)} GB/s."
    )


def expert_utilisation(told: Told) -> Sentences:
    for _, row in drawn_of_headline(told).iterrows():
        yield (
            f"Drawn, {row.source}, {words.tokens(row.tokens)}: the busiest expert takes "
            f"{words.percent(row.busiest_share)} of the choices ({words.times(row.busiest_times_mean)} the mean), "
            f"{words.percent(row.idle_share)} of {row.experts} experts idle; the dense baseline drops "
            f"{words.percent(row.dropped_share)} of the choices."
        )
    yield _trace(told.utilisation[told.utilisation.kind == TRACE])


def _trace(layers: pd.DataFrame) -> str:
    if layers.empty:
        return (
            "Of a real model nothing is known here: the store holds no trace of the chosen source "
            "(stage=collect records one)."
        )
    first, worst = layers.iloc[0], most(layers, "busiest_times_mean")
    return (
        f"Trace of {first.source} ({words.tokens(int(first.tokens))}, {words.count(len(layers), 'layer')}, "
        f"{first.experts} experts, k={first.top_k}): the busiest expert of a layer takes "
        f"{words.times(layers.busiest_times_mean.median())} the mean in the median layer, "
        f"{words.times(worst.busiest_times_mean)} in layer {worst.layer}; {words.percent(layers.idle_share.mean())} "
        "are idle."
    )


def _set_by(row: pd.Series) -> str:
    return {MEMORY: "memory traffic", COMPUTE: "arithmetic"}[str(row.bound_by)]


def _range(theirs: pd.DataFrame) -> str:
    """From the least to the most, and the median."""
    ratio = theirs.times_reference.astype(float).dropna()
    if len(ratio) == 1:
        return f"{words.times(ratio.iloc[0])} (1 layer)"
    return (
        f"{words.times(ratio.min())} to {words.times(ratio.max())} (median {words.times(ratio.median())} of "
        f"{len(ratio)} layers)"
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


HEADINGS: dict[str, Callable[[Told], Sentences]] = {
    "Router Performance": router,
    "Full MoE Layer Performance": layer,
    "Router Memory Usage": router_memory,
    "MoE Layer Memory Usage": layer_memory,
    "Computational Bottlenecks": compute_bottlenecks,
    "Memory Bottlenecks": memory_bottlenecks,
    "Expert Utilization Analysis": expert_utilisation,
}
