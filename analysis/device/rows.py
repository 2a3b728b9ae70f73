"""A diagnosis for programs: rows of its tables, `findings.json`, `metrics.json`. It computes shares alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.device.diagnosis import Diagnosis
from analysis.device.efficiency import efficiency_of
from analysis.device.findings import ANOMALY, BOTTLENECK, worst_efficiency
from analysis.device.operations import Operation


def rates(op: Operation) -> tuple[float, float]:
    """TFLOP/s and TB/s: total work over total time."""
    assert op.cost is not None
    return op.cost.flops / op.mean_ns / 1e3, op.cost.n_bytes / op.mean_ns / 1e3


def to_json(found: Diagnosis) -> dict[str, Any]:
    """All of it but the tables, which stand beside it."""
    times = None if found.times is None else {**asdict(found.times), **_shares(found)}
    return {
        "status": found.status,
        "source": found.source,
        "times": times,
        "moe_layers": found.n_layers,
        "moe_layers_told_by": found.layers_told_by,
        "moe_calls": found.n_calls,
        "hardware": found.peaks.name if found.peaks else None,
        "operations": [operation_row(op, found.moe_ns) for op in found.operations],
        "findings": [asdict(one) for one in found.findings],
        "recommendations": [asdict(one) for one in found.recommendations],
        "efficiency": asdict(efficiency_of(found.operations, found.peaks)),
        "imbalance": [{**asdict(one), "cost_ns": one.cost_ns} for one in found.imbalances],
        "looks_like_moe": {name: took / 1e3 for name, took in found.hinted.items()},
        "doubts": list(found.doubts),
        "notes": list(found.notes),
    }


def _shares(found: Diagnosis) -> dict[str, float]:
    times = found.times
    assert times is not None
    return {
        "moe_share_of_kernel_time": times.of_kernel_time,
        "moe_share_of_busy_time": times.of_busy_time,
        "moe_share_of_elapsed_time": times.of_elapsed_time,
    }


def operation_row(op: Operation, moe_ns: int) -> dict[str, Any]:
    """Flat: a row of `operations.csv`."""
    cost, judged, shape = op.cost, op.judged, op.shape
    tflops, tbs = rates(op) if cost and op.time_ns else (None, None)
    return {
        "operation": op.name, "role": op.role, "library": op.library, "found_by": op.told_by, "calls": op.calls,
        "time_us": op.time_ns / 1e3, "mean_us": op.mean_ns / 1e3, "share_of_moe": op.time_ns / max(1, moe_ns),
        "kernels": len(op.kernels), "kernel": next(iter(op.kernels), ""), "args": op.args,
        "tokens": shape.tokens, "hidden": shape.hidden, "inner": shape.inner, "experts": shape.experts,
        "top_k": shape.top_k, "gated": shape.gated, "weight": shape.weight, "activation": shape.activation,
        "scale_bytes": shape.scale_bytes,
        "gflop": cost.flops / 1e9 if cost else None, "mib": cost.n_bytes / 2**20 if cost else None,
        "flops_per_byte": cost.flops / cost.n_bytes if cost and cost.n_bytes else None,
        "tflop_s": tflops, "tb_s": tbs, "active_experts": cost.active_experts if cost else None,
        "is_exact": op.is_exact, "arithmetic": judged.ran_in if judged else None,
        "bound": judged.bound if judged else None, "roofline_us": judged.roofline_ns / 1e3 if judged else None,
        "of_roofline": judged.efficiency if judged else None, "efficiency": op.efficiency,
        "anomaly": op.anomaly, "not_modelled_because": op.why_not,
        "assumptions": "; ".join(op.assumptions), "modules": "; ".join(op.modules),
    }  # fmt: skip


def metrics(found: Diagnosis) -> dict[str, float]:
    """Flat, finite numbers only."""
    numbers: dict[str, float | None] = {
        "moe_kernel_time_us": found.moe_ns / 1e3,
        "moe_layers": found.n_layers,
        "moe_calls": found.n_calls,
        "moe_modelled_time_us": found.modelled_ns / 1e3,
        "worst_efficiency": worst_efficiency(found.operations),
        "findings": sum(one.kind == BOTTLENECK for one in found.findings),
        "anomalies": sum(one.kind == ANOMALY for one in found.findings),
        "recommendations": len(found.recommendations),
        "moe_kernels": sum(count for op in found.operations for count, _ in op.kernels.values()),
        **_of_time(found),
    }
    used = efficiency_of(found.operations, found.peaks)
    numbers |= {"flops_utilisation": used.flops_utilisation, "resident_use": used.resident_use}
    for one in found.imbalances:
        numbers[f"imbalance_cost_us_{one.ranks}_ranks"] = one.cost_ns / 1e3
    if found.routing is not None:
        numbers["active_experts"] = found.routing.active
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _of_time(found: Diagnosis) -> dict[str, float | None]:
    times = found.times
    if times is not None:
        return {
            "kernel_time_us": times.kernel_ns / 1e3,
            "kernels": times.n_kernels,
            **_shares(found),
        }
    share = found.moe_ns / 1e6 / found.total_ms if found.total_ms else None
    return {"moe_share_of_elapsed_time": share}
