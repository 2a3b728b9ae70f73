"""Which layers are timed: every combination of tokens, experts, choices, sizes, number type and routing.

It times nothing. A list that is not given is chosen by the device: a CPU is done with its grid in a minute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prefetch.config import ProfileConfig
from prefetch.engine.profiling.device import Place
from prefetch.errors import ConfigError
from prefetch.kernels.layout import ExpertLayout
from prefetch.models.hf import DTYPES

UNIFORM, ZIPF = "uniform", "zipf"
ROUTINGS = (UNIFORM, ZIPF)
MOST_THREADS = 1024
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "tokens": [1, 16, 256, 4096],
        "experts": [8, 64],
        "top_k": [2],
        "hidden": [256],
        "inner": [256],
        "dtypes": ["fp32"],
        "repeats": 5,
        "seconds": 75.0,
    },
    "cuda": {
        "tokens": [1, 4, 16, 64, 256, 1024, 4096],
        "experts": [8, 64, 128],
        "top_k": [2, 8],
        "hidden": [2048],
        "inner": [768],
        "dtypes": ["bf16"],
        "repeats": 20,
        "seconds": 600.0,
    },
}
AXES = ("tokens", "experts", "top_k", "hidden", "inner", "dtypes", "routings")


@dataclass(frozen=True)
class Cell:
    """One layer, one step. The order of the fields is the order of the table's columns."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    dtype: str
    routing: str

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, DTYPES[self.dtype])
        assert isinstance(found, torch.dtype)
        return found

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.hidden, self.inner, self.torch_dtype)

    @property
    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Grid:
    """The lists as they are used, whoever chose them."""

    cells: tuple[Cell, ...]
    repeats: int
    seconds: float
    skew: float
    factor: float
    backward: bool


def grid_of(told: ProfileConfig, place: Place) -> Grid:
    """Small steps first, so that what a short time budget leaves out are the largest."""
    _check(told)
    usual = DEFAULTS[place.device.type]
    lists = {}
    for name in AXES:
        given = getattr(told, name)
        lists[name] = list(usual[name] if given is None else given)
    cells = tuple(
        Cell(T, E, K, D, F, dtype, routing)
        for T, dtype, D, F, E, K, routing in itertools.product(
            *(lists[n] for n in ("tokens", "dtypes", "hidden", "inner", "experts", "top_k")),
            lists["routings"],
        )
        if K <= E
    )
    if not cells:
        raise ConfigError(
            f"profile.top_k={lists['top_k']}: no layer of profile.experts={lists['experts']} has so many experts"
        )
    repeats = usual["repeats"] if told.repeats is None else told.repeats
    seconds = usual["seconds"] if told.seconds is None else told.seconds
    return Grid(cells, repeats, seconds, told.skew, told.capacity_factor, told.backward)


def drawn_logits(cell: Cell, skew: float, seed: int, device: torch.device | str) -> Tensor:
    """[T, E] whose best k are k experts drawn without replacement: Gumbel noise on the logarithm of their shares
    (Yellott 1977). Zipf's shares fall with rank to the power of `skew`; who has which rank is drawn too."""
    generator = torch.Generator().manual_seed(seed)
    uniform_TE = torch.rand(cell.tokens, cell.experts, generator=generator, dtype=torch.float64)
    gumbel_TE = -(-uniform_TE.clamp(1e-12, 1 - 1e-12).log()).log()
    rank_E = torch.randperm(cell.experts, generator=generator) + 1
    share_E = rank_E.double() ** -skew if cell.routing == ZIPF else torch.ones(cell.experts)
    return (gumbel_TE + share_E.log()).to(device, cell.torch_dtype)


def _check(told: ProfileConfig) -> None:
    claims = dict(_claims(told))
    for claim, holds in claims.items():
        if not holds:
            raise ConfigError(f"profile.{claim}")


def _claims(told: ProfileConfig) -> Iterator[tuple[str, bool]]:
    for name in AXES:
        given = getattr(told, name)
        if given is not None:
            yield f"{name}=[]: names nothing to time; leave it out for the default", bool(given)
            yield f"{name}={list(given)}: names one twice", len(set(given)) == len(given)
    for name in ("tokens", "experts", "top_k", "hidden", "inner"):
        yield f"{name}={_list(told, name)}: each must be at least 1", _least(_list(told, name))
    known = {"dtypes": tuple(DTYPES), "routings": ROUTINGS}
    for name, names in known.items():
        yield (
            f"{name}={_list(told, name)}: expected {', '.join(names)}",
            set(_list(told, name)) <= set(names),
        )
    yield f"skew={told.skew}: must be a number from 0 on", 0 <= told.skew < math.inf
    yield f"capacity_factor={told.capacity_factor}: must be above 0", told.capacity_factor > 0
    yield f"repeats={told.repeats}: must be at least 1", told.repeats is None or told.repeats >= 1
    yield (
        f"threads={told.threads}: must be from 1 to {MOST_THREADS}",
        told.threads is None or 1 <= told.threads <= MOST_THREADS,
    )
    yield f"seconds={told.seconds}: must be above 0", told.seconds is None or told.seconds > 0


def _list(told: ProfileConfig, name: str) -> list[Any]:
    return list(getattr(told, name) or [])


def _least(values: Sequence[int]) -> bool:
    return all(value >= 1 for value in values)
