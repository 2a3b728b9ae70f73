"""What a cluster costs and brings on one machine: seconds per shard, and the same work here and on local processes.

    python scripts/bench/bench_cluster.py [choices] [workers]        default 1e8 2

The trace is drawn (48 layers, 128 experts, k = 8). Both sides have compiled and started before; rounds are pairs.
Here tables are counted on all cores, predictors on one. Prints two tables.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from bench_analyze import drawn, seconds
from hydra import compose, initialize_config_dir
from machine import describe

from analysis.routing.everything import Passes, Settings, analyze_in
from analysis.routing.shares import Shares
from prefetch import config
from prefetch.artifacts import Store
from prefetch.cluster.mapping import Cluster, Dask
from prefetch.config import Config
from prefetch.predict.markov import Markov
from prefetch.predict.part import whole
from prefetch.sim.tables import grid
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.sweep import Kept, run_all
from prefetch.trace.parquet import TraceReader

ROUNDS = 3
EMPTY = 200  # shards that do nothing
GRID = (
    "source=synthetic", "source.n_requests=400", "source.prompt_tokens=16", "source.new_tokens=240",
    "source.n_layers=26", "source.n_experts=64", "source.top_k=4", "simulator.model_card=deepseek_v2_lite",
    "evaluate.policies=[lru,fifo,lfu,sieve,s3fifo,arc]", "evaluate.capacities=[0.1,0.2,0.3,0.4,0.5,0.6]",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Weighed(Cluster):
    """Notes what came back."""

    n_bytes: int = 0
    n_shards_run: int = 0

    def map(self, *given: Any, **told: Any) -> Iterator[tuple[int, Any]]:
        for place, result in super().map(*given, **told):
            self.n_bytes += len(result) if isinstance(result, bytes) else 0
            self.n_shards_run += 1
            yield place, result


def overhead(folder: Path, workers: int) -> Weighed:
    cluster = Weighed(Dask(workers=workers), folder / "cluster")
    started = seconds(lambda: cluster.n_shards(1))
    names = [str(i) for i in range(EMPTY)]
    work = _by_value()
    first, *later = (
        seconds(lambda: list(cluster.map(work, range(EMPTY), title="", names=names)))
        for _ in range(ROUNDS)
    )
    print(f"| {workers} local processes | |\n|---|---|")
    print(f"| to start them, s | {started:.1f} |")
    print(f"| a shard that does nothing, ms | {1e3 * np.median(later) / EMPTY:.1f} |")
    print(
        f"| ... the first {EMPTY}, imports of the workers in them, ms | {1e3 * first / EMPTY:.1f} |"
    )
    return cluster


def _by_value() -> Callable[[Any, Any], None]:
    """A script is no module that a worker has."""

    def nothing(state: Any, item: Any) -> None:
        """A shard."""

    return nothing


def fitted(reader: TraceReader, cluster: Cluster | None) -> None:
    part = whole(reader)
    Markov((1, 4)).fit(dataclasses.replace(part, cluster=cluster), part)


def compare(folder: Path, cluster: Weighed, choices: float) -> None:
    small, large = drawn(folder / "small", 1e6), drawn(folder / "large", choices)
    ways: dict[str, Callable[[TraceReader, Cluster | None], object]] = {
        "every table": lambda reader, over: analyze_in(
            Passes(reader) if over is None else Shares(trace=reader, cluster=over), Settings()
        ),
        "markov, horizons 1 and 4": fitted,
    }
    print(
        f"\n| {choices:.0e} choices | here, s | on workers, s | here / workers, median [min..max] | shards "
        "| MB of results |"
    )
    print("|---|---|---|---|---|---|")
    for name, way in ways.items():
        for over in (None, cluster):
            way(small, over)
        before = (cluster.n_shards_run, cluster.n_bytes)
        pairs = [(partial(way, large, None), partial(way, large, cluster)) for _ in range(ROUNDS)]
        taken = np.array([[seconds(one) for one in pair] for pair in pairs])
        here, there = np.median(taken, axis=0)
        ratio = taken[:, 0] / taken[:, 1]
        shards, n_bytes = cluster.n_shards_run - before[0], cluster.n_bytes - before[1]
        print(
            f"| {name} | {here:.1f} | {there:.1f} | {np.median(ratio):.2f} [{ratio.min():.2f}..{ratio.max():.2f}] "
            f"| {shards // ROUNDS} | {n_bytes / ROUNDS / 1e6:.0f} |",
            flush=True,
        )


def compare_grid(folder: Path, cluster: Cluster) -> None:
    """Policies and sizes without guesses; engines are compiled by the first round, which is not shown."""
    words = [f"store={folder / 'store'}", "predictor=none", *GRID]
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = cast(Config, compose("config", overrides=words))
    times, cells, bench = [], list[Cell](), Bench(cfg, Store(cfg.store, makers=cfg.makers))
    for number in range(ROUNDS + 1):
        pair = []
        for over in (None, cluster):
            bench = Bench(cfg, Store(cfg.store, makers=cfg.makers))  # which keeps its bounds
            cells = [cell for cell in grid.cells(bench) if isinstance(cell, Cell)]
            jobs, kept = (
                [bench.job(cell) for cell in cells],
                Kept(folder / f"{number}-{over is None}"),
            )
            pair.append(seconds(partial(run_all, jobs, kept, cluster=over)))
        times.append(pair)
    taken = np.array(times[1:])
    ratio = taken[:, 0] / taken[:, 1]
    here, there = np.median(taken, axis=0)
    print(
        f"| {len(cells)} cells, {bench.work.n_accesses:.0e} accesses each | {here:.1f} | {there:.1f} "
        f"| {np.median(ratio):.2f} [{ratio.min():.2f}..{ratio.max():.2f}] | {len(cells)} | 0 |"
    )


def main(choices: float, workers: int) -> None:
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        cluster = overhead(folder, workers)
        compare(folder, cluster, choices)
        compare_grid(folder, cluster)
        cluster.close()
        print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main(
        *(
            kind(word)
            for kind, word in zip(
                (float, int), (sys.argv[1:] + ["1e8", "2"][len(sys.argv) - 1 :]), strict=True
            )
        )
    )
