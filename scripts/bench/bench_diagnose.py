"""Reading a large profile: CPU seconds and peak memory of ours, and of the standard library's JSON reader on it.

    python scripts/bench/bench_diagnose.py [--profile trace.json] [--mb 300]

Each row runs in a process of its own, so that its peak is its own. Without a profile one is made up: an eager run with
Python frames, as torch.profiler writes it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[2]
OURS = """
from analysis.device.diagnosis import read
from analysis.device.names import load_names
from pathlib import Path
names = load_names()
def work(path):
    found = read(Path(path), names)
    return found.trace.n_events
"""
STANDARD = """
import json
def work(path):
    with open(path) as file:
        return len(json.load(file)["traceEvents"])
"""
MEASURE = """
import resource, sys, time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
events = work(sys.argv[1])
took, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(events, took, before / 1024, peak / 1024)
"""
FRAMES = 12  # Python frames to each operation


def made_up(path: Path, megabytes: int) -> None:
    """Layers of one MoE operation with two kernels each, among frames that say nothing."""
    with path.open("w") as file:
        file.write('{"schemaVersion": 1, "traceEvents": [\n')
        number = 0
        while file.tell() < megabytes * 1_000_000:
            number += 1
            events = _layer(number)
            file.write(
                ("" if number == 1 else ",\n") + ",\n".join(json.dumps(e, indent=1) for e in events)
            )
        file.write("]}")


def _layer(number: int) -> list[dict[str, object]]:
    at = 100.0 * number
    dims = {"Input Dims": [[8, 64], [8, 16], []], "Input type": ["c10::BFloat16"] * 2 + [""]}
    frame = "torch/nn/modules/module.py(1773): _call_impl"
    frames = [
        _event("python_function", frame, at + i, 50.0, {"Python id": i}) for i in range(FRAMES)
    ]
    moe = _event("cpu_op", "vllm::moe_forward", at + 20, 20.0, dims)
    pairs: list[dict[str, object]] = []
    for i in range(2):
        args = {"correlation": 2 * number + i, "stream": 7, "device": 0}
        pairs.append(_event("cuda_runtime", "cudaLaunchKernel", at + 25, 1.0, args))
        pairs.append(_event("kernel", f"bmm_{i}", at + 30 + 9 * i, 8.0, args))
    return [*frames, moe, *pairs]


def _event(
    category: str, name: str, ts: float, dur: float, args: dict[str, object]
) -> dict[str, object]:
    who = {"ph": "X", "pid": 1, "tid": 1}
    return {**who, "cat": category, "name": name, "ts": ts, "dur": dur, "args": args}


def measured(code: str, path: Path) -> list[float]:
    command = [sys.executable, "-c", code + MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--mb", type=int, default=300)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.profile or Path(folder) / "profile.json"
        if asked.profile is None:
            made_up(path, asked.mb)
        print(f"{describe()}; {path.stat().st_size / 1e6:,.0f} MB")
        print("reader               events    CPU s  MiB before  MiB at most")
        for name, code in (("ours, attributed", OURS), ("json.load", STANDARD)):
            events, took, before, peak = measured(code, path.resolve())
            print(f"{name:18} {events:9,.0f} {took:8.1f} {before:11,.0f} {peak:12,.0f}")


if __name__ == "__main__":
    main()
