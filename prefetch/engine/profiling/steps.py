"""What to do next: rules over the numbers of a profile. Each says what it looked at, whether it holds or not.

It measures nothing. A rule that does not hold is said too: what would win nothing is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from prefetch.engine.profiling import words
from prefetch.engine.profiling.measure import NO_MEMORY
from prefetch.engine.profiling.operations import DENSE, GROUPED, LOOP, OURS, PRODUCT, TORCH
from prefetch.engine.profiling.rows import CELL, least, most
from prefetch.engine.profiling.told import (
    Told,
    drawn_of_headline,
    layers_per_copy,
    shares,
    skewed,
    weight_share,
)
from prefetch.engine.profiling.utilisation import TRACE
from prefetch.engine.profiling.work import COMBINE, DISPATCH, LAYER, MEMORY, ROUTER

MUCH = 0.1  # of a layer's time
NEAR = 0.5  # of the bound
UNEVEN_TIME, DROPPED, UNEVEN_LOAD = 1.1, 0.05, 2.0
MOST_WEIGHTS = 0.9  # of the bytes
FASTER = 0.9  # of our time
TWICE = 2.0


@dataclass(frozen=True)
class Step:
    holds: bool
    text: str


def memory(told: Told) -> Iterator[Step]:
    """Is the baseline's memory a problem?"""
    rows = told.rows
    table = rows.table
    n_out = int(
        (table.status.str.startswith(NO_MEMORY) & table.implementation.isin((DENSE, PRODUCT))).sum()
    )
    ours, dense = rows.of(LAYER, OURS), rows.of(LAYER, DENSE)
    both = dense.merge(ours, on=["tokens", "routing", *rows.sizes], suffixes=("", "_ours"))
    if both.empty and not n_out:
        return
    ratio = float((both.peak_bytes / both.peak_bytes_ours).max()) if len(both) else float("nan")
    said = (
        f"dense tensors take up to {words.times(ratio)} the memory of ours"
        if len(both)
        else "none of them fits"
    )
    said += f", and {words.count(n_out, 'row')} did not fit" if n_out else ""
    if n_out or ratio >= TWICE:
        yield Step(
            True,
            f"Route without dispatch and combine tensors (experts over slots, as ours): {said}.",
        )
    else:
        yield Step(False, f"Routing without dispatch tensors would save little: {said}.")


def dispatch(told: Told) -> Iterator[Step]:
    yield from _part(told, DISPATCH, "Make the dispatch cheaper")


def combine(told: Told) -> Iterator[Step]:
    yield from _part(told, COMBINE, "Fold the weighted sum into the experts' last product")


def _part(told: Told, part: str, what: str) -> Iterator[Step]:
    found = {tokens: shares(told.rows, tokens).get(part) for tokens in told.rows.ends}
    known = {tokens: share for tokens, share in found.items() if share is not None}
    if not known:
        return
    tokens = max(known, key=known.__getitem__)
    said = f"{part} is {words.percent(known[tokens])} of our layer at {words.tokens(tokens)}"
    yield Step(known[tokens] >= MUCH, f"{what}: {said}.")


def balance(told: Told) -> Iterator[Step]:
    pairs, table = skewed(told.rows), told.utilisation
    said, holds = list[str](), False
    if len(pairs):
        ratio = float(pairs.ratio.median())
        said.append(f"Zipf routing takes {words.times(ratio)} the time of uniform routing (median)")
        holds |= ratio >= UNEVEN_TIME
    drawn = drawn_of_headline(told)
    if len(drawn):
        worst = most(drawn, "dropped_share")
        dropped = words.percent(worst.dropped_share)
        said.append(
            f"the dense baseline drops {dropped} of the choices under {worst.source} routing"
        )
        holds |= bool(worst.dropped_share >= DROPPED)
    if len(trace := table[table.kind == TRACE]):
        busiest = float(trace.busiest_times_mean.median())
        said.append(f"the trace's busiest experts take {words.times(busiest)} the mean")
        holds |= busiest >= UNEVEN_LOAD
    if said:
        yield Step(holds, f"Balance the load, or compute without seats: {words.one_of(said)}.")


def bits(told: Told) -> Iterator[Step]:
    """Fewer bytes help where weights are what takes time, and the kernel already reads them well."""
    one = told.rows.one(LAYER, told.rows.small)
    if one is None:
        return
    share = weight_share(told, one)
    is_weights = one.bound_by == MEMORY and share >= MOST_WEIGHTS
    said = (
        f"at {words.tokens(told.rows.small)} weights are {words.percent(share)} of the bytes, and the layer takes "
        f"{words.time(one.median_ns)} where reading them takes {words.time(one.bound_ns)}"
    )
    if is_weights and one.of_bound >= NEAR:
        yield Step(True, f"Quantise the experts: {said}; half the bits would halve the bound.")
    else:
        yield Step(False, f"Quantising would not make it faster yet: {said}.")


def kernels(told: Told) -> Iterator[Step]:
    """Where are we far from what the device could do?"""
    for tokens in told.rows.ends:
        one = told.rows.one(LAYER, tokens)
        if one is None:
            continue
        share, ns = words.percent(one.of_bound), words.time(one.median_ns)
        said = f"{words.tokens(tokens)}: {share} of the bound, {ns} per layer"
        if one.of_bound < NEAR:
            yield Step(
                True,
                f"Shorten what is neither reading nor multiplying (launches, small products) at {said}.",
            )
        else:
            yield Step(
                False, f"Tuning further at {said}: at most {words.times(1 / one.of_bound)} faster."
            )


def peers(told: Told) -> Iterator[Step]:
    for part, name in ((ROUTER, TORCH), (LAYER, LOOP), (LAYER, GROUPED)):
        theirs = told.rows.of(part, name)
        if theirs.empty:
            continue
        faster, of = surely_faster(told, part, name), words.count(len(theirs), "cell")
        if faster.empty:
            yield Step(False, f"{name}'s {part} is nowhere faster than ours by a tenth ({of}).")
            continue
        best = least(faster, "times_reference")
        yield Step(
            True,
            f"Look at {name}'s {part}: beyond the spread of both it is faster than ours in {len(faster)} of {of}, most "
            f"at {words.tokens(int(best.tokens))} and {best.experts} experts "
            f"({words.times(best.times_reference)} our time).",
        )


def surely_faster(told: Told, part: str, name: str) -> pd.DataFrame:
    """By a tenth at least, and with quartiles that do not overlap ours."""
    ours = told.rows.of(part, OURS)[[*CELL, "p25_ns"]].rename(columns={"p25_ns": "ours_p25_ns"})
    both = told.rows.of(part, name).merge(ours, on=CELL)
    is_faster = (both.times_reference.astype(float) < FASTER) & (both.p75_ns < both.ours_p25_ns)
    return both[is_faster]


def ahead(told: Told) -> Iterator[Step]:
    """How early must a missing expert be asked for?"""
    n = layers_per_copy(told)
    if n != n:
        return
    said = (
        f"one copy takes as long as {words.digits(n)} of our MoE layers (attention not counted) at "
        f"{words.tokens(told.rows.small)}"
    )
    if n >= 1:
        yield Step(
            True,
            f"Offloaded experts must be copied at least {int(-(-n // 1))} layers ahead: {said}.",
        )
    else:
        yield Step(False, f"Copying one layer ahead hides a copy: {said}.")


RULES: tuple[Callable[[Told], Iterator[Step]], ...] = (
    memory, dispatch, combine, kernels, peers, balance, bits, ahead,
)  # fmt: skip


def steps(told: Told) -> list[Step]:
    return [step for rule in RULES for step in rule(told)]
