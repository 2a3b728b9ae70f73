"""What lies where in a GPU's memory, in whole bytes: how many experts a budget keeps there, or what a cache costs.

It simulates nothing. L layers, G caches: one per layer, or one for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from prefetch.errors import ConfigError
from prefetch.sim.hardware import Hardware, is_count
from prefetch.sim.sizes import need_sizes, weights_of
from prefetch.trace.card import ModelCard

SCOPES = ("per_layer", "global")
Split = Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]  # (rooms, sizes) -> rooms
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
MOST_BYTES = 2**62
AMOUNT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
SHARE = re.compile(r"\d*\.?\d+(e-?\d+)?|\d+\.")
SIZE = re.compile(r"[\d.]+\s*[a-z]+")
# Vectors of the hidden size that a token needs at once: residual, norms, queries, keys, values, attention's result,
# its projection, the router's input, the sum of experts, one to spare.
VECTORS = 10
# Of one request: fp32, and no shipped card has a vocabulary of more than 2**18 entries.
LOGITS_BYTES = 4 * 2**18
LIBRARY_BYTES = 32 * 2**20  # assumed: what a matrix library keeps for itself on a recent GPU


@dataclass(frozen=True)
class OfMemory:
    """A capacity that is said as all that may be used of the GPU: the cache is what remains of it."""

    amount: int | str

    def __str__(self) -> str:
        return str(self.amount)


@dataclass(frozen=True)
class Budget:
    """A cache, and everything beside it. Rooms and sizes are in units: experts where sizes are 1, else bytes."""

    scope: str
    room_G: tuple[int, ...]
    size_L: tuple[int, ...]
    slots_G: tuple[int, ...]  # experts that each cache holds, were all as large as its largest
    cache_bytes: int
    staging_bytes: int
    predictor_bytes: int
    dense_bytes: int
    shared_bytes: int
    kv_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    device_bytes: int  # what the GPU has
    all_expert_bytes: int
    cycle_bytes: int  # of the experts that one token touches

    @property
    def experts(self) -> int:
        """That the caches hold; where one holds experts of several sizes, so many of their mean size."""
        if len(self.room_G) == len(self.size_L):
            return sum(self.slots_G)
        return self.room_G[0] * len(self.size_L) // sum(self.size_L)

    @property
    def beside_bytes(self) -> int:
        """What is no routed expert."""
        weights = self.dense_bytes + self.shared_bytes
        return weights + self.kv_bytes + self.workspace_bytes + self.reserve_bytes

    @property
    def expert_bytes(self) -> int:
        """What is spent on routed experts: resident, under way, and foretold."""
        return self.cache_bytes + self.staging_bytes + self.predictor_bytes

    @property
    def whole_model_bytes(self) -> int:
        return self.beside_bytes + self.expert_bytes

    def savings(self, more_bytes: int = 0) -> float:
        """Below zero where staging and predictor weigh more than what the cache leaves out."""
        return 1 - (self.expert_bytes + more_bytes) / self.all_expert_bytes

    @property
    def token_cycles(self) -> float:
        """At less than one a global LRU hits next to nothing: other layers push an expert out before its next use."""
        return self.cache_bytes / self.cycle_bytes

    def fits(self, more_bytes: int = 0) -> bool:
        return self.whole_model_bytes + more_bytes <= self.device_bytes


def budget_of(
    card: ModelCard,
    hardware: Hardware,
    *,
    cache: float | str | None = None,
    memory: int | str | None = None,
    scope: str = "per_layer",
    context: int = 4096,
    batch: int = 1,
    staging: int = 2,
    predictor_bytes: int = 0,
    step_tokens: int = 2048,
    split: Split | None = None,
    more_bytes: int = 0,
) -> Budget:
    """`memory` is all that may be used of the GPU, and the cache what remains; or `cache` says how large that is.

    cache: a fraction of all experts (0.25, rounded down), experts per layer (16), or bytes (500MiB). `context` is the
    tokens of each of `batch` requests; `step_tokens` those of the largest step, where engines cut prompts. `split`:
    shares the equal rooms of the layers in another way. `more_bytes`, and what of a memory equal rooms leave, hold
    further experts: each cache one in turn.
    """
    need_sizes(card)
    _check(scope, memory, cache, context=context, batch=batch, step_tokens=step_tokens)
    _check_least(staging=staging, predictor_bytes=predictor_bytes)
    sizes_L = card.expert_bytes_L or ()
    parts = {
        "dense_bytes": card.dense_bytes or 0,
        "shared_bytes": card.shared_bytes or 0,
        "kv_bytes": context * batch * (card.kv_bytes_per_token or 0),
        "workspace_bytes": workspace_bytes(card, min(step_tokens, context * batch), batch),
        "reserve_bytes": hardware.reserve_bytes,
        "staging_bytes": staging * max(sizes_L),
        "predictor_bytes": predictor_bytes,
    }
    if memory is not None:
        cache_bytes = _what_remains(memory, parts, hardware)
        room_G, size_L = _rooms_of_bytes(card, scope, cache_bytes)
    else:
        room_G, size_L = rooms_of(card, scope, cache)
    if split is not None:
        room_G = split(room_G, size_L)
    unit = sizes_L[0] if size_L != sizes_L else 1
    if memory is not None:  # what whole experts in every layer leave
        more_bytes += cache_bytes - sum(room_G) * unit
    room_G = _with_more(room_G, size_L, card.n_experts, more_bytes // unit)
    if staging == 0 and min(slots_of(room_G, size_L)) == 0:
        raise ConfigError("an expert has no place: no cache of one expert, and staging=0")
    return Budget(
        scope=scope,
        room_G=room_G,
        size_L=size_L,
        slots_G=slots_of(room_G, size_L),
        cache_bytes=sum(room_G) * unit,
        device_bytes=hardware.device.memory_bytes,
        all_expert_bytes=card.n_experts * sum(sizes_L),
        cycle_bytes=card.top_k * sum(sizes_L),
        **parts,
    )


def workspace_bytes(card: ModelCard, step_tokens: int, batch: int) -> int:
    """Activations of the largest step, logits of one token per request, and what libraries keep.

    Per token: `VECTORS`; per choice the expert's copy of its input, its output, and what lies between its matrices:
    gate, up and their product are together as many numbers as the expert has weights per hidden unit. 2 bytes each.
    """
    hidden, sizes_L = card.hidden_size or 1, card.expert_bytes_L or ()
    inner = -(-weights_of(max(sizes_L), card.expert_precision, card) // hidden)
    numbers = VECTORS * hidden + card.top_k * (2 * hidden + inner)
    width = 4 if card.expert_precision == "fp32" else 2
    return step_tokens * numbers * width + batch * LOGITS_BYTES + LIBRARY_BYTES


def bytes_of(amount: int | str, name: str = "memory") -> int:
    """12GiB, 500 MB, 12884901888; powers of two where there is an i."""
    match = AMOUNT.fullmatch(str(amount))
    if isinstance(amount, bool) or match is None or (match[2] or "b").lower() not in UNITS:
        raise ConfigError(f"{name}={amount}: expected a size such as 12GiB, 500MB or 12884901888")
    n_bytes = int(Fraction(match[1]) * UNITS[(match[2] or "b").lower()])
    if n_bytes > MOST_BYTES:
        raise ConfigError(f"{name}={amount}: expected at most 4 EiB; no machine has more")
    return n_bytes


def spoken(n_bytes: int) -> str:
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes} bytes"


def _what_remains(memory: int | str, parts: dict[str, int], hardware: Hardware) -> int:
    given, needed, has = bytes_of(memory), sum(parts.values()), hardware.device.memory_bytes
    if given > has:
        raise ConfigError(
            f"memory={memory}: {hardware.name} has {spoken(has)}; memory={has // 2**20}MiB is all of it"
        )
    if given < needed:
        each = ", ".join(
            f"{name.removesuffix('_bytes')} {spoken(size)}" for name, size in parts.items() if size
        )
        raise ConfigError(
            f"memory={memory} is less than what must stand beside the cache: {each}; together {spoken(needed)}, "
            f"shortfall {spoken(needed - given)}. Give more memory, or a shorter context or a smaller batch"
        )
    return given - needed


def check_written(cache: float | str | None) -> None:
    """Whether this is a way of writing a cache at all: said before there is a model, or a trace."""
    text = str(cache).strip().lower()
    if isinstance(cache, bool) or not (SHARE.fullmatch(text) or SIZE.fullmatch(text)):
        raise ConfigError(
            f"cache={cache}: expected a fraction of all experts (0.25), experts per layer (16) or a size (500MiB)"
        )
    if SIZE.fullmatch(text):
        bytes_of(text, "cache")


def rooms_of(
    card: ModelCard, scope: str, cache: float | str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Units per cache and per expert, for a cache as the user writes it."""
    check_written(cache)
    text, n_experts = str(cache).strip().lower(), card.n_experts
    if re.fullmatch(r"\d+", text):
        if int(text) > n_experts:
            raise ConfigError(
                f"cache={cache}: {card.name} has {n_experts} experts in a layer; for a size write cache={cache}MiB"
            )
        return _rooms_of_share(card, scope, Fraction(int(text), n_experts))
    if SHARE.fullmatch(text):
        share = Fraction(text.rstrip("."))  # as it is written: 0.29 of 100 experts are 29
        if share > 1:
            raise ConfigError(
                f"cache={cache}: a fraction of all experts is at most 1.0; experts per layer stand without a dot"
            )
        return _rooms_of_share(card, scope, share)
    return _rooms_of_bytes(card, scope, bytes_of(str(cache), "cache"))


