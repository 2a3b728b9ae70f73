"""What would help, and by how much: every impact is computed from the profile or by replaying the routing.

Where the input cannot tell, the impact is said to be not computable: nothing is guessed. It decides no bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.device.beside import Beside
from analysis.device.findings import BOTTLENECK, Finding, percent
from analysis.device.offload import Offloaded
from analysis.device.operations import Operation
from analysis.device.roofline import BYTES, PRODUCTS, Peaks
from analysis.device.shapes import Shape
from analysis.device.step_routing import Imbalance, StepRouting, rate_of, slowest_ns

ALGORITHM, KERNEL = "algorithmic", "kernel"
LOW, MEDIUM, HIGH = "low", "medium", "high"
NOT_COMPUTABLE = "not computable from this input"
TILES = (16, 32, 64, 128, 256)
TILES_TITLE = "Choose the tile of the expert products by tokens per expert"
REPLAY = "Replay it alone with these sizes, and compare MoE implementations, tile sizes and number types on it."
FUSE = "Fuse it with its neighbours, or replay it alone and compare MoE implementations."
BETTER = {"pin experts": 1, "replicate experts": -1, "place experts": -1, "raise capacity": -1}
OF_RANKS = ("replicate experts", "place experts")
CUT = "not as it was run, where diagnose.tensor_parallel cuts each expert over all ranks; "
REPLAYED = {  # what a replayed remedy is called, and what it rests on
    "pin experts": (
        "Keep the most used experts on the GPU",
        "future requests use experts as the recorded ones did",
    ),
    "replicate experts": (
        "Replicate the busiest experts",
        "experts lie on several ranks; an expert's copies share its choices evenly",
    ),
    "place experts": (
        "Place experts by load",
        "experts lie on several ranks, now in blocks of their ids",
    ),
    "raise capacity": (
        "A capacity that drops nearly nothing",
        "the engine has a capacity; dropless engines drop nothing",
    ),
}


@dataclass(frozen=True)
class Recommendation:
    kind: str
    title: str
    action: str
    impact: str
    impact_us: (
        float | None
    )  # of the profiled time, at most; None where the impact is of another kind
    effort: str
    assumption: str
    is_computed: bool = True


def advise(
    operations: Sequence[Operation],
    found: Sequence[Finding],
    shape: Shape | None,
    beside: Beside,
    imbalances: Sequence[Imbalance],
    *,
    elapsed_ns: float = 0.0,
    is_cut: bool = False,
) -> list[Recommendation]:
    """First those with a computed impact, by the time saved. `is_cut`: each rank has a part of every expert."""
    all_of = [
        *_kernels(found, sum(op.time_ns for op in operations) or 1, elapsed_ns),
        *_tiles(operations, shape, beside.peaks, beside.routing),
        *_balance(imbalances),
        *_replayed(beside.remedies, is_cut=is_cut),
        *_offloading(beside.offload),
        *_network(beside.routing, shape, is_cut=is_cut),
    ]
    if beside.routing is None:
        all_of += _without_routing()
    return sorted(all_of, key=lambda one: (not one.is_computed, -(one.impact_us or 0.0)))


def _kernels(found: Sequence[Finding], moe_ns: int, elapsed_ns: float) -> Iterator[Recommendation]:
    """Of elapsed time too: where the device mostly waits, a slow kernel costs little."""
    for one in found:
        if one.kind != BOTTLENECK or one.recoverable_ns is None or one.efficiency is None:
            continue
        us = one.recoverable_ns / 1e3
        whole = f", {percent(us * 1e3 / elapsed_ns)} of elapsed time" if elapsed_ns else ""
        action = REPLAY if one.role in PRODUCTS else FUSE
        yield Recommendation(
            KERNEL,
            f"Speed up the {one.title}",
            f"It runs at {percent(one.efficiency)} of the {one.bound} bound. {action}",
            f"at most {us:,.1f} µs of the profile, {us * 1e3 / moe_ns:.1%} of the MoE time{whole}",
            us,
            HIGH,
            "GPU kernels that reach the hardware file's peaks; none does, so this is an upper limit",
        )


def _tiles(
    operations: Sequence[Operation],
    shape: Shape | None,
    peaks: Peaks | None,
    routing: StepRouting | None,
) -> Iterator[Recommendation]:
    """Rows that are computed because an expert's tokens do not fill its last tile."""
    tile = next((op.tile for op in operations if op.tile), None)
    lacks = {
        "the routing (pass trace=FOLDER)": routing is None,
        "the layer's shape": shape is None or bool(shape.missing("experts")),
        "a hardware file with a rate for it": shape is None
        or not peaks
        or not rate_of(shape, peaks),
        "the tile, which no kernel's name tells": tile is None,
    }
    missing = [what for what, lacking in lacks.items() if lacking]
    if missing or tile is None or shape is None or peaks is None or routing is None:
        if any(op.role in PRODUCTS for op in operations):
            yield _unknown(KERNEL, TILES_TITLE, MEDIUM, "it needs " + ", ".join(missing))
        return
    yield from _smaller_tile(tile, shape, peaks, routing)


