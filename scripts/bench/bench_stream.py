"""LRU hit curves of a trace larger than memory, at every capacity of every layer at once: rates, shares, peak memory.
The last row of each size is a cache of 16 per layer, replayed part by part as any policy would be.

    python scripts/bench/bench_stream.py [choices] [folder]       default 1e9, which takes 1 GB of disk meanwhile

Drawn traces, the first a tenth as long, are written once, read as any trace is read, and replayed through the stacks.
Each row is a process of its own, so that its peak memory is its own: on one core, on two, and on one in two halves that
are put together, which must count the same. "before": what the process holds when libraries and kernels are loaded.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from prefetch.sim.engines.pool import HIT
from prefetch.sim.engines.run import replay_parts
from prefetch.sim.limits.stacks import LruStacks
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, no_expert, trace_of
from prefetch.trace.writer import TraceWriter

N_LAYERS, N_EXPERTS, TOP_K, REQUEST, N_REQUESTS = 27, 64, 6, 512, 48
CARD = plain_card("bench", n_experts=N_EXPERTS, top_k=TOP_K, layer_numbers=tuple(range(N_LAYERS)))
SIXTEEN = 16
MAX_ROWS = 1 << 14  # a batch of 2.6 million choices


def blocks(n_blocks: int) -> Iterator[RoutingTrace]:
    """Experts that some tokens in a row like; in every block others, so that no two blocks are alike."""
    rng, n_tokens = np.random.default_rng(0), N_REQUESTS * REQUEST
    mood = rng.normal(size=(n_tokens // 16 + 1, N_LAYERS, N_EXPERTS)).astype(np.float32)
    ids = np.empty((n_tokens, N_LAYERS, TOP_K), np.int64)
    for t in range(n_tokens):
        score_LE = mood[t // 16] + rng.standard_normal((N_LAYERS, N_EXPERTS), dtype=np.float32)
        ids[t] = score_LE.argpartition(-TOP_K, axis=1)[:, -TOP_K:]
    request_T = np.repeat(np.arange(N_REQUESTS), REQUEST)
    for _ in range(n_blocks):
        names_LE = np.stack([rng.permutation(N_EXPERTS) for _ in range(N_LAYERS)])
        renamed = names_LE[np.arange(N_LAYERS)[:, None], ids]
        yield trace_of(CARD, renamed, request_T=request_T)


def write(folder: Path, choices: int) -> None:
    writer = TraceWriter(folder, Provenance("synthetic", "bench"))
    writer.begin(CARD)
    for block in blocks(max(1, choices // (N_REQUESTS * REQUEST * N_LAYERS * TOP_K))):
        writer.file("block")
        writer.append(block)
    writer.close()


def replay(folder: Path, n_threads: int, n_parts: int) -> str:
    """The cells of a row."""
    seconds = dict.fromkeys(("read", "stacks"), 0.0)
    parts = [LruStacks(N_LAYERS, N_EXPERTS, TOP_K) for _ in range(n_parts)]
    reader, rows, before = TraceReader(folder), 0, peak_mb()
    per_part = -(-reader.n_tokens // n_parts)
    at = began = time.perf_counter()
    began_cpu = time.process_time()
    with ThreadPoolExecutor(n_threads) as pool:
        for block in reader.batches(max_rows=MAX_ROWS):
            at = _lap(seconds, "read", at)
            add(parts[rows // per_part], block, pool, n_threads)
            rows += block.n_tokens
            at = _lap(seconds, "stacks", at)
    for later in parts[1:]:
        parts[0].merge(later)
    took = time.perf_counter() - began, time.process_time() - began_cpu
    return _cells(parts[0], rows, took, seconds, before)


def replay_one(folder: Path) -> str:
    """The same of one cache per layer: events, policy, outcomes."""
    seconds, before = dict.fromkeys(("read", "replay"), 0.0), peak_mb()
    reader, accesses, hits = TraceReader(folder), 0, 0
    at = began = time.perf_counter()
    began_cpu = time.process_time()

    def works() -> Iterator[Workload]:
        nonlocal at
        for block in reader.batches(max_rows=MAX_ROWS):
            at = _lap(seconds, "read", at)
            yield workload_of(block, phase="decode")

    for outcome_A in replay_parts(works(), Lru(), [SIXTEEN] * N_LAYERS, [1] * N_LAYERS):
        accesses, hits = accesses + len(outcome_A), hits + int((outcome_A == HIT).sum())
        at = _lap(seconds, "replay", at)
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    shares = " | ".join(f"{100 * part / wall:.0f} %" for part in seconds.values())
    return (
        f"{accesses:.3g} | {wall:.1f} | {accesses / wall / 1e6:.0f} | {accesses / cpu / 1e6:.0f} | "
        f"{shares} | {before:.0f} | {peak_mb():.0f} | {100 * hits / accesses:.3f} |"
    )


def add(stacks: LruStacks, block: RoutingTrace, pool: ThreadPoolExecutor, n_threads: int) -> None:
    def some(part: int) -> None:
        first, stop = (N_LAYERS * i // n_threads for i in (part, part + 1))
        nobody = no_expert(N_EXPERTS)
        stacks.replay_layers(range(first, stop), block.ids_TLK, block.phase_T, nobody)

    list(pool.map(some, range(n_threads)))


def peak_mb() -> float:
    """Of this process alone: what the system tells of a child begins with what its parent had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] += now - since
    return now


