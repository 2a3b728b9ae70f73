"""Streaming a trace in and out: rates and peak memory by codec. Prints one row per codec.

    python scripts/bench/bench_trace.py [choices]        default 1e8; 1e9 is what the docs quote

Every codec runs in a process of its own, so that the peak memory is its own. Ids are drawn once and permuted by layer,
which is what real ids look like to a codec: close to random.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe

from prefetch.trace import parquet
from prefetch.trace.card import plain_card
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter

LAYERS, EXPERTS, TOP_K, REQUEST = 26, 64, 6, 512
CARD = plain_card("bench", n_experts=EXPERTS, top_k=TOP_K, layer_numbers=tuple(range(LAYERS)))


def block(n_requests: int) -> RoutingTrace:
    rng = np.random.default_rng(0)
    n = n_requests * REQUEST
    scores = rng.random((n, EXPERTS), np.float32) + np.linspace(0, 0.5, EXPERTS, dtype=np.float32)
    best = scores.argpartition(-TOP_K, axis=1)[:, -TOP_K:]
    order = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    ids = np.stack([order[layer][best] for layer in range(LAYERS)], axis=1)
    return trace_of(CARD, ids, request_T=np.repeat(np.arange(n_requests), REQUEST))


def measure(codec: str, choices: int) -> None:
    parquet.WIDE_CODEC = codec
    one = block(32)
    times = max(1, choices // one.ids_TLK.size)
    total = times * one.ids_TLK.size
    with tempfile.TemporaryDirectory() as name:
        writer = TraceWriter(Path(name), Provenance("synthetic", "bench"))
        writer.begin(CARD)
        started = time.perf_counter()
        for _ in range(times):
            writer.file("block")
            writer.append(one)
        writer.close()
        wrote = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(name).iterdir())
        started = time.perf_counter()
        read = sum(part.ids_TLK.size for part in parquet.TraceReader(name).batches())
        took = time.perf_counter() - started
    assert read == total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| {codec} | {total:.3g} | {size / total:.2f} | {total / wrote / 1e9:.2f} | "
        f"{total / took / 1e9:.2f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(float(sys.argv[2])))
    else:
        choices = sys.argv[1] if len(sys.argv) > 1 else "1e8"
        print(describe())
        print(
            "| codec | choices | B/choice | write+check Gchoice/s | read Gchoice/s | peak MB |",
            flush=True,
        )
        print("|---|---|---|---|---|---|", flush=True)
        for codec in ("none", "lz4", "zstd"):
            subprocess.run([sys.executable, __file__, codec, choices], check=True)