def _smaller_tile(
    now: int, shape: Shape, peaks: Peaks, routing: StepRouting
) -> Iterator[Recommendation]:
    best = min(TILES, key=lambda size: (routing.padding(size), -size))
    before, after = (
        float(slowest_ns(routing.counts_SLE, shape, peaks, 1, size).sum(axis=1).mean()) / 1e3
        for size in (now, best)
    )
    if after >= before:
        return
    yield Recommendation(
        KERNEL,
        TILES_TITLE,
        f"Tiles of {now} tokens (as the kernel's name says) compute {routing.padding(now):.2f} rows for each that was "
        f"asked for; tiles of {best}, {routing.padding(best):.2f}.",
        f"{before:,.1f} -> {after:,.1f} µs a step at the roofline, over all layers",
        before - after,
        MEDIUM,
        "a tile holds tokens of one expert; padding costs operations and no bytes; smaller tiles run as fast",
    )


def _balance(imbalances: Sequence[Imbalance]) -> Iterator[Recommendation]:
    for one in imbalances:
        if one.cost_ns <= 0:
            continue
        yield Recommendation(
            ALGORITHM,
            f"Balance the routing over {one.ranks} ranks"
            if one.ranks > 1
            else "Balance the routing",
            f"The busiest rank has {one.max_over_mean:.2f} times the mean load: adjust the balancing loss or bias, or "
            "the placement.",
            f"at most {one.cost_ns / 1e3:,.1f} µs a step ({one.cost_share:.1%} of the balanced time of the products)",
            one.cost_ns / 1e3,
            HIGH,
            "the slowest rank decides, experts lie in blocks of their ids, products run at the roofline",
        )


def _replayed(remedies: pd.DataFrame, *, is_cut: bool) -> Iterator[Recommendation]:
    """One for each remedy, with all of its settings that help."""
    helping: dict[str, list[Any]] = {}
    for row in remedies.itertuples():
        if (float(row.after) - float(row.before)) * BETTER[str(row.remedy)] > 0:  # type: ignore[arg-type]
            helping.setdefault(str(row.remedy), []).append(row)
    for remedy, rows in helping.items():
        (title, assumption), first = REPLAYED[remedy], rows[0]
        effects = "; ".join(f"{row.setting}: {row.before:.3f} -> {row.after:.3f}" for row in rows)
        yield Recommendation(
            ALGORITHM, title, f"{str(first.how)[:1].upper()}{str(first.how)[1:]}.", f"{first.unit}, {effects}", None,
            str(first.complexity), f"{CUT}{assumption}" if is_cut and remedy in OF_RANKS else assumption,
        )  # fmt: skip


def _offloading(found: Offloaded | None) -> Iterator[Recommendation]:
    if found is None:
        return
    pinned = "pinned by their use in earlier requests"
    perfect = "guesses that are always right: no predictor does better"
    for title, after_ns, effort, what in (
        (f"Pin {found.pinned} of {found.slots} slots per layer", found.pinned_ns, LOW, pinned),
        (f"Prefetch {found.horizon} layers ahead", found.perfect_ns, HIGH, perfect),
    ):
        before, after = (f"{ns / 1e6:,.2f}" for ns in (found.demand_ns, after_ns))
        if after_ns >= found.demand_ns or before == after:  # nothing that could be read
            continue
        yield Recommendation(
            ALGORITHM, title, f"Of interest only where experts do not fit the GPU; {what}.",
            f"simulated step {before} -> {after} ms with {found.slots} experts of "
            "each layer on the GPU", None, effort,
            "experts offloaded to host memory; simulated on the hardware file",
        )  # fmt: skip


def _network(
    routing: StepRouting | None, shape: Shape | None, *, is_cut: bool
) -> Iterator[Recommendation]:
    if routing is None or shape is None or shape.hidden is None:
        return
    mib = shape.hidden * BYTES[shape.activation or "bf16"] / 2**20
    effects = [
        f"{ranks} ranks: {each * mib:,.2f} -> {once * mib:,.2f} MiB"
        for ranks, (once, each) in routing.sent_R.items()
        if f"{once * mib:,.2f}" != f"{each * mib:,.2f}"
    ]
    if not effects:
        return
    yield Recommendation(
        ALGORITHM,
        "Send a token once to each rank that it needs, not once per expert",
        "Dispatch without duplicates; the way back likewise.",
        f"dispatch bytes of a step, {'; '.join(effects)}",
        None,
        MEDIUM,
        (CUT if is_cut else "")
        + "experts in blocks of their ids; tokens' own ranks are not recorded and assumed round-robin",
    )


def _without_routing() -> Iterator[Recommendation]:
    needs = "it needs the routing (pass trace=FOLDER)"
    for title, effort in (
        ("Check expert routing balance, and what imbalance costs", MEDIUM),
        ("Capacity factor: dropped tokens", LOW),
        ("Replicate or place experts by load", HIGH),
        ("Pin experts, and prefetch", MEDIUM),
    ):
        yield _unknown(ALGORITHM, title, effort, needs)


def _unknown(kind: str, title: str, effort: str, why: str) -> Recommendation:
    return Recommendation(kind, title, why, NOT_COMPUTABLE, None, effort, "", is_computed=False)
