"""Which tiles every kernel runs with: chosen, not searched for at run time. The checks compile exactly these.

It imports no triton. The numbers come from registers, shared memory and instructions of code compiled for sm_90; none
has been timed on a GPU yet. A tile is `rows` tokens x `columns` outputs x `depth` inputs at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefetch.kernels.layout import ExpertLayout

MOST_DECODED = 16  # choices: up to here a program per choice needs no plan
MOST_SWAPPED = 64  # tokens: up to here weights fill the wide side of a matrix instruction, tokens the narrow one
PATHS = ("decode", "swapped", "grouped")
SHARED_LIMIT = 232_448  # bytes of shared memory that one program may ask for on sm_90


@dataclass(frozen=True)
class Tiles:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Of one path: the up and the down product share their rows, since they share the plan."""

    up: Tiles  # `columns` of gates and as many of ups
    down: Tiles

    def __post_init__(self) -> None:
        if self.up.rows != self.down.rows:
            raise ValueError(
                f"one plan has one tile height; found {self.up.rows}, {self.down.rows}"
            )


def path_of(n_tokens: int, top_k: int) -> str:
    if n_tokens * top_k <= MOST_DECODED:
        return "decode"
    return "swapped" if n_tokens <= MOST_SWAPPED else "grouped"


def config_of(path: str, layout: ExpertLayout, n_rows: int, n_experts: int) -> Config:
    """Tall tiles where an expert has many rows; more would only be padding."""
    mean = -(-n_rows // n_experts)
    if path == "decode":
        return DECODE
    exact = layout.dtype == torch.float32
    if path == "swapped":
        rows = min(64, max(16, next_power(mean)))
        return (SWAPPED_EXACT if exact else SWAPPED)[rows]
    if exact:
        return GROUPED_EXACT
    if mean < 96:
        return GROUPED[64]
    return GROUPED[128] if layout.hidden % 256 == 0 else GROUPED_UNEVEN


# one row at a time, `columns` outputs per program: 64 KB in flight on each multiprocessor come from many small programs
DECODE = Config(up=Tiles(1, 8, 256, 4, 1), down=Tiles(1, 8, 256, 4, 1))
SUM_CELLS = (
    4096  # of the down product that sums over experts: four programs fit on a multiprocessor
)
# 64 weight rows are one instruction (m64n16k16 and wider); two programs fit on a multiprocessor
SWAPPED = {
    rows: Config(up=Tiles(rows, 32, 128, 4, 3), down=Tiles(rows, 64, 128, 4, 3))
    for rows in (16, 32, 64)
}
SWAPPED_EXACT = {
    rows: Config(up=Tiles(rows, 32, 32, 4, 2), down=Tiles(rows, 64, 32, 4, 2))
    for rows in (16, 32, 64)
}
GROUPED = {
    64: Config(up=Tiles(64, 64, 64, 4, 4), down=Tiles(64, 128, 64, 4, 4)),
    128: Config(up=Tiles(128, 128, 64, 8, 3), down=Tiles(128, 256, 64, 8, 3)),
}
# 256 columns pad gpt-oss's 2,880 outputs by 7 % instead of 2, and their masks take 247 of 255 registers
GROUPED_UNEVEN = Config(up=Tiles(128, 128, 64, 8, 3), down=Tiles(128, 128, 64, 8, 3))
GROUPED_EXACT = Config(up=Tiles(64, 32, 32, 8, 2), down=Tiles(64, 64, 32, 8, 2))


def sum_tiles(top_k: int) -> Tiles:
    """All experts of a token in one tile, 32 of their rows together."""
    padded = next_power(top_k)
    columns = max(1, 32 // padded)
    return Tiles(1, columns, min(256, max(16, SUM_CELLS // (padded * columns))), 4, 1)


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def route_tokens(n_tokens: int) -> int:
    """Of one program: alone while there are few, so that all multiprocessors have some."""
    return 1 if n_tokens <= 256 else 4


def route_warps(n_experts: int) -> int:
    return 1 if n_experts <= 256 else 4


def plan_warps(block: int) -> int:
    return 4 if block <= 512 else 8
