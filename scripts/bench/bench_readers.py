"""Reading a server's log: our scanner against the way the seed's scripts read it, interleaved in the same process.

    python scripts/bench/bench_readers.py [megabytes]        default 50

The peer reads the log with pandas, splits the id column, and turns every row into integers (the approach of
okuvshynov/llama.cpp, branch log_experts, scripts/moe-analysis/expert_frequency.py; written anew). Ours reads the
bytes, makes the rows, and puts passes and tokens together, which the peer does not do.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from machine import describe

from prefetch.sources.llama_passes import ids_of
from prefetch.sources.llama_server import read_log
from prefetch.sources.textscan import parse_rows, read_text

LAYERS, EXPERTS, TOP_K = 40, 160, 8
ROUNDS = 5


def write_log(path: Path, n_bytes: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.random((20_000, EXPERTS)).argsort(axis=1)[:, :TOP_K].astype(str)
    tails = [" ".join(row) for row in ids]
    with path.open("w") as file:
        file.write("layer_id,expert_ids\n")
        token = 0
        while file.tell() < n_bytes:
            token += 1
            file.writelines(
                f"{layer},{tails[(token * 7 + layer) % len(tails)]}\n" for layer in range(LAYERS)
            )


def ours(path: Path) -> np.ndarray:
    log = read_log(path, parse_rows(path, read_text(path), word="gate_input"))
    return np.bincount(ids_of(log, EXPERTS).ravel(), minlength=EXPERTS)[:EXPERTS]


def peer(path: Path) -> np.ndarray:
    frame = pd.read_csv(path)
    frame["ids"] = (
        frame["expert_ids"].str.split(" ").apply(lambda parts: [int(part) for part in parts])
    )
    counts = np.zeros(EXPERTS, np.int64)
    for layer_rows in frame.groupby("layer_id")["ids"]:
        for row in layer_rows[1]:
            for expert in row:
                counts[expert] += 1
    return counts


def seconds(read, path: Path) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    result = read(path)
    return time.perf_counter() - started, result


def main() -> None:
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moe_expert_selection.log"
        write_log(path, int(megabytes * 1e6))
        ours(path)  # compiles
        fast, slow, ratios = [], [], []
        for _ in range(ROUNDS):
            a, counts = seconds(ours, path)
            b, expected = seconds(peer, path)
            assert (counts == expected).all(), "both must count the same"
            fast.append(a)
            slow.append(b)
            ratios.append(b / a)
        size = path.stat().st_size / 1e6
    print(describe())
    print("| log MB | ours s | MB/s | pandas-split s | ratio median [min..max] of rounds |")
    print("|---|---|---|---|---|")
    print(
        f"| {size:.0f} | {median(fast):.2f} | {size / median(fast):.0f} | {median(slow):.1f} | "
        f"{median(ratios):.0f} [{min(ratios):.0f}..{max(ratios):.0f}] |"
    )


if __name__ == "__main__":
    main()
