"""Where the experts of a model are to lie, as a choice fell: what settings of engines are written from.

It knows no engine and simulates nothing. L layers, E experts, G caches: one per layer, or one for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.memory import Budget
from prefetch.sim.tables.others import most_used, most_used_of_each
from prefetch.trace.card import ModelCard

ALL, STATIC, HOST, BOTH, CACHE = WAYS = (
    "all resident",
    "static split by layer",  # the first layers on the GPU, the others computed on the host
    "host compute",  # the most used experts on the GPU, the others computed on the host
    "host compute and uploads",  # the same, and what the host computed is copied in
    "cache",  # every expert is copied before it is used
)


@dataclass(frozen=True)
class Placement:
    card: ModelCard
    way: str
    room_G: tuple[int, ...]  # bytes of the GPU for routed experts, of each cache
    context: int  # tokens, of each of `batch` requests
    batch: int = 1
    policy: str = "static"
    predictor: str = "none"
    horizon: int = 0
    width: int = 0
    uses_LE: NDArray[np.int64] | None = None  # how often each expert was chosen
    host_bytes: int | None = None  # of host memory, as the simulation counted it

    def __post_init__(self) -> None:
        shape = self.card.n_layers, self.card.n_experts
        if self.way not in WAYS:
            raise ConfigError(f"placement: no way {self.way!r}; there are {', '.join(WAYS)}")
        if self.card.expert_bytes_L is None:
            raise ConfigError(f"placement: {self.card.name} does not say how large an expert is")
        if len(self.room_G) not in (1, shape[0]) or min(self.room_G) < 0:
            raise ConfigError(
                f"placement: expected bytes for each of {shape[0]} layers, or for all; found {self.room_G}"
            )
        if self.uses_LE is not None and self.uses_LE.shape != shape:
            raise ConfigError(f"placement: uses of {self.uses_LE.shape}, the card has {shape}")

    @property
    def told(self) -> str:
        """The way as a reader of settings needs it."""
        ahead = ""
        if self.predictor != "none":
            ahead = f", prefetch by {self.predictor} {self.horizon} layers ahead, {self.width} experts wide"
        return f"{self.way}{f' ({self.policy})' if self.way in (BOTH, CACHE) else ''}{ahead}"

    @property
    def has_encoder(self) -> bool:
        return "encoder" in self.card.layer_stacks

    @property
    def size_L(self) -> tuple[int, ...]:
        """Bytes of one expert."""
        return self.card.expert_bytes_L or ()

    @property
    def room_bytes(self) -> int:
        return sum(self.room_G)

    @property
    def is_gpu_LE(self) -> NDArray[np.bool_] | None:
        """Who lies on the GPU, of a cache at its start; None where counts of use would decide, and there are none."""
        n_layers, n_experts = self.card.n_layers, self.card.n_experts
        if self.way == ALL:
            return np.ones((n_layers, n_experts), bool)
        if self.way == STATIC:
            return self._filled(np.arange(n_layers * n_experts), self.room_bytes)
        if self.uses_LE is None:
            return None
        if len(self.room_G) == 1:
            return self._filled(most_used(self.uses_LE), self.room_bytes)
        is_gpu_LE = np.zeros((n_layers, n_experts), bool)
        for layer, (room, size) in enumerate(zip(self.room_G, self.size_L, strict=True)):
            first = most_used_of_each(self.uses_LE[layer : layer + 1], room // size)
            is_gpu_LE[layer, first] = True
        return is_gpu_LE

    @property
    def is_gpu_L(self) -> NDArray[np.bool_]:
        """The layers, from the first on, whose experts all have a place."""
        bytes_L = np.array(self.size_L) * self.card.n_experts
        is_gpu_L: NDArray[np.bool_] = bytes_L.cumsum() <= self.room_bytes
        return is_gpu_L | (self.way == ALL)

    def _filled(self, entries: NDArray[np.int64], room: int) -> NDArray[np.bool_]:
        """Entries, layer * E + expert, in this order while they fit."""
        n_experts = self.card.n_experts
        fits = np.array(self.size_L)[entries // n_experts].cumsum() <= room
        is_gpu_LE = np.zeros((self.card.n_layers, n_experts), bool)
        is_gpu_LE.ravel()[entries[fits]] = True
        return is_gpu_LE


@dataclass(frozen=True)
class Block:
    """What to type in one engine."""

    engine: str
    read_at: str  # where its option names were read
    is_exact: bool  # the engine can do what was simulated
    says: tuple[str, ...]  # sentences, in this order
    commands: tuple[str, ...]  # none where the engine cannot run such a model at all

    @property
    def text(self) -> str:
        """Lines for a shell: what is said is commented out."""
        said = [
            f"# {self.engine}; options as of {self.read_at}",
            *(f"# {one}" for one in self.says),
        ]
        return "\n".join([*said, *self.commands])


def no_such(engine: str, read_at: str, card: ModelCard) -> Block:
    says = f"{card.name} has experts in an encoder: {engine} was not seen to run such a model."
    return Block(engine, read_at, False, (says,), ())


def whole(engine: str, read_at: str, card: ModelCard, command: str) -> Block:
    says = f"Every expert on the GPU, counted at {card.expert_precision}."
    return Block(engine, read_at, True, (says,), (command,))


def rooms_of(card: ModelCard, budget: Budget) -> tuple[int, ...]:
    """The rooms of a budget in bytes."""
    size_L = card.expert_bytes_L or (1,)
    unit = 1 if budget.size_L == size_L else size_L[0]
    return tuple(room * unit for room in budget.room_G)


def profile(placement: Placement) -> pd.DataFrame:
    """A row per expert: the model's own layer number; uses, their share and rank (from 1) in the layer; is it on a GPU?

    What is not known is empty. With an encoder, `stack` says whose layer it is.
    """
    card, uses_LE, is_gpu_LE = placement.card, placement.uses_LE, placement.is_gpu_LE
    n_layers, n_experts = card.n_layers, card.n_experts
    table = pd.DataFrame({"layer": np.repeat(card.layer_numbers, n_experts)})
    if placement.has_encoder:
        table.insert(0, "stack", np.repeat(card.layer_stacks, n_experts))
    table["expert"] = np.tile(np.arange(n_experts), n_layers)
    for name in ("uses", "share", "rank", "on_gpu"):
        table[name] = pd.array([None] * len(table), "Float64" if name == "share" else "Int64")
    if uses_LE is not None:
        all_L1 = uses_LE.sum(axis=1, keepdims=True)
        rank_LE = np.argsort(np.argsort(-uses_LE, axis=1, kind="stable"), axis=1) + 1
        table["uses"] = pd.array(uses_LE.ravel(), "Int64")
        table["share"] = pd.array((uses_LE / np.maximum(all_L1, 1)).ravel(), "Float64")
        table["rank"] = pd.array(rank_LE.ravel(), "Int64")
    if is_gpu_LE is not None:
        table["on_gpu"] = pd.array(is_gpu_LE.ravel().astype(np.int64), "Int64")
    return table


def spelled(numbers: list[int]) -> str:
    """Layer numbers for a reader: 0 to 3, 7."""
    parts, rest = list[str](), list(numbers)
    while rest:
        n = next((n for n, one in enumerate(rest) if one != rest[0] + n), len(rest))
        parts.append(str(rest[0]) if n == 1 else f"{rest[0]} to {rest[n - 1]}")
        rest = rest[n:]
    return ", ".join(parts) or "none"
