"""Every table of a large trace: seconds, memory, and the same counts by other means. Prints two tables.

    python scripts/bench/bench_analyze.py [choices]        default 1e8

The trace is drawn (48 layers, 128 experts, k = 8). Compilation is paid on a small trace first. Peers count how often
every expert, and every pair of experts of consecutive layers, was chosen, on a table small enough for them.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
from machine import describe

from analysis.routing.batch import accumulate, plan_of
from analysis.routing.everything import Settings, analyze_trace
from analysis.routing.statistics import Usage
from analysis.routing.transitions import Transitions
from prefetch.sources.synthetic import Synthetic
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter

LAYERS, EXPERTS, TOP_K, REQUEST = 48, 128, 8, 128
PEER_CHOICES = 2e6
ROUNDS = 5


def drawn(folder: Path, choices: float) -> TraceReader:
    requests = max(8, round(choices / (LAYERS * TOP_K * REQUEST)))
    shape = {"n_layers": LAYERS, "n_experts": EXPERTS, "top_k": TOP_K}
    source = Synthetic(process="zipf", skew=0.7, n_requests=requests, **shape)
    folder.mkdir()
    writer = TraceWriter(folder, Provenance("synthetic", "bench"))
    source.record(writer, {})
    writer.close()
    return TraceReader(folder)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def count_once(reader: TraceReader) -> None:
    plan = plan_of(reader)
    accumulate(reader, plan, [Usage(plan)])


def whole(folder: Path, choices: float) -> None:
    small, large = drawn(folder / "small", 1e6), drawn(folder / "large", choices)
    analyze_trace(small, Settings())
    count_once(small)

    def analyzed(last: int) -> Callable[[], object]:
        return lambda: analyze_trace(large, Settings(horizons=tuple(range(1, last + 1))))

    ways = (lambda: count_once(large), analyzed(1), analyzed(2), analyzed(4))
    taken = np.array([[seconds(way) for way in ways] for _ in range(ROUNDS)])
    further = (taken[:, 3] - taken[:, 1]) / 3
    print(
        "| tables | s median [min..max] of rounds | counting passes of its round |\n|---|---|---|"
    )
    names = ("one counting pass", "all, horizon 1", "all, horizons 1 and 2", "all, horizons 1 to 4")
    for name, seconds_R in zip((*names, "each further horizon"), (*taken.T, further), strict=True):
        span = f"{np.median(seconds_R):.1f} [{seconds_R.min():.1f}..{seconds_R.max():.1f}]"
        print(f"| {name} | {span} | {np.median(seconds_R / taken[:, 0]):.1f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPeak memory of the process: {peak:.0f} MB")


def ours(trace: RoutingTrace) -> None:
    plan = plan_of(trace)
    accumulate(trace, plan, [Usage(plan), Transitions(plan, (1,))])


def counters(trace: RoutingTrace) -> None:
    """The way of the seed's scripts: a Counter per layer, filled choice by choice."""
    usage = [Counter[int]() for _ in range(LAYERS)]
    pairs = [Counter[tuple[int, int]]() for _ in range(LAYERS)]
    for row_LK in trace.ids_TLK.tolist():
        for layer, here in enumerate(row_LK):
            usage[layer].update(here)
            if layer + 1 < LAYERS:
                there = row_LK[layer + 1]
                pairs[layer].update((a, b) for a in here for b in there)


def columns(trace: RoutingTrace) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One row per choice, and one row per pair: what a group-by needs."""
    ids = trace.ids_TLK
    layer = np.broadcast_to(np.arange(LAYERS, dtype=np.uint8)[None, :, None], ids.shape)
    shape = (len(ids), LAYERS - 1, TOP_K, TOP_K)
    here = np.broadcast_to(ids[:, :-1, :, None], shape).ravel()
    there = np.broadcast_to(ids[:, 1:, None, :], shape).ravel()
    pair_layer = np.broadcast_to(layer[:, :-1, :, None], shape).ravel()
    pairs = {"layer": pair_layer, "here": here, "there": there}
    return {"layer": layer.ravel(), "expert": ids.ravel()}, pairs


def by_pandas(trace: RoutingTrace) -> None:
    choices, pairs = (pd.DataFrame(table) for table in columns(trace))
    choices.groupby(["layer", "expert"]).size()
    pairs.groupby(["layer", "here", "there"]).size()


def by_polars(trace: RoutingTrace) -> None:
    choices, pairs = (pl.DataFrame(table) for table in columns(trace))
    choices.group_by("layer", "expert").len()
    pairs.group_by("layer", "here", "there").len()


def peers(folder: Path) -> None:
    trace = drawn(folder / "peers", PEER_CHOICES).load()
    ours(trace)
    print(
        "\n| counts of 2e6 choices | s median | ours is faster, median [min..max] of rounds |\n|---|---|---|"
    )
    ways = (ours, counters, by_pandas, by_polars)
    rounds = [[seconds(lambda f=f: f(trace)) for f in ways] for _ in range(ROUNDS)]
    taken = np.array(rounds)
    for i, name in enumerate(("ours", "Python counters", "pandas group-by", "polars group-by")):
        ratios = taken[:, i] / taken[:, 0]
        span = f"{np.median(ratios):.0f}x [{ratios.min():.0f}..{ratios.max():.0f}]" if i else "1"
        print(f"| {name} | {np.median(taken[:, i]):.3f} | {span} |", flush=True)


if __name__ == "__main__":
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        whole(Path(name), float(sys.argv[1]) if len(sys.argv) > 1 else 1e8)
        peers(Path(name))