def _cells(
    stacks: LruStacks,
    rows: int,
    took: tuple[float, float],
    seconds: dict[str, float],
    before: float,
) -> str:
    hist_D: np.ndarray[Any, Any] = stacks.hist_LCD.sum(axis=(0, 1))
    accesses, (wall, cpu) = rows * N_LAYERS * TOP_K, took
    assert hist_D.sum() == accesses, "every choice has one distance"
    hits = 100 * hist_D.cumsum()[[15, 31]] / accesses
    shares = " | ".join(f"{100 * part / wall:.0f} %" for part in seconds.values())
    return (
        f"{accesses:.3g} | {wall:.1f} | {accesses / wall / 1e6:.0f} | {accesses / cpu / 1e6:.0f} | "
        f"{shares} | {before:.0f} | {peak_mb():.0f} | {hits[0]:.3f} {hits[1]:.3f} |"
    )


def measure(folder: str, n_threads: int, n_parts: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-n_threads:])
    warm_up(folder)
    if n_parts == 0:
        print(f"| 1, one cache | {replay_one(Path(folder))}", flush=True)
        return
    parts = "" if n_parts == 1 else f", {n_parts} halves"
    print(f"| {n_threads}{parts} | {replay(Path(folder), n_threads, n_parts)}", flush=True)


def warm_up(folder: str) -> None:
    """Compiles, or reads what was compiled."""
    two = [LruStacks(N_LAYERS, N_EXPERTS, TOP_K) for _ in range(2)]
    first = next(iter(TraceReader(folder).batches(max_rows=1)))
    for stacks in two:
        ids_TK = np.ascontiguousarray(first.ids_TLK[:, 0])
        stacks.replay(0, ids_TK, first.phase_T, no_expert(N_EXPERTS))
    two[0].merge(two[1])


def main(choices: int, base: str | None) -> None:
    print(describe())
    print(
        "| cores | choices | s | M choices/s | M per CPU second | reading | stacks | before MB | "
        "peak MB | hits % at 16, 32 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for n_choices, ways in (
        (choices // 10, ((1, 1), (1, 0))),
        (choices, ((1, 1), (2, 1), (1, 2), (1, 0))),
    ):
        with tempfile.TemporaryDirectory(dir=base) as folder:
            write(Path(folder), n_choices)
            for n_threads, n_parts in ways:
                command = [sys.executable, __file__, folder, str(n_threads), str(n_parts)]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**9, (sys.argv[2:] or [None])[0])
