"""What a model costs on a machine, as the whole nanoseconds that the timed engine runs on. It simulates nothing.

Everything is a roofline: the longer of moving its bytes and of two operations per weight and token, at the rates of the
hardware file. Those are published peaks until a calibration replaces them: kernels take longer, never less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.models.architecture import Architecture, LatentAttention, stored_bytes
from prefetch.sim.engines.machine import MISSES, NO_DISK, ORDERS, Disk, Machine
from prefetch.sim.hardware import NS_PER_S, Hardware, Link
from prefetch.sim.memory import budget_of, bytes_of, spoken
from prefetch.sim.sizes import need_sizes, operations_per_s, weights_of
from prefetch.sim.workload import NEVER, Workload
from prefetch.trace.card import ModelCard

UNQUANTISED = ("fp32", "bf16", "fp16")
# A pageable copy crosses the host's memory three times: read, written to the driver's buffer, read from there.
CROSSINGS_PINNED, CROSSINGS_PAGEABLE = 1, 3


@dataclass(frozen=True)
class Beside:
    """What a model card does not say of the weights that are no routed experts. The default is what is then taken."""

    precision: str | None = None  # None: the experts', or bf16 beside experts of fewer bits
    attention_width: float | None = None  # heads * head size; None: the hidden size
    lookup_bytes: int = 0  # of dense_bytes: input embeddings, of which only rows are read


UNKNOWN = Beside()


def beside_of(architecture: Architecture, matrix_precision: str | None = None) -> Beside:
    """Of a shipped card. Layers whose cache does not grow have no attention that does; the width is a layer's mean."""
    attention = architecture.attention
    if isinstance(attention, LatentAttention):  # keys and values differ in size: the mean of both
        head = (attention.nope_dim + attention.rope_dim + attention.value_dim) / 2
    else:
        head = attention.head_dim
    embeddings = architecture.vocab_size * architecture.hidden_size
    looked_up = 0 if architecture.tied_embeddings else embeddings
    return Beside(
        precision=matrix_precision or architecture.matrix_precision,
        attention_width=attention.heads * head / architecture.full_attention_every,
        lookup_bytes=stored_bytes(looked_up, architecture.rest_precision),
    )


def machine_of(
    card: ModelCard,
    hardware: Hardware,
    work: Workload,
    *,
    beside: Beside = UNKNOWN,
    misses: str = "wait",
    staging: int = 2,
    is_pinned: bool = True,
    predictor_us: float = 0.0,
    uploads: int = 2,
    cancels: bool = True,
    protects: bool = True,
    landing: int = 0,
    budget: int | str | None = None,
    queue: str = "by_layer",
    host_cache: float | str | None = None,
) -> Machine:
    """Costs of this workload with the sizes of `card`. `predictor_us` is the host's time per event that is guessed.

    landing: places beside the cache for guesses, which then enter it on a hit only. budget: bytes that guesses may
    move per step. host_cache: what the host's memory holds of the experts, written like a cache; None: all of them.
    """
    need_sizes(card)
    _check(card, work, misses, staging, predictor_us, uploads)
    if queue not in ORDERS:
        raise ConfigError(f"simulator.queue={queue!r}: must be one of {', '.join(ORDERS)}")
    link, device, host = hardware.link, hardware.device, hardware.host
    lane = link.pinned if is_pinned else link.pageable
    crossings = CROSSINGS_PINNED if is_pinned else CROSSINGS_PAGEABLE
    left = max(0, host.bytes_per_s - crossings * lane.bytes_per_s[-1][1])
    bytes_L = card.expert_bytes_L or ()
    operations_L = [2 * weights_of(size, card.expert_precision, card) for size in bytes_L]
    chunks = {size: chunks_ns(link, size, is_pinned=is_pinned) for size in bytes_L}
    chunk_ns_LX = np.zeros((len(bytes_L), max(map(len, chunks.values()))), np.int64)
    for layer, size in enumerate(bytes_L):
        chunk_ns_LX[layer, : len(chunks[size])] = chunks[size]
    return Machine(
        before_S=before_S(card, hardware, work, beside),
        weight_ns_L=_each(bytes_L, device.bytes_per_s),
        token_ns_L=_each(operations_L, operations_per_s(device, str(card.expert_precision))),
        host_weight_ns_L=_each(bytes_L, host.bytes_per_s),
        host_token_ns_L=_each(operations_L, host.operations_per_s),
        chunk_ns_LX=chunk_ns_LX,
        whole_ns_L=chunk_ns_LX.sum(axis=1),
        n_chunks_L=np.array([len(chunks[size]) for size in bytes_L], np.int64),
        bytes_L=np.array(bytes_L, np.int64),
        chunk_bytes=link.chunk_bytes,
        miss_way=MISSES.index(misses),
        staging=staging,
        issue_ns=lane.host_ns_per_copy,
        predict_ns=math.ceil(predictor_us * 1000),
        uploads=uploads,
        shared_per_1000=1000 * left // host.bytes_per_s,
        cancels=cancels,
        protects=protects,
        landing=landing,
        budget_bytes=_budget(budget, bytes_L),
        by_score=queue == "by_score",
        disk=NO_DISK if host_cache is None else disk_of(card, hardware, host_cache),
    )


