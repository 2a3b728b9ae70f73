"""The embedded model: what its training and recording cost, and how much structure its routing has.

    python scripts/bench/bench_tiny_moe.py [seed ...]        default 0 1

One row per seed, default settings. Recall is of the next layer's K experts among K guesses, mean over layer pairs,
first 70 % of the requests (drawn) to count and the rest to score. It must be at least twice popularity's.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe
from numpy.typing import NDArray

from prefetch.sources.tiny_moe import TinyMoE
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter

PRIOR = 0.5  # how many observations popularity counts for in a row of the transition matrix


def recall(score_TE: NDArray[np.float64], ids_TK: NDArray[np.int64]) -> float:
    guess_TK = np.argsort(-score_TE, axis=1)[:, : ids_TK.shape[1]]
    return float((guess_TK[:, :, None] == ids_TK[:, None, :]).any(1).mean())


def recalls(trace: RoutingTrace) -> tuple[float, float]:
    """Popularity's and first-order Markov's."""
    requests = np.unique(trace.request_T)
    n_fitted = max(1, int(0.7 * len(requests)))
    fitted = np.random.default_rng(0).permutation(requests)[:n_fitted]
    is_fitted_T = np.isin(trace.request_T, fitted)
    ids_TLK, pairs, n_experts = trace.ids_TLK.astype(np.int64), [], trace.card.n_experts
    for layer in range(trace.card.n_layers - 1):
        here, there = ids_TLK[is_fitted_T, layer], ids_TLK[is_fitted_T, layer + 1]
        counts_EE = np.zeros((n_experts, n_experts))
        np.add.at(counts_EE, (here[:, :, None], there[:, None, :]), 1)
        share_E = np.bincount(there.ravel(), minlength=n_experts) / there.size
        chance_EE = (counts_EE + PRIOR * share_E) / (counts_EE.sum(1, keepdims=True) + PRIOR)
        here, there = ids_TLK[~is_fitted_T, layer], ids_TLK[~is_fitted_T, layer + 1]
        popular_TE = np.broadcast_to(share_E, (len(there), n_experts))
        pairs.append((recall(popular_TE, there), recall(chance_EE[here].sum(1), there)))
    popularity, markov = np.mean(pairs, axis=0)
    return float(popularity), float(markov)


def measure(seed: int, root: Path) -> str:
    source = TinyMoE(seed=seed)
    model, folder = root / f"model-{seed}", root / f"trace-{seed}"
    model.mkdir(), folder.mkdir()
    cpu, wall = time.process_time(), time.perf_counter()
    source.upstream()["model"].build(model, {})
    train_cpu_s, train_s = time.process_time() - cpu, time.perf_counter() - wall
    wall = time.perf_counter()
    writer = TraceWriter(folder, Provenance("real", "tiny_moe"))
    source.record(writer, {"model": model})
    facts = writer.close().facts
    record_s = time.perf_counter() - wall
    trace = TraceReader(folder).load()
    popularity, markov = recalls(trace)
    return (
        f"| {seed} | 1 | {train_cpu_s:.1f} | {train_s:.1f} | {record_s:.1f} | {trace.n_tokens} "
        f"| {facts['held_out_nats_per_token_untrained']:.2f} -> "
        f"{facts['held_out_nats_per_token_trained']:.2f} "
        f"| {popularity:.3f} | {markov:.3f} | {markov / popularity:.2f} |"
    )


if __name__ == "__main__":
    print(describe())
    print(
        "| seed | threads | train CPU s (<= 60) | train s | record s | tokens | unseen nats/token "
        "| popularity | markov | ratio (>= 2) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for seed in map(int, sys.argv[1:] or ("0", "1")):
            print(measure(seed, Path(name)), flush=True)
