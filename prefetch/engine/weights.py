"""Drawn weights of a model card's sizes: the pool on a device, and the blocks on the host that are copied into it.

It knows no engine. What a host cannot hold it holds in part: blocks are then shared by experts, copies are as large and
as many as ever.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import torch
from torch import Tensor

from prefetch.engine.arena import Arena
from prefetch.errors import ConfigError
from prefetch.kernels.layout import ExpertLayout
from prefetch.sim.engines.reference import Entry
from prefetch.sim.memory import spoken
from prefetch.trace.card import ModelCard

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRICES = 3  # gate, up, down
SHARE = 0.8  # of the memory that is free, what may be taken
MOST_HOST_BYTES = 2 * 2**30  # larger than any cache between the host's memory and its cores


def layout_of(card: ModelCard) -> ExpertLayout:
    """Of experts as large as the card's, three matrices each."""
    dtype = DTYPES.get(str(card.expert_precision))
    if dtype is None:
        raise ConfigError(
            f"{card.name}: experts of {card.expert_precision}; the engine computes {', '.join(DTYPES)}: pass "
            "simulator.precision=bf16 with simulator.model_card, which makes copies larger"
        )
    sizes, hidden = set(card.expert_bytes_L or ()), card.hidden_size
    if len(sizes) != 1 or not hidden:
        raise ConfigError(
            f"{card.name}: {len(sizes)} sizes of experts, hidden size {hidden}; the pool's slots are of one known "
            "size: pass simulator.model_card=NAME"
        )
    inner = round(sizes.pop() / (MATRICES * hidden * dtype.itemsize))
    return ExpertLayout(hidden, max(1, inner), dtype)


class Drawn:
    """A pool of slots, and the host's blocks."""

    def __init__(self, card: ModelCard, device: torch.device, seed: int) -> None:
        self.layout, self.device = layout_of(card), device
        self.n_experts, n_entries = card.n_experts, card.n_layers * card.n_experts
        held = max(1, min(n_entries, MOST_HOST_BYTES // self.layout.bytes))
        _need_memory(held * self.layout.bytes, torch.device("cpu"), "the experts of the host")
        if held < n_entries:
            log.info(
                "%s: the host holds %d different blocks of %s, shared by %d experts",
                card.name,
                held,
                spoken(self.layout.bytes),
                n_entries,
            )
        self.arena = Arena(device)
        self.blocks_EN = self.arena.hold(self.layout.random(held, seed))
        weakref.finalize(self, self.arena.close)

    def block(self, entry: Entry) -> Tensor:
        layer, expert = entry
        return self.blocks_EN[(layer * self.n_experts + expert) % len(self.blocks_EN)]

    def need(self, n_slots: int) -> None:
        """A pool that cannot be had is refused before it is asked for."""
        _need_memory(n_slots * self.layout.bytes, self.device, f"a pool of {n_slots} slots")

    def pool(self, n_slots: int) -> Tensor:
        self.need(n_slots)
        shape = (n_slots, self.layout.numel)
        return torch.zeros(shape, dtype=self.layout.dtype, device=self.device)


def _need_memory(n_bytes: int, device: torch.device, what: str) -> None:
    is_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_gpu else _free_bytes()
    if n_bytes > SHARE * free:
        raise ConfigError(
            f"{what} is {spoken(n_bytes)}, and {device.type} has {spoken(free)} free, of which {SHARE:.0%} may be "
            "taken: give a smaller simulator.cache, or a smaller simulator.model_card"
        )


def _free_bytes() -> int:
    """Of the host; where the system does not say, of a small machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return 4 * 2**30