def disk_of(card: ModelCard, hardware: Hardware, host_cache: float | str) -> Disk:
    """The disk behind a host memory of this size, chunk by chunk; together exactly `storage.read_ns`."""
    try:
        room = budget_of(card, hardware, cache=host_cache, scope="global").cache_bytes
        asked = bytes_of(str(host_cache)) if str(host_cache)[-1:].lower() == "b" else room
    except ConfigError as error:
        raise ConfigError(f"simulator.host_cache: {error}") from None
    if asked > hardware.host.memory_bytes:
        raise ConfigError(
            f"simulator.host_cache={host_cache} is {spoken(asked)}: {hardware.name} has "
            f"{spoken(hardware.host.memory_bytes)} of host memory"
        )
    storage, bytes_L = hardware.storage, card.expert_bytes_L or ()
    n_chunks_L = np.array([-(-size // storage.chunk_bytes) for size in bytes_L], np.int64)
    chunk_ns_LX = np.zeros((len(bytes_L), int(n_chunks_L.max())), np.int64)
    for layer, size in enumerate(bytes_L):
        ends = [*range(storage.chunk_bytes, size, storage.chunk_bytes), size]
        done = [storage.read_ns(end) for end in ends]
        chunk_ns_LX[layer, : len(ends)] = np.diff(done, prepend=0)
    return Disk(chunk_ns_LX, n_chunks_L, chunk_ns_LX.sum(axis=1), storage.chunk_bytes, room)


def need_host_memory(card: ModelCard, hardware: Hardware) -> None:
    """Without a disk behind it the host's memory holds all experts."""
    all_bytes, has = card.n_experts * sum(card.expert_bytes_L or ()), hardware.host.memory_bytes
    if all_bytes > has:
        raise ConfigError(
            f"the experts of {card.name} are {spoken(all_bytes)}, {hardware.name} has {spoken(has)} of host memory, "
            f"shortfall {spoken(all_bytes - has)}. Pass simulator.host_cache=0.5 or =48GiB: the others are read from "
            "the disk"
        )


def _budget(budget: int | str | None, bytes_L: Sequence[int]) -> int:
    """Only whole copies are made: less than one expert would be none."""
    if budget is None:
        return int(NEVER)
    most = bytes_of(budget, "simulator.budget")
    if most < min(bytes_L):
        raise ConfigError(
            f"simulator.budget={budget}: an expert is {spoken(min(bytes_L))}, no guess would be copied; give more, "
            "or predictor=none"
        )
    return most


def before_S(
    card: ModelCard, hardware: Hardware, work: Workload, beside: Beside = UNKNOWN
) -> NDArray[np.int64]:
    """Of one layer in every step, before its routing is known: what all layers cost, spread evenly over the MoE layers.

    Dense and shared weights are read once per step and multiplied by every token. Keys and values are read once per
    request; every pair of a token and one that it attends to takes 4 operations per layer and unit of width, in bf16.
    """
    need_sizes(card)
    device, n_layers, dense_bytes = hardware.device, card.n_layers, card.dense_bytes or 0
    if not 0 <= beside.lookup_bytes <= dense_bytes:
        raise ConfigError(
            f"{beside.lookup_bytes} bytes of embeddings within dense_bytes={dense_bytes}"
        )
    experts = card.expert_precision if card.expert_precision in UNQUANTISED else "bf16"
    precision = str(beside.precision or experts)
    read_bytes = dense_bytes - beside.lookup_bytes + (card.shared_bytes or 0)
    width = beside.attention_width or card.hidden_size or 0
    rates = (
        device.bytes_per_s,
        operations_per_s(device, precision),
        operations_per_s(device, "bf16"),
    )
    second = math.prod(rates)  # the unit of all that follows is a part of a second: rounded up once
    moved, multiplied, attended = (second // rate for rate in rates)
    read, cached = read_bytes * moved, (card.kv_bytes_per_token or 0) * moved
    per_token = 2 * weights_of(read_bytes, precision, card) * multiplied
    per_pair = math.ceil(4 * width * n_layers) * attended
    tokens_S = (work.decode_S + work.prefill_S).tolist()
    steps = zip(tokens_S, work.context_S.tolist(), work.pairs_S.tolist(), strict=True)
    parts = [
        max(read, per_token * tokens) + max(cached * context, per_pair * pairs)
        for tokens, context, pairs in steps
    ]
    fixed = device.fixed_ns_per_layer
    return np.array([fixed - (-part * NS_PER_S // (second * n_layers)) for part in parts], np.int64)


def chunks_ns(link: Link, n_bytes: int, *, is_pinned: bool = True) -> list[int]:
    """Of every chunk of one copy; together exactly `link.copy_ns`, the latency in the first."""
    ends = [*range(link.chunk_bytes, n_bytes, link.chunk_bytes), n_bytes]
    done = [link.copy_ns(end, is_pinned=is_pinned) for end in ends]
    return [done[0], *(after - before for before, after in pairwise(done))]


def _each(amounts: Sequence[int], per_s: int) -> NDArray[np.int64]:
    """Nanoseconds, each rounded up."""
    return np.array([-(-amount * NS_PER_S // per_s) for amount in amounts], np.int64)


def _check(
    card: ModelCard, work: Workload, misses: str, staging: int, predictor_us: float, uploads: int
) -> None:
    ours = work.card
    if (ours.n_layers, ours.n_experts) != (card.n_layers, card.n_experts):
        raise ConfigError(
            f"{card.name} has {card.n_layers} layers of {card.n_experts} experts, the trace of {ours.name} "
            f"{ours.n_layers} of {ours.n_experts}; choose a simulator.model_card that fits"
        )
    if misses not in MISSES:
        raise ConfigError(f"misses={misses!r}: must be one of {', '.join(MISSES)}")
    given = {"staging": staging, "uploads": uploads, "predictor_us": predictor_us}
    for name, value in given.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}={value}: must be 0 or more")
