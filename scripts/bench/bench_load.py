"""Every stage on drawn traces of 10^6 to 10^9 choices: seconds, CPU seconds, peak memory, and how they grow.

    python scripts/bench/bench_load.py [FOLDER] [--sizes 1e6 1e7]        default sizes, in a temporary folder
    python scripts/bench/bench_load.py FOLDER --sizes 1e6 1e7 1e8 1e9    what the docs quote: 6 GB on disk, 7 in memory

32 layers of 64 experts, k = 8; requests of 50 prompt and 75 generated tokens; experts as large as OLMoE's. A row per
stage and size is kept in FOLDER/rows.csv, and what stands there is not measured again. A stage is a process of its own,
one at a time: CPU seconds are its user and system time on all cores, the peak is its largest resident size. Every stage
runs on ten requests first, uncounted, so that compilation is paid.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[2]
PROMPT, NEW, LAYERS, EXPERTS, TOP_K = 50, 75, 32, 64, 8
PER_REQUEST = (PROMPT + NEW) * LAYERS * TOP_K
SOURCE = (
    f"source=synthetic source.prompt_tokens={PROMPT} source.new_tokens={NEW} source.n_layers={LAYERS} "
    f"source.n_experts={EXPERTS} source.top_k={TOP_K}"
).split()
# one predictor and one fold of five, as much as `evaluate` asks for
STAGES = {
    "collect": ("stage=collect",),
    "describe": ("stage=traces", "traces.do=describe"),
    "check": ("stage=traces", "traces.do=check"),
    "analyze": ("stage=analyze",),
    "train": ("stage=train", "predictor=markov", "train.folds=1", "train.baselines=none"),
    "evaluate": ("stage=evaluate", "predictor=markov", "simulator.model_card=olmoe_1b_7b"),
}
MAKES = ("collect", "train")  # what later stages find in the store
WARM_UP = 10  # requests


@dataclass(frozen=True)
class Row:
    stage: str
    choices: int
    tokens: int
    wall_s: float
    cpu_s: float
    peak_mb: float  # of 2^20 bytes, as the docs say of all peaks
    stored_mb: float  # what the stage added to the store
    machine: str


class Size:
    """A trace of so many requests, its store, and the runs on it."""

    def __init__(self, folder: Path, requests: int) -> None:
        self.folder, self.requests = folder / f"requests-{requests}", requests
        self.choices = requests * PER_REQUEST

    def ran(self, stage: str) -> bool:
        """Was it begun, at least?"""
        return (self.folder / "out" / stage).exists()

    def run(self, stage: str) -> Row:
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        before, log = self._stored_mb(), self.folder / "logs" / f"{stage}.txt"
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                self._command(stage), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        if status:
            process.returncode = os.waitstatus_to_exitcode(status)
            raise SystemExit(f"{stage}, {self.choices:.0e} choices: {log.read_text()[-2000:]}")
        cpu_s = usage.ru_utime + usage.ru_stime
        peak_mb = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        stored, tokens = self._stored_mb() - before, self.requests * (PROMPT + NEW)
        return Row(stage, self.choices, tokens, wall_s, cpu_s, peak_mb, stored, describe())

    def _command(self, stage: str) -> list[str]:
        entry, store = str(ROOT / "scripts" / "run.py"), self.folder / "store"
        source = [*SOURCE, f"source.n_requests={self.requests}"]
        if stage == "check":
            (trace,) = (store / "trace").glob("[!.]*")
            source = [f"trace={trace}"]
        where = [f"store={store}", f"hydra.run.dir={self.folder / 'out' / stage}", "tracker=none"]
        return [sys.executable, entry, *STAGES[stage], *source, *where]

    def _stored_mb(self) -> float:
        store = self.folder / "store"
        return sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 1e6

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def measured(size: Size, known: set[tuple[str, int]]) -> Iterator[Row]:
    """Rows that are not there yet. A stage that was interrupted would find what it had made: then all is made anew."""
    todo = [stage for stage in STAGES if (stage, size.choices) not in known]
    if any(size.ran(stage) for stage in todo):
        size.remove()
    for stage in STAGES if todo else ():
        if stage in todo:
            yield size.run(stage)
        elif stage in MAKES and not size.ran(stage):
            size.run(stage)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    kinds = {
        field.name: {"str": str, "int": int, "float": float}[str(field.type)]
        for field in fields(Row)
    }
    with path.open(newline="") as file:
        return [
            Row(**{name: kinds[name](one[name]) for name in kinds}) for one in csv.DictReader(file)
        ]


def append(path: Path, row: Row) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def show(rows: list[Row]) -> None:
    """By stage and size, with what each further choice costs since the size before: constant is linear growth."""
    for machine in sorted({row.machine for row in rows}):
        print(machine)
    print(
        "| stage | choices | s | CPU s | CPU ms per further 10^6 | peak MB | bytes per further choice | stored MB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for stage in STAGES:
        before: Row | None = None
        for row in sorted((row for row in rows if row.stage == stage), key=lambda row: row.choices):
            costs, holds = _further(row, before) if before else ("", "")
            print(
                f"| {stage} | {row.choices:.3g} | {row.wall_s:.1f} | {row.cpu_s:.1f} | {costs} | {row.peak_mb:,.0f} | "
                f"{holds} | {row.stored_mb:,.0f} |"
            )
            before = row


def _further(row: Row, before: Row) -> tuple[str, str]:
    more = row.choices - before.choices
    costs_ms = 1e3 * (row.cpu_s - before.cpu_s) / (more / 1e6)
    return f"{costs_ms:.0f}", f"{(row.peak_mb - before.peak_mb) * 2**20 / more:.1f}"


def main(folder: Path, sizes: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.csv"
    known = {(row.stage, row.choices) for row in read(path)}
    wanted = [Size(folder, max(WARM_UP, round(size / PER_REQUEST))) for size in sizes]
    if any((stage, size.choices) not in known for size in wanted for stage in STAGES):
        warm = Size(folder, WARM_UP)
        warm.remove()
        for stage in STAGES:
            warm.run(stage)
        warm.remove()
    for size in wanted:
        for row in measured(size, known):
            append(path, row)
            print(row, flush=True)
        size.remove()
    show(read(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where rows are kept")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7], help="choices")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main((asked.folder or Path(temporary)).resolve(), asked.sizes)
