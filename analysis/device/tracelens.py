"""Reads the tables that TraceLens writes, of both its eras, as the same operations that a trace gives.

An output folder holds `category_data/moe_fused_ops.csv` (and `moe_unfused_ops.csv`) and `metadata/`; a single table of
its report may stand alone. It trusts their times, and their operations and bytes only where no shape is told.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.device.names import Found, Names
from analysis.device.operations import Active, Operation, judged
from analysis.device.roofline import Cost, Peaks
from analysis.device.shapes import CARD, PROFILE, Known, Shape, shape_of
from prefetch.errors import FormatError, reading

CATEGORIES = ("moe_fused", "moe_unfused")
TIME = "Kernel Time (µs)_sum"
CALLS = ("operation_count", "count", "name_count")
MIB = 2**20
NUMBERS = {
    "num_tokens": "tokens", "hidden_dim": "hidden", "inter_dim": "inner", "num_experts": "experts", "topk": "top_k",
}  # fmt: skip
NO_CHAINS: Mapping[str, tuple[str, ...]] = {}
GUESSED = "assumed by TraceLens: the hidden size"


@dataclass(frozen=True)
class TraceLensOutput:
    """`total_ms` is elapsed time with idle, as its `percent_of_compute` divides by it."""

    folder: Path
    operations: list[Operation]
    total_ms: float | None
    peaks: Peaks | None
    metadata: Mapping[str, Any] = field(hash=False)
    has_tables: bool = True


def is_output(path: Path) -> bool:
    return path.is_dir() and ((path / "category_data").is_dir() or (path / "metadata").is_dir())


def read_output(
    folder: Path, known: Known, peaks: Peaks | None = None, active: Active | None = None
) -> TraceLensOutput:
    """Tables that are missing mean that no MoE was found; metadata that are missing are an error."""
    tables = {name: folder / "category_data" / f"{name}_ops.csv" for name in CATEGORIES}
    there = {name: path for name, path in tables.items() if path.is_file()}
    if not there:
        return TraceLensOutput(folder, [], None, peaks, {}, has_tables=False)
    metadata = _metadata(folder, next(iter(there)))
    peaks = peaks or _peaks(metadata)
    found = [
        op
        for name, path in there.items()
        for op in read_table(path, known, peaks, active, _chains(folder, name))
    ]
    gpu = metadata.get("gpu_utilization")
    total = gpu.get("total_time_ms") if isinstance(gpu, dict) else None
    total_ms = float(total) if isinstance(total, (int, float)) else None
    return TraceLensOutput(folder, _longest_first(found), total_ms, peaks, metadata)


def _longest_first(found: Sequence[Operation]) -> list[Operation]:
    return sorted(found, key=lambda operation: -operation.time_ns)


def _chains(folder: Path, category: str) -> dict[str, tuple[str, ...]]:
    """Who called each operation, by its id: of the older era, and often empty or not there."""
    path = folder / "category_data" / f"{category}_tree_data.json"
    if not path.is_file():
        return {}
    with reading(path, "JSON of operations by their id"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise FormatError(f"expected a mapping of ids, found {type(found).__name__}")
    chains = {
        uid: node.get("parent_chain") for uid, node in found.items() if isinstance(node, dict)
    }
    return {str(uid): _called_by(chain) for uid, chain in chains.items() if isinstance(chain, list)}


def _called_by(chain: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(one.get("name", one) if isinstance(one, dict) else one) for one in chain)


def _metadata(folder: Path, category: str) -> dict[str, Any]:
    path = folder / "metadata" / f"{category}_metadata.json"
    if not path.is_file():
        raise FormatError(
            f"{path}: is missing; a TraceLens folder has it beside category_data, with the hardware's peaks"
        )
    with reading(path, "JSON with the hardware's peaks"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise FormatError(f"expected a mapping, found {type(found).__name__}")
    return found


def _peaks(metadata: Mapping[str, Any]) -> Peaks | None:
    """HEAD gives rates by `matrix_TYPE`; the older tables one rate, of bf16."""
    bandwidth = metadata.get("peak_hbm_bw_tbs")
    rates = metadata.get("max_achievable_tflops")
    if isinstance(rates, dict):
        table = {
            name.removeprefix("matrix_"): float(rate) * 1e12
            for name, rate in rates.items()
            if name.startswith("matrix_") and rate
        }
    else:
        rate = metadata.get("peak_bf16_maf_tflops")
        table = {"bf16": float(rate) * 1e12} if rate else {}
    if not bandwidth or not table:
        return None
    name = str(metadata.get("platform", "TraceLens platform"))
    return Peaks(name, float(bandwidth) * 1e12, table, "TraceLens metadata")


def read_table(
    path: Path,
    known: Known,
    peaks: Peaks | None,
    active: Active | None = None,
    chains: Mapping[str, tuple[str, ...]] = NO_CHAINS,
) -> list[Operation]:
    """A row is an operation with its arguments; only its name and its kernel time are needed."""
    with reading(path, "a table of TraceLens"):
        frame = pd.read_csv(path)
    if missing := [name for name in ("name", TIME) if name not in frame]:
        raise FormatError(
            f"{path}: expected the columns name and {TIME!r}; {missing[0]!r} is missing"
        )
    rows = frame.to_dict("records")
    found = [
        _operation(row, known, peaks, active, f"{path}, row {i + 2}") for i, row in enumerate(rows)
    ]
    called = [chains.get(str(row.get("ex_UID")), ()) for row in rows]
    return [
        replace(op, modules=(*op.modules, *chain)) for op, chain in zip(found, called, strict=True)
    ]


def _operation(
    row: Mapping[Any, Any], known: Known, peaks: Peaks | None, active: Active | None, where: str
) -> Operation:
    name, took_us = str(row["name"]), row[TIME]
    if not isinstance(took_us, (int, float)) or not took_us >= 0:
        raise FormatError(f"{where}: expected a kernel time of at least 0 µs, found {took_us!r}")
    found = known.names.find("operations", name)
    kernels = _kernels(row)
    role = found.role if found and found.role != "layer" else _role(kernels, known.names)
    base = Operation(
        name=name, role=role, library=found.rule.library if found else "unknown", told_by="operation",
        calls=max(1, int(next((row[c] for c in CALLS if _number(row.get(c)) is not None), 1))),
        time_ns=round(took_us * 1000), kernels=kernels, shape=_shape(row, known, found, kernels),
        args=_text(row.get("Input Dims", row.get("Input Dims_first"))),
        modules=tuple(part for part in (_text(row.get("entry_point")),) if part),
    )  # fmt: skip
    done = judged(base, peaks, active)
    told = _told_cost(row) if not done.is_modelled else None
    return judged(base, peaks, None, told) if told is not None else done


def _role(kernels: Mapping[str, Any], names: Names) -> str:
    found = [f.role for kernel in kernels if (f := names.find("kernels", kernel)) is not None]
    return found[0] if found else "other"


def _told_cost(row: Mapping[Any, Any]) -> Cost | None:
    gflops = _number(row.get("GFLOPS", row.get("GFLOPS_first")))
    mib = _number(row.get("Data Moved (MB)", row.get("Data Moved (MB)_first")))
    if gflops is None or mib is None:
        return None
    spec = _text(row.get("Compute Spec")).removeprefix("matrix_").removeprefix("vector_")
    return Cost(gflops * 1e9, mib * MIB, spec or "bf16")


def _shape(
    row: Mapping[Any, Any], known: Known, found: Found | None, kernels: Mapping[str, Any]
) -> Shape:
    """`perf_params`, or its columns `param: ...`; else the dimensions of the call."""
    params = _params(row)
    said = next(
        (f.said for kernel in kernels if (f := known.names.find("kernels", kernel)) and f.said), {}
    )
    if not params:
        inputs = {"Input Dims": _nested(row.get("Input Dims", row.get("Input Dims_first")))}
        inputs["Input type"] = _nested(row.get("Input type", row.get("Input type_first")))
        return shape_of(known, found.rule if found else None, inputs, said)
    values: dict[str, Any] = {
        ours: int(params[theirs]) for theirs, ours in NUMBERS.items() if _number(params.get(theirs))
    }
    if "gated" in params:
        values["gated"] = str(params["gated"]) == "True"
    sources = dict.fromkeys(values, PROFILE)
    if values.get("inner") is not None and values["inner"] == values.get("hidden"):
        sources["inner"] = GUESSED
        if known.card is not None and known.given.inner is None:
            values["inner"], sources["inner"] = known.card.expert_size, CARD
    kinds = known.names
    values["weight"] = (
        kinds.type_of(said.get("weight") or _text(params.get("weight_dtype"))) or "bf16"
    )
    values["activation"] = kinds.type_of(_text(params.get("input_dtype"))) or "bf16"
    values["output"] = values["activation"]
    return Shape(**values, sources=sources)


def _params(row: Mapping[Any, Any]) -> dict[str, Any]:
    told = _nested(row.get("perf_params"))
    if isinstance(told, dict):
        return told
    prefix = "param: "
    return {
        str(name).removeprefix(prefix): value
        for name, value in row.items()
        if str(name).startswith(prefix) and not pd.isna(value)
    }


def _kernels(row: Mapping[Any, Any]) -> dict[str, tuple[int, int]]:
    names = (
        "kernel_details_summary",
        "kernel_details__summarize_kernel_stats",
        "trunc_kernel_details",
    )
    told = next((t for name in names if isinstance(t := _nested(row.get(name)), list)), [])
    return {
        str(kernel.get("name")): (
            int(kernel.get("count", 0)),
            round(1000 * kernel.get("total_duration_us", 0)),
        )
        for kernel in told
        if isinstance(kernel, dict)
    }


def _nested(value: Any) -> Any:
    """A printed Python value, with NumPy's wrappers taken off; None where it is none."""
    if not isinstance(value, str):
        return None
    try:
        return ast.literal_eval(re.sub(r"np\.\w+\(([^()]*)\)", r"\1", value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if pd.isna(number) else number


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
