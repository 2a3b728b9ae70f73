"""Small profiler traces that tests write themselves, and the real ones where they lie beside the project."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefetch.config import CONFIGS
from prefetch.sim.hardware import Hardware, hardware

REAL = Path(__file__).resolve().parents[2] / "shared" / "profiles"  # never copied into the project
Event = dict[str, Any]


def shipped_hardware(name: str) -> Hardware:
    leaf = yaml.safe_load((CONFIGS / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    return hardware(**{key: value for key, value in leaf.items() if key != "_target_"})


def real(name: str) -> Path:
    """One of the profiles of AMD-AGI/TraceLens at 171dd747."""
    path = REAL / name
    if not path.exists():
        pytest.skip("the real profiles are not beside the project")
    return path


def span(category: str, name: str, ts: float, dur: float, **args: Any) -> Event:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": 1,
        "ts": ts,
        "dur": dur,
        "args": args,
    }


def operation(
    name: str, ts: float, dur: float, dims: Any = None, types: Any = None, **args: Any
) -> Event:
    told = (
        {"Input Dims": dims, "Input type": types or ["c10::BFloat16"] * len(dims)} if dims else {}
    )
    return span("cpu_op", name, ts, dur, **told, **args)


def module(name: str, ts: float, dur: float) -> Event:
    return span("python_function", f"nn.Module: {name}", ts, dur)


def launched(
    number: int, name: str, at: float, ts: float, dur: float, *, by: str = "cudaLaunchKernel"
) -> list[Event]:
    """A kernel and the call that launched it."""
    kernel = span("kernel", name, ts, dur, device=0, stream=7, correlation=number)
    return [span("cuda_runtime", by, at, 1.0, correlation=number), {**kernel, "pid": 0, "tid": 7}]


def written(
    folder: Path, events: Sequence[Mapping[str, Any]], name: str = "trace.json", **meta: Any
) -> Path:
    path, text = folder / name, json.dumps({**meta, "traceEvents": list(events)})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
