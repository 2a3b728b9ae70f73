"""Reads the tables that TraceLens writes, of both its eras, as the same operations that a trace gives.

An output folder holds `category_data/moe_fused_ops.csv` (and `moe_unfused_ops.csv`) and `metadata/`; a single table of
its report may stand alone. It trusts their times, and their operations and bytes only where no shape is told. Tables of
other categories are looked through as well: TraceLens files MoE operations there whose names it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.device.names import Found, Names
from analysis.device.operations import Active, Operation, judged
from analysis.device.roofline import Cost, Peaks
from analysis.device.shapes import CARD, LARGEST, PROFILE, Known, Shape, shape_of
from analysis.device.tracelens_cells import nested, number, text, text_of_id
from prefetch.errors import FormatError, reading

CATEGORIES = ("moe_fused", "moe_unfused")
TIME = "Kernel Time (µs)_sum"
CALLS = ("operation_count", "count", "name_count")
MIB = 2**20
MOST_RATE = 1e9  # of a device, in 1e12 a second
MOST_US = 1e12  # of one operation: eleven days
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
    tables = sorted((folder / "category_data").glob("*_ops.csv"))
    mine = {name: path for path in tables if (name := path.stem.removesuffix("_ops")) in CATEGORIES}
    metadata = _metadata(folder, next(iter(mine))) if mine else {}
    peaks = peaks or _peaks(metadata, folder)
    found = [
        op
        for name, path in mine.items()
        for op in read_table(path, known, peaks, active, _chains(folder, name))
    ]
    for path in (path for path in tables if path not in mine.values()):
        found += read_table(path, known, peaks, active, only_moe=True)
    gpu = metadata.get("gpu_utilization")
    total = number(gpu.get("total_time_ms")) if isinstance(gpu, dict) else None
    total_ms = total if total is not None and total > 0 else None
    ordered = _longest_first(found)
    return TraceLensOutput(folder, ordered, total_ms, peaks, metadata, has_tables=bool(mine))


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


def _peaks(metadata: Mapping[str, Any], folder: Path) -> Peaks | None:
    """HEAD gives rates by `matrix_TYPE`; the older tables one rate, of bf16."""
    told = metadata.get(
        "max_achievable_tflops", {"matrix_bf16": metadata.get("peak_bf16_maf_tflops")}
    )
    rates = told if isinstance(told, dict) else {"max_achievable_tflops": told}
    table = {
        name.removeprefix("matrix_"): _rate(rate, name, folder) * 1e12
        for name, rate in rates.items()
        if rate is not None and not name.startswith("vector_")
    }
    bandwidth = metadata.get("peak_hbm_bw_tbs")
    if bandwidth is None or not table:
        return None
    name = str(metadata.get("platform", "TraceLens platform"))
    bytes_per_s = _rate(bandwidth, "peak_hbm_bw_tbs", folder) * 1e12
    return Peaks(name, bytes_per_s, table, "TraceLens metadata")


def _rate(value: Any, name: str, folder: Path) -> float:
    rate = number(value)
    if rate is None or not 0 < rate < MOST_RATE or isinstance(value, bool):
        raise FormatError(
            f"{folder / 'metadata'}: {name}: expected a number over 0 and below {MOST_RATE:.0e}, found {value!r}"
        )
    return rate


def read_table(
    path: Path,
    known: Known,
    peaks: Peaks | None,
    active: Active | None = None,
    chains: Mapping[str, tuple[str, ...]] = NO_CHAINS,
    *,
    only_moe: bool = False,
) -> list[Operation]:
    """A row is an operation with its arguments; only its name and its kernel time are needed."""
    found = []
    for place, row in enumerate(_rows(path, is_needed=not only_moe)):
        if only_moe and not _is_moe(row, known.names):
            continue
        op = _operation(row, known, peaks, active, f"{path}, row {place + 2}")
        called = chains.get(text_of_id(row.get("ex_UID")), ())
        found.append(replace(op, modules=(*op.modules, *called)))
    return found


def _rows(path: Path, *, is_needed: bool) -> list[dict[Any, Any]]:
    with reading(path, "a table of TraceLens"):
        frame = pd.read_csv(path)
    missing = [name for name in ("name", TIME) if name not in frame]
    if missing and is_needed:
        raise FormatError(
            f"{path}: expected the columns name and {TIME!r}; {missing[0]!r} is missing"
        )
    return [] if missing else frame.to_dict("records")


def _is_moe(row: Mapping[Any, Any], names: Names) -> bool:
    """By its own name, or by kernels' names that MoE alone has."""
    found = names.find("operations", str(row["name"]))
    if (found is not None and not found.rule.inside) or names.hint(str(row["name"])):
        return True
    of_kernels = (names.find("kernels", kernel) for kernel in _kernels(row))
    return any(one is not None and not one.rule.inside for one in of_kernels)


