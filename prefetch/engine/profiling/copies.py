"""How long a copy to the device takes, by size, and the latency and bandwidth that explain it.

It knows no expert. On a GPU: from pinned and from pageable host memory. On a CPU there is no link: a copy from memory
to memory stands for it, and is called so. Sources and targets move through a large arena, so that no cache helps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from prefetch.engine.profiling.timing import NS_PER_MS, NS_PER_S, Clock, Times, times_of

PINNED, PAGEABLE, IN_MEMORY = "pinned", "pageable", "memory to memory"
SIZES = {"cpu": [4 * 4**i * 1024 for i in range(8)], "cuda": [4 * 4**i * 1024 for i in range(9)]}
ARENA_BYTES = {"cpu": 2**27, "cuda": 2**29}
KNOTS = (64 * 1024, 512 * 1024, 4 * 2**20)  # bytes at which the rate may rise
SAME = 0.02  # rates that differ by less are one


@dataclass(frozen=True)
class CopyFit:
    """time(n) = latency + the bytes of each stretch at its rate; rates do not fall with size."""

    latency_ns: int
    bytes_per_s: tuple[tuple[int, int], ...]
    median_error: float  # of the fitted sizes, relative

    def ns(self, n_bytes: int) -> float:
        starts, rates = zip(*self.bytes_per_s, strict=True)
        ends = [*starts[1:], max(n_bytes, starts[-1])]
        moved = sum(
            max(0, min(n_bytes, end) - start) / rate
            for start, end, rate in zip(starts, ends, rates, strict=True)
        )
        return self.latency_ns + moved * NS_PER_S


def fit_copies(sizes: Sequence[int], ns: Sequence[float]) -> CopyFit:
    """Least squares of relative errors, no term below 0. A term per knot lets the rate rise there, never fall."""
    if len(set(sizes)) < 2:
        raise ValueError(f"a line needs two sizes; found {sorted(set(sizes))}")
    size_N, time_N = np.array(sizes, float), np.array(ns, float)
    knots = [knot for knot in KNOTS if size_N.min() < knot < size_N.max()]
    fit = _fitted(size_N, time_N, knots)
    return fit if len(fit.bytes_per_s) == 1 else min(fit, _fitted(size_N, time_N, []), key=_worth)


def _worth(fit: CopyFit) -> float:
    """A curve must explain a twentieth more than a line, or the line is taken."""
    return fit.median_error * (1.05 if len(fit.bytes_per_s) > 1 else 1.0)


def _fitted(size_N: NDArray[Any], time_N: NDArray[Any], knots: list[int]) -> CopyFit:
    columns = [np.ones_like(size_N), size_N, *(np.minimum(size_N, knot) for knot in knots)]
    scale = np.array([time_N.min(), *[time_N.max() / size_N.max()] * (1 + len(knots))])
    terms_NM = np.stack(columns, 1) * scale / time_N[:, None]
    found, _ = nnls(terms_NM, np.ones_like(time_N))
    latency, slope, *extra = found * scale
    if slope <= 0:  # no end of the rate: only a straight line can be meant
        slope, extra = max(slope, 1e-6), [0.0] * len(knots)
    slopes = [slope + sum(extra[i:]) for i in range(len(knots) + 1)]
    curve = _curve([0, *knots], slopes)
    fit = CopyFit(round(latency), curve, 0.0)
    off = [abs(fit.ns(int(n)) / t - 1) for n, t in zip(size_N, time_N, strict=True)]
    return CopyFit(fit.latency_ns, curve, float(np.median(off)))


def _curve(starts: Sequence[int], slopes: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Stretches whose rates are the same are one; slopes are ns per byte."""
    curve = list[tuple[int, int]]()
    for start, slope in zip(starts, slopes, strict=True):
        rate = max(1, round(NS_PER_S / slope))
        if not curve or rate > curve[-1][1] * (1 + SAME):
            curve.append((start, rate))
    return tuple(curve)


def copies_of(clock: Clock, repeats: int) -> pd.DataFrame:
    """A row for every kind of host memory and size."""
    kinds = (PINNED, PAGEABLE) if clock.place.is_gpu else (IN_MEMORY,)
    return pd.DataFrame([row for kind in kinds for row in _kind(kind, clock, repeats)])


def fits_of(copies: pd.DataFrame) -> dict[str, CopyFit]:
    return {
        str(kind): fit_copies(rows.bytes.tolist(), rows.median_ns.tolist())
        for kind, rows in copies.groupby("kind", sort=False)
    }


def _kind(kind: str, clock: Clock, repeats: int) -> Iterator[dict[str, Any]]:
    device = clock.place.device
    arena = ARENA_BYTES[device.type]
    source = torch.empty(arena, dtype=torch.uint8, pin_memory=kind == PINNED).fill_(1)
    target = torch.empty(arena, dtype=torch.uint8, device=device).fill_(0)  # pages are there
    for size in SIZES[device.type]:
        time_copy = _on_gpu if kind == PINNED else _on_host
        times, host_ns = time_copy(source, target, size, clock, repeats)
        yield {
            "kind": kind,
            "bytes": size,
            "median_ns": times.median_ns,
            "p25_ns": times.p25_ns,
            "p75_ns": times.p75_ns,
            "calls": times.calls,
            "host_ns": host_ns,
        }


def _on_gpu(
    source: Tensor, target: Tensor, size: int, clock: Clock, repeats: int
) -> tuple[Times, int]:
    """The device's time, behind work that hides the call; and what the call takes of the host's."""
    found, called = list[int](), list[int]()
    for at in _places(len(source), size, repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        clock.clear()
        begin.record()
        before = time.perf_counter_ns()
        target[at : at + size].copy_(source[at : at + size], non_blocking=True)
        called.append(time.perf_counter_ns() - before)
        end.record()
        clock.wait()
        found.append(max(1, round(begin.elapsed_time(end) * NS_PER_MS)))
    return times_of(found[1:]), times_of(called[1:]).median_ns


def _on_host(
    source: Tensor, target: Tensor, size: int, clock: Clock, repeats: int
) -> tuple[Times, int]:
    """The calling thread makes the copy, or waits for it: its time is the copy's."""
    found = list[int]()
    for at in _places(len(source), size, repeats + 1):
        clock.clear()
        clock.wait()
        before = time.perf_counter_ns()
        target[at : at + size].copy_(source[at : at + size])
        clock.wait()
        found.append(time.perf_counter_ns() - before)
    times = times_of(found[1:])
    return times, times.median_ns


def _places(arena: int, size: int, n: int) -> list[int]:
    """Where copies begin, far from one another."""
    return [i * (arena // n) % max(1, arena - size) // 4096 * 4096 for i in range(n)]
