"""How much a policy's misses change when experts that are needed together are replayed one after the other.

    python scripts/bench/bench_semantics.py FOLDER ...      folders of traces (stage=collect makes them)

All requests, `batch` at a time, teacher-forced where they are prompts; one cache per layer, cold once. Misses are per
distinct expert of an event. One after the other, an expert of an event may push out another that the same event still
needs, which no engine does: it knows the whole set. moe-cache-eval (arXiv 2608.07911) says of Qwen3-30B-A3B at 40 % per
layer and batch 8: 27.4 % more misses with LRU, 28.5 with LFRU, 3.4 with LFU, 4.3 with Belady.
"""

from __future__ import annotations

import sys

import numpy as np
from machine import describe

from prefetch.sim.engines.pool import ATOMIC, MISS, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.least_stale import LeastStale
from prefetch.sim.policies.lfru import Lfru
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.random import Random
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.parquet import TraceReader

POLICIES: dict[str, Policy] = {
    "random": Random(), "fifo": Fifo(), "lru": Lru(), "least_stale": LeastStale(), "lfu": Lfu(),
    "lfu_persistent": LfuPersistent(), "lfru": Lfru(), "sieve": Sieve(), "s3fifo": S3Fifo(), "arc": Arc(),
    "belady_forced": BeladyForced(), "belady": Belady(),
}  # fmt: skip
BATCHES = (1, 2, 4, 8)
SHARES = (0.25, 0.4)


def misses(work: Workload, policy: Policy, capacity: int, semantics: int) -> float:
    """Per access."""
    n_layers = work.card.n_layers
    outcome_A = replay(work, policy, [capacity] * n_layers, [1] * n_layers, semantics)
    return float(np.mean(outcome_A == MISS))


def cell(work: Workload, policy: Policy, capacity: int) -> str:
    together = misses(work, policy, capacity, ATOMIC)
    apart = misses(work, policy, capacity, SEQUENTIAL)
    return f"{100 * together:.1f} {100 * (apart / together - 1):+.1f} %"


def main(folders: list[str]) -> None:
    print(describe())
    for folder in folders:
        trace = TraceReader(folder).load()
        card, works = trace.card, [workload_of(trace, batch=batch) for batch in BATCHES]
        print(
            f"\n{len(trace.ids_TLK)} tokens, {card.n_layers} layers, {card.top_k} of {card.n_experts}\n"
        )
        print(f"| capacity | policy | {' | '.join(f'batch {batch}' for batch in BATCHES)} |")
        print("|---|---|" + "---|" * len(BATCHES))
        for share in SHARES:
            capacity = int(share * card.n_experts)
            large = [f"{100 * np.mean(np.diff(work.start_V) > capacity):.0f} %" for work in works]
            print(f"| {capacity} | events larger | {' | '.join(large)} |")
            for name, policy in POLICIES.items():
                row = " | ".join(cell(work, policy, capacity) for work in works)
                print(f"| {capacity} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
