"""How a device is timed, and what it can do at best: reading only, and a square product. Not a benchmark.

On a GPU a run is captured into a CUDA graph, so that nobody's launches are timed, unless it waits for the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDS, BUDGET_MS = 7, 200


@dataclass(frozen=True)
class Taken:
    """Microseconds of one call: on a GPU the median with the tenth and ninetieth percentile, else with the extremes."""

    median: float
    low: float
    high: float

    def each(self, n: int) -> Taken:
        return Taken(self.median / n, self.low / n, self.high / n)


@dataclass(frozen=True)
class Roof:
    read_bytes_per_s: float
    operations_per_s: float

    def us(self, n_bytes: float, operations: float = 0) -> float:
        return 1e6 * max(n_bytes / self.read_bytes_per_s, operations / self.operations_per_s)


def taken_by(run: Callable[[], object], *, graph: bool) -> Taken:
    if not ON_GPU:
        run()
        taken = sorted(_elapsed_us(run) for _ in range(ROUNDS))
        return Taken(statistics.median(taken), taken[0], taken[-1])
    from triton.testing import do_bench, do_bench_cudagraph

    bench = do_bench_cudagraph if graph else do_bench
    median, low, high = bench(run, rep=BUDGET_MS, quantiles=[0.5, 0.1, 0.9])
    return Taken(1e3 * median, 1e3 * low, 1e3 * high)


def clock_of(graph: bool) -> str:
    return ("graph" if graph else "events") if ON_GPU else "monotonic"


def roof_of(dtype: torch.dtype) -> Roof:
    """Here and now, the best of a few. The buffer is larger than a GPU's caches, and written, so that it is real."""
    read = torch.ones(2**30 if ON_GPU else 2**27, device=DEVICE)
    read_us = taken_by(read.sum, graph=True).low
    side = 8192 if ON_GPU else 512
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    product_us = taken_by(lambda: a @ b, graph=True).low
    return Roof(read.nbytes / read_us * 1e6, 2 * side**3 / product_us * 1e6)


def _elapsed_us(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - started)