def _operation(
    row: Mapping[Any, Any], known: Known, peaks: Peaks | None, active: Active | None, where: str
) -> Operation:
    name, took_us = str(row["name"]), row[TIME]
    if not isinstance(took_us, (int, float)) or not 0 <= took_us < MOST_US:
        raise FormatError(f"{where}: expected a kernel time of at least 0 µs, found {took_us!r}")
    found = known.names.find("operations", name)
    kernels = _kernels(row)
    role = found.role if found and found.role != "layer" else _role(kernels, known.names)
    base = Operation(
        name=name, role=role, library=found.rule.library if found else "unknown", told_by="operation",
        calls=_calls(row),
        time_ns=round(took_us * 1000), kernels=kernels, shape=_shape(row, known, found, kernels),
        args=text(row.get("Input Dims", row.get("Input Dims_first"))),
        modules=tuple(part for part in (text(row.get("entry_point")),) if part),
    )  # fmt: skip
    done = judged(base, peaks, active)
    told = _told_cost(row) if not done.is_modelled else None
    return judged(base, peaks, None, told) if told is not None else done


def _calls(row: Mapping[Any, Any]) -> int:
    told = (number(row.get(name)) for name in CALLS)
    return max(1, int(next((count for count in told if count is not None), 1)))


def _role(kernels: Mapping[str, Any], names: Names) -> str:
    found = [f.role for kernel in kernels if (f := names.find("kernels", kernel)) is not None]
    return found[0] if found else "other"


def _told_cost(row: Mapping[Any, Any]) -> Cost | None:
    gflops = number(row.get("GFLOPS", row.get("GFLOPS_first")))
    mib = number(row.get("Data Moved (MB)", row.get("Data Moved (MB)_first")))
    if gflops is None or mib is None or min(gflops, mib) < 0 or max(gflops, mib) > MOST_RATE**2:
        return None
    spec = text(row.get("Compute Spec")).removeprefix("matrix_").removeprefix("vector_")
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
        inputs = {"Input Dims": nested(row.get("Input Dims", row.get("Input Dims_first")))}
        inputs["Input type"] = nested(row.get("Input type", row.get("Input type_first")))
        return shape_of(known, found.rule if found else None, inputs, said)
    values = _sizes(params)
    if found is not None and found.role == "down":
        values.pop("gated", None)  # there it is told of this product, not of the expert
    sources = dict.fromkeys(values, PROFILE)
    if values.get("inner") is not None and values["inner"] == values.get("hidden"):
        sources["inner"] = GUESSED
        if known.card is not None and known.given.inner is None:
            values["inner"], sources["inner"] = known.card.expert_size, CARD
    type_of = known.names.type_of
    weight = said.get("weight") or text(params.get("weight_dtype"))
    activation = type_of(text(params.get("input_dtype"))) or "bf16"
    values |= {"weight": type_of(weight) or "bf16", "activation": activation, "output": activation}
    return Shape(**values, sources=sources)


def _sizes(params: Mapping[str, Any]) -> dict[str, Any]:
    """What is no size of a tensor is left out: then its cost is not known."""
    told = {ours: number(params.get(theirs)) for theirs, ours in NUMBERS.items()}
    values: dict[str, Any] = {
        name: int(size) for name, size in told.items() if size and 0 < size < LARGEST
    }
    if "gated" in params:
        values["gated"] = str(params["gated"]) == "True"
    return values


def _params(row: Mapping[Any, Any]) -> dict[str, Any]:
    told = nested(row.get("perf_params"))
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
    told = next((t for name in names if isinstance(t := nested(row.get(name)), list)), [])
    return {
        str(kernel.get("name")): (
            int(number(kernel.get("count")) or 0),
            round(1000 * (number(kernel.get("total_duration_us")) or 0)),
        )
        for kernel in told
        if isinstance(kernel, dict)
    }