def _rooms_of_share(
    card: ModelCard, scope: str, share: Fraction
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Whole experts where all are equal; of unequal ones whole experts of each layer, or that share of all bytes."""
    sizes_L, n_experts = card.expert_bytes_L or (), card.n_experts
    units_L = (1,) * len(sizes_L) if len(set(sizes_L)) == 1 else sizes_L
    if scope == "global":
        return (int(share * n_experts * sum(units_L)),), units_L
    return tuple(int(share * n_experts) * unit for unit in units_L), units_L


def _rooms_of_bytes(
    card: ModelCard, scope: str, n_bytes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Equal bytes per layer; never more than there are experts, and whole experts where a cache's are equal."""
    sizes_L, n_experts = card.expert_bytes_L or (), card.n_experts
    if scope == "per_layer":
        each = n_bytes // len(sizes_L)
        return tuple(min(each // size, n_experts) * size for size in sizes_L), sizes_L
    whole = sizes_L[0] if len(set(sizes_L)) == 1 else 1
    return (min(n_bytes // whole * whole, n_experts * sum(sizes_L)),), sizes_L


def _with_more(
    room_G: tuple[int, ...], size_L: tuple[int, ...], n_experts: int, left: int
) -> tuple[int, ...]:
    """As many more experts as so many units hold, one after the other for every cache, never more than there are."""
    is_each = len(room_G) == len(size_L)
    most_G = [n_experts * size for size in (size_L if is_each else (sum(size_L),))]
    rooms, size_G = list(room_G), size_L if is_each else (max(size_L),)
    g = since = 0
    while since < len(rooms):
        since += 1
        if size_G[g] <= left and rooms[g] + size_G[g] <= most_G[g]:
            rooms[g], left, since = rooms[g] + size_G[g], left - size_G[g], 0
        g = (g + 1) % len(rooms)
    return tuple(rooms)


def slots_of(room_G: tuple[int, ...], size_L: tuple[int, ...]) -> tuple[int, ...]:
    largest = size_L if len(room_G) == len(size_L) else (max(size_L),)
    return tuple(room // size for room, size in zip(room_G, largest, strict=True))


def _check(scope: str, memory: int | str | None, cache: float | str | None, **counts: int) -> None:
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r}: must be one of {', '.join(SCOPES)}")
    if (memory is None) == (cache is None):
        raise ConfigError(
            f"give one of memory (12GiB, all of the GPU that may be used) and simulator.cache (0.25, 16 or 500MiB); "
            f"found memory={memory}, cache={cache}"
        )
    for name, value in counts.items():
        if not is_count(value) or value < 1:
            raise ConfigError(f"{name}={value}: must be a whole number, at least 1")


def _check_least(**counts: int) -> None:
    for name, value in counts.items():
        if not is_count(value) or value < 0:
            raise ConfigError(f"{name}={value}: must be a whole number, at least 0")
