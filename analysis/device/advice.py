"""What would help, and by how much: every impact is computed from the profile or by replaying the routing.

Where the input cannot tell, the impact is said to be not computable: nothing is guessed. It decides no bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.device.findings import BOTTLENECK, Finding
from analysis.device.offload import Offloaded
from analysis.device.operations import Operation
from analysis.device.roofline import BYTES, Peaks
from analysis.device.shapes import Shape
from analysis.device.step_routing import Imbalance, StepRouting, slowest_ns

ALGORITHM, KERNEL = "algorithmic", "kernel"
LOW, MEDIUM, HIGH = "low", "medium", "high"
NOT_COMPUTABLE = "not computable from this input"
TILES = (16, 32, 64, 128, 256)
BETTER = {"pin experts": 1, "replicate experts": -1, "place experts": -1, "raise capacity": -1}
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
    *,
    moe_ns: int,
    shape: Shape | None,
    peaks: Peaks | None,
    routing: StepRouting | None,
    imbalances: Sequence[Imbalance],
    remedies: pd.DataFrame,
    offload: Offloaded | None,
) -> list[Recommendation]:
    """Kernels first, then routing; computed ones before those that cannot be."""
    all_of = [
        *_kernels(found, moe_ns),
        *_tiles(operations, shape, peaks, routing),
        *_balance(imbalances),
        *_replayed(remedies),
        *_offloading(offload),
        *_network(routing, shape),
    ]
    if routing is None:
        all_of += _without_routing()
    return sorted(all_of, key=lambda one: (not one.is_computed, -(one.impact_us or 0.0)))


def _kernels(found: Sequence[Finding], moe_ns: int) -> Iterator[Recommendation]:
    for one in found:
        if one.kind != BOTTLENECK or one.recoverable_ns is None or one.efficiency is None:
            continue
        us = one.recoverable_ns / 1e3
        yield Recommendation(
            KERNEL,
            f"Bring the {one.title} nearer to the roofline",
            f"It runs at {one.efficiency:.1%} of the {one.bound} bound. Make a replay artifact of it, and compare MoE "
            "implementations, tile sizes and number types on it; fuse short kernels.",
            f"at most {us:,.1f} µs of the profile, {us * 1e3 / moe_ns:.1%} of the MoE time",
            us,
            HIGH,
            "a kernel that reaches the hardware file's peaks; none does, so this is an upper limit",
        )


def _tiles(
    operations: Sequence[Operation],
    shape: Shape | None,
    peaks: Peaks | None,
    routing: StepRouting | None,
) -> Iterator[Recommendation]:
    """Rows that are computed because an expert's tokens do not fill its last tile."""
    tile = next((op.tile for op in operations if op.tile), None)
    if routing is None or shape is None or shape.missing("experts") or peaks is None:
        if tile is not None:
            why = "needs the routing (trace=...), the layer's shape and a hardware file"
            yield _unknown(
                KERNEL, "Choose the tile of the expert products by tokens per expert", MEDIUM, why
            )
        return
    now = tile or max(TILES)
    best = min(TILES, key=lambda size: (routing.padding(size), -size))
    before, after = (
        float(slowest_ns(routing.counts_SLE, shape, peaks, 1, size).sum(axis=1).mean()) / 1e3
        for size in (now, best)
    )
    known = "as the kernel's name says" if tile else "assumed: no kernel's name says it"
    if after >= before:
        return
    yield Recommendation(
        KERNEL,
        "Choose the tile of the expert products by tokens per expert",
        f"Tiles of {now} tokens ({known}) compute {routing.padding(now):.2f} rows for each that was asked for; tiles "
        f"of {best}, {routing.padding(best):.2f}.",
        f"{before:,.1f} -> {after:,.1f} µs a step at the roofline, over all layers",
        max(0.0, before - after),
        MEDIUM,
        "one tile belongs to one expert, and padding costs operations but no bytes of weights",
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


def _replayed(remedies: pd.DataFrame) -> Iterator[Recommendation]:
    for row in remedies.itertuples():
        title, assumption = REPLAYED[str(row.remedy)]
        before, after = float(row.before), float(row.after)  # type: ignore[arg-type]
        if (after - before) * BETTER[str(row.remedy)] <= 0:
            continue
        yield Recommendation(
            ALGORITHM, f"{title}: {row.setting}", str(row.how), f"{row.unit}: {before:.3f} -> {after:.3f}", None,
            str(row.complexity), assumption,
        )  # fmt: skip


def _offloading(found: Offloaded | None) -> Iterator[Recommendation]:
    if found is None:
        return
    demand, rests = (
        found.demand_ns / 1e6,
        "experts offloaded to host memory; simulated on the hardware file",
    )
    ways = (
        (
            f"Pin {found.pinned} of {found.slots} slots per layer",
            found.pinned_ns,
            LOW,
            "pinned by their use in earlier requests",
        ),
        (
            f"Prefetch {found.horizon} layers ahead",
            found.perfect_ns,
            HIGH,
            "guesses that are always right: no predictor does better",
        ),
    )
    for title, after_ns, effort, what in ways:
        if after_ns >= found.demand_ns:
            continue
        after = after_ns / 1e6
        yield Recommendation(
            ALGORITHM, title, f"Of interest only where experts do not fit the GPU; {what}.",
            f"simulated step {demand:.2f} -> {after:.2f} ms with {found.slots} experts of each layer on the GPU",
            None, effort, rests,
        )  # fmt: skip


def _network(routing: StepRouting | None, shape: Shape | None) -> Iterator[Recommendation]:
    if routing is None or shape is None or shape.hidden is None:
        return
    b = BYTES[shape.activation or "bf16"]
    for ranks in (ranks for ranks in (2, 4, 8) if routing.card.n_experts % ranks == 0):
        once, each = (sent * shape.hidden * b for sent in routing.sent(ranks))
        if once >= each:
            continue
        yield Recommendation(
            ALGORITHM,
            f"Send a token once to each of {ranks} ranks, not once per expert",
            "Dispatch without duplicates; the way back likewise.",
            f"dispatch bytes of a step: {each / 2**20:,.2f} -> {once / 2**20:,.2f} MiB",
            None,
            MEDIUM,
            "experts in blocks of their ids; tokens' own ranks are not recorded and assumed round-robin",
        )


def _without_routing() -> Iterator[Recommendation]:
    needs = "record the routing (stage=collect, or any of its sources) and pass trace=FOLDER"
    for title, effort in (
        ("Check expert routing balance, and what imbalance costs", MEDIUM),
        ("Capacity factor: dropped tokens", LOW),
        ("Replicate or place experts by load", HIGH),
        ("Pin experts, and prefetch", MEDIUM),
    ):
        yield _unknown(ALGORITHM, title, effort, needs)


def _unknown(kind: str, title: str, effort: str, why: str) -> Recommendation:
    return Recommendation(kind, title, why, NOT_COMPUTABLE, None, effort, "", is_computed=False)
