"""What a reader must know before believing a diagnosis: options that the profile contradicts, work that it hides.

It decides no number: it compares those that others found. Recorded routing is compared elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from analysis.device.attribution import BY_OPERATION
from analysis.device.operations import Operation
from analysis.device.profile import Counts
from analysis.device.shapes import PROFILE, Known
from analysis.device.shares import Times
from prefetch.models.cards import card_names, load_architecture

PADDING = 512  # elements that engines add to a token's width at most: 2880 runs as 3072
WAITING = 0.3  # of elapsed time: below, waiting is not what to look at first
AT_LEAST = (
    "The profile has no modules: only operations that are MoE by their own names are counted, and not the routing, "
    "permuting and other parts that are plain operations. MoE takes at least this; record it with with_stack=True."
)


def doubts_of(
    known: Known, operations: Sequence[Operation], counts: Counts, *, has_modules: bool
) -> list[str]:
    """`has_modules`: or nothing that modules could add."""
    parts = [op for op in operations if op.told_by == BY_OPERATION and not _is_layer(op, known)]
    told = [*_of_card(known, operations, counts), *_of_ranks(known)]
    return [*told, AT_LEAST] if parts and not has_modules else told


def _is_layer(op: Operation, known: Known) -> bool:
    found = known.names.find("operations", op.name)
    return found is not None and found.role == "layer"


def _of_card(known: Known, operations: Sequence[Operation], counts: Counts) -> Iterator[str]:
    """Each number that both tell; a layer count can differ for good reasons, so none is an error."""
    card = known.card
    if card is None or not operations:
        return
    layers = len(card.moe_layers)
    pairs = {
        "experts": (card.n_experts, _experts(operations, known)),
        "experts per token": (card.top_k, _told(operations, "top_k")),
        "hidden": (card.hidden_size, _told(operations, "hidden")),
        "MoE layers": (layers, counts.layers if counts.calls % layers else layers),
    }
    unlike = [
        f"{name} {mine:,} in the card, {theirs:,} in the profile"
        for name, (mine, theirs) in pairs.items()
        if theirs is not None and not 0 <= theirs - mine < (PADDING if name == "hidden" else 1)
    ]
    if unlike:
        yield (
            f"The model card ({card.name}) does not fit the profile: {'; '.join(unlike)}. What is taken from it may be "
            "another model's: make sure that diagnose.model_card is that of this run."
        )


def fitting_cards(known: Known, operations: Sequence[Operation], counts: Counts) -> Iterator[str]:
    """What a profile without a card says of its model is often enough to know the model."""
    experts, hidden = _experts(operations, known), _told(operations, "hidden")
    if known.card is not None or experts is None or hidden is None:
        return
    cards = {name: load_architecture(name) for name in card_names()}
    fitting = [
        name
        for name, card in cards.items()
        if card.n_experts == experts
        and 0 <= hidden - card.hidden_size < PADDING
        and counts.calls % len(card.moe_layers) == 0
    ]
    if fitting:
        yield (
            f"Model cards that fit {experts:,} experts, a width of {hidden:,} and {counts.calls:,} passages: pass "
            f"diagnose.model_card={' or '.join(fitting)} if it is that model."
        )


def _told(operations: Sequence[Operation], name: str) -> int | None:
    """By the profile itself; a single product's `hidden` is whatever it sums over."""
    shapes = (op.shape for op in operations if op.role not in ("gemm", "router"))
    return next((getattr(s, name) for s in shapes if s.sources.get(name) == PROFILE), None)


def _experts(operations: Sequence[Operation], known: Known) -> int | None:
    """Weights that were passed are one rank's part, and so may be what TraceLens calls experts."""
    ranks = known.given.expert_parallel or 1
    here, told = _told(operations, "local_experts"), _told(operations, "experts")
    if here is not None:
        return here * ranks
    is_part = known.card is not None and told is not None and told * ranks == known.card.n_experts
    return known.card.n_experts if known.card is not None and is_part else told


def _of_ranks(known: Known) -> Iterator[str]:
    given, ranks = known.given, known.ranks
    cut = (given.tensor_parallel or 1) * (given.expert_parallel or 1)
    if given.says_ranks and ranks is not None and ranks != cut:
        yield (
            f"The run had {ranks} ranks, and experts are taken to be cut over {cut} of them (diagnose.tensor_parallel, "
            "diagnose.expert_parallel): right only if the others repeat them or hold other layers."
        )


def waiting(times: Times | None) -> str:
    """Empty where the device mostly works, and of a CPU, which also runs what is not profiled."""
    if times is None or times.is_cpu or not times.elapsed_ns:
        return ""
    idle_ns = times.elapsed_ns - times.busy_ns
    if idle_ns < WAITING * times.elapsed_ns:
        return ""
    return (
        f"The device did nothing in {idle_ns / times.elapsed_ns:.1%} of elapsed time ({idle_ns / 1e3:,.1f} µs): no "
        "faster kernel shortens that. Look first at what it waits for: launches one by one (capture graphs, fuse, "
        "larger batches), the host, or the profiler's own cost (record without stacks to see)."
    )
