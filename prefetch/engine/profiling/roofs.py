"""What the device can do at best, measured here and now: reading memory, and multiplying large matrices.

It knows no layer. Reading is the fastest of three ways to read a buffer that no cache holds; multiplying is a square
product by the vendor's library, doubled until it takes long enough to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from prefetch.engine.profiling.timing import NS_PER_S, Clock
from prefetch.engine.profiling.work import Roofs
from prefetch.models.hf import DTYPES

READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
ROW = 4096  # elements
SMALLEST, LARGEST = 256, 16384  # rows of a square
LONG_ENOUGH_NS = {"cpu": 20_000_000, "cuda": 3_000_000}
REPEATS = 5


def roofs_of(clock: Clock, dtypes: Sequence[str]) -> Roofs:
    """A CPU without a fast product of a narrow type can still make it wider: no type is slower than float32."""
    rates = {dtype: flops_per_s(clock, dtype) for dtype in dtypes}
    least = rates.get("fp32", 0)
    return Roofs(
        read_bytes_per_s(clock), {dtype: max(rate, least) for dtype, rate in rates.items()}
    )


def read_bytes_per_s(clock: Clock) -> int:
    """By the fastest call of the fastest way: a roof is not a median."""
    n_bytes = READ_BYTES[clock.place.device.type]
    buffer = torch.ones(n_bytes // 4, device=clock.place.device)
    rows, vector = buffer.view(-1, ROW), torch.ones(ROW, device=clock.place.device)
    ways: list[Callable[[], Tensor]] = [
        buffer.sum,
        lambda: torch.mv(rows, vector),
        lambda: torch.dot(buffer[: len(buffer) // 2], buffer[len(buffer) // 2 :]),
    ]
    best_ns = min(clock.times(way, REPEATS).fastest_ns for way in ways)
    return max(1, n_bytes * NS_PER_S // best_ns)


def flops_per_s(clock: Clock, dtype: str) -> int:
    kind = getattr(torch, DTYPES[dtype])
    return _best(clock, lambda n: torch.ones(n, n, dtype=kind, device=clock.place.device), _plain)


def narrow_flops_per_s(clock: Clock) -> dict[str, int | None]:
    """Of fp8 and int8 on a GPU that multiplies them; None = torch has no such product here."""
    device = clock.place.device

    def ones(n: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(n, n, device=device).to(dtype)

    def fp8(matrix: Tensor) -> Tensor:
        scale = torch.ones((), device=device)
        return torch._scaled_mm(
            matrix, matrix.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )

    found: dict[str, int | None] = {"fp8": None, "int8": None}
    products = {"fp8": (torch.float8_e4m3fn, fp8), "int8": (torch.int8, _int8)}
    for name, (dtype, product) in products.items() if clock.place.is_gpu else ():
        with suppress(RuntimeError, NotImplementedError, AttributeError):
            found[name] = _best(clock, partial(ones, dtype=dtype), product)
    return found


def _plain(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def _int8(matrix: Tensor) -> Tensor:
    return torch._int_mm(matrix, matrix.T)


def _best(clock: Clock, make: Callable[[int], Tensor], product: Callable[[Tensor], Tensor]) -> int:
    found, n = 0, SMALLEST
    while n <= LARGEST:
        times = clock.times(partial(product, make(n)), REPEATS, most_s=1.0)
        found = max(found, 2 * n**3 * NS_PER_S // times.fastest_ns)
        if times.median_ns >= LONG_ENOUGH_NS[clock.place.device.type]:
            break
        n *= 2
    return max(1, found)
