"""The files of the category analyzer that this stage serves, by its names and schemas, for whoever reads those.

`category_data/moe_fused_metrics.json` in its three forms (OK, NO_DATA, ERROR) and `category_findings/
moe_fused_findings.md`. An ERROR carries no bottleneck; NO_DATA is written only where nothing looks like MoE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.device.advice import Recommendation
from analysis.device.diagnosis import Diagnosis
from analysis.device.findings import ANOMALY, BOTTLENECK, ERROR, NO_MOE, Finding, band
from analysis.device.operations import Operation
from analysis.device.plain_text import short, shown
from analysis.device.roofline import Peaks
from prefetch.runs.outputs import write_json

CATEGORY, NO_DATA = "moe_fused", "NO_DATA"
METRICS = Path("category_data") / f"{CATEGORY}_metrics.json"
FINDINGS = Path("category_findings") / f"{CATEGORY}_findings.md"
NOT_FOUND = "No MoE operations found in trace - model does not use Mixture of Experts"
SURELY_WRONG = 1.10  # of the roofline: the analyzer's own limit; from 100 % on it warns
TYPES = {"router": "routing", "routing": "routing", "experts": "fused", "layer": "fused"}


def write(found: Diagnosis, folder: Path) -> None:
    _write(folder, metrics_of(found), page_of(found))


def write_error(error: str, folder: Path) -> None:
    metrics = {"category": CATEGORY, "status": ERROR, "error": error}
    why = "No bottleneck is reported: the data were not analysed."
    text = f"# MoE analysis findings\n\n**Status:** ERROR\n\n{shown(error)}\n\n{why}\n"
    _write(folder, metrics, text)


def _write(folder: Path, metrics: dict[str, Any], text: str) -> None:
    for path in (METRICS, FINDINGS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / METRICS, metrics)
    (folder / FINDINGS).write_text(text)


def metrics_of(found: Diagnosis) -> dict[str, Any]:
    if found.status == NO_MOE:
        return {
            "category": CATEGORY, "status": NO_DATA, "message": NOT_FOUND, "total_time_ms": 0,
            "percent_of_compute": 0, "operation_count": 0, "operations": [], "category_specific": {},
        }  # fmt: skip
    total_ms = found.moe_ns / 1e6
    return {
        "category": CATEGORY,
        "status": "OK",
        "total_time_ms": round(total_ms, 3),
        "percent_of_compute": round(100 * total_ms / found.total_ms, 2) if found.total_ms else None,
        "operation_count": len(found.operations),
        "average_efficiency_percent": _average(found.operations),
        "operations": [_operation(op, found.moe_ns) for op in found.operations],
        "category_specific": _peaks(found.peaks),
    }


def _peaks(peaks: Peaks | None) -> dict[str, Any]:
    if peaks is None:
        return {}
    bf16 = peaks.rate("bf16")
    return {
        "peak_maf_tflops": bf16[0] / 1e12 if bf16 else None,
        "peak_hbm_bw_tbs": peaks.bytes_per_s / 1e12,
    }


def _average(operations: Sequence[Operation]) -> float | None:
    """Weighted by time; null where nothing is known."""
    known = [(op.time_ns, op.efficiency) for op in operations if op.efficiency is not None]
    total = sum(time for time, _ in known)
    return round(100 * sum(time * share for time, share in known) / total, 2) if total else None


def _operation(op: Operation, moe_ns: int) -> dict[str, Any]:
    efficiency = _efficiency(op)
    row: dict[str, Any] = {
        "name": op.name,
        "count": op.calls,
        "time_ms": round(op.time_ns / 1e6, 3),
        "percent_of_category": round(100 * op.time_ns / moe_ns, 2) if moe_ns else 0,
        "efficiency": efficiency,
        "classification": {"moe_type": TYPES.get(op.role, "expert")},
    }
    if efficiency["warning"]:
        row["efficiency_warning"] = efficiency["warning"]
    return row


def _efficiency(op: Operation) -> dict[str, Any]:
    judged, cost = op.judged, op.cost
    share = judged.efficiency if judged else None
    warning = None
    if share is not None and share > 1:
        mark = "ANOMALY" if share > SURELY_WRONG else "WARNING"
        warning = f"[{mark}] {share:.1%} of the roofline: {op.anomaly}"
    return {
        "tflops_achieved": cost.flops / op.mean_ns / 1e3 if cost and op.time_ns else None,
        "tb_s_achieved": cost.n_bytes / op.mean_ns / 1e3 if cost and op.time_ns else None,
        "efficiency_percent": None if share is None else round(100 * share, 2),
        "bound_type": judged.bound if judged else None,
        "flops_per_byte": cost.flops / cost.n_bytes if cost and cost.n_bytes else None,
        "compute_spec": f"matrix_{judged.ran_in}" if judged else None,
        "warning": warning,
        "is_anomaly": share is not None and share > SURELY_WRONG,
    }


def page_of(found: Diagnosis) -> str:
    """Operations, then per finding why and what to do, in the analyzer's order of sections."""
    if found.status == NO_MOE:
        return f"# MoE analysis findings\n\n**Status:** {NO_DATA}\n\n{NOT_FOUND}\n"
    slow = [one for one in found.findings if one.kind == BOTTLENECK]
    odd = [one for one in found.findings if one.kind == ANOMALY]
    parts = [
        "# MoE analysis findings",
        f"**Status:** OK\n\n**Diagnosis:** {found.status}",
        "## Operations\n\n" + _table(found.operations, found.moe_ns),
        "## Bottlenecks\n\n"
        + ("\n".join(_line(one) for one in slow) or "None by the criteria, of what was modelled."),
        "## Anomalies\n\n" + ("\n".join(_line(one) for one in odd) or "None."),
        "## Recommendations\n\n" + _advice(found.recommendations),
        "## Detailed Analysis\n\n" + _details(found),
    ]
    return "\n\n".join(parts) + "\n"


def _line(one: Finding) -> str:
    return f"- {shown(short(one.title))}: {shown(one.why)}"


def _table(operations: Sequence[Operation], moe_ns: int) -> str:
    head = "| Operation | Args | Kernel Name | Time (ms) | % of MoE | Count | FLOPS/Byte | Efficiency | Bound |\n"
    rows = [
        f"| {shown(short(op.title))} | {shown(short(op.args)) or '—'} | {_kernel(op)} | {op.time_ns / 1e6:.3f} "
        f"| {100 * op.time_ns / max(1, moe_ns):.1f} | {op.calls} | {_intensity(op)} "
        f"| {'—' if op.efficiency is None else f'{op.efficiency:.1%}'} | {op.judged.bound if op.judged else '—'} |"
        for op in operations
    ]
    return head + "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)


def _kernel(op: Operation) -> str:
    return shown(short(next(iter(op.kernels), "—"), 60))


def _intensity(op: Operation) -> str:
    return f"{op.cost.flops / op.cost.n_bytes:.1f}" if op.cost and op.cost.n_bytes else "—"


def _advice(recommendations: Sequence[Recommendation]) -> str:
    groups = []
    for kind, title in (("algorithmic", "Algorithmic"), ("kernel", "Kernel")):
        lines = [
            f"- **{shown(one.title)}** ({one.effort} effort): {shown(one.action).rstrip('.')}. "
            f"Impact: {shown(one.impact)}."
            for one in recommendations
            if one.kind == kind
        ]
        groups.append(f"### {title} recommendations\n\n" + ("\n".join(lines) or "None."))
    return "\n\n".join(groups)


def _details(found: Diagnosis) -> str:
    blocks = []
    for rank, one in enumerate((f for f in found.findings if f.kind == BOTTLENECK), 1):
        gain = (
            "not computable"
            if one.recoverable_ns is None
            else f"at most {one.recoverable_ns / 1e3:,.1f} µs"
        )
        blocks.append(
            f"<!-- reasoning-candidate tier=compute rank={rank} -->\n\n#### {shown(short(one.title))}\n\n"
            f"**Identification:** {one.share_of_moe:.1%} of the MoE time.\n\n**Data:** efficiency "
            f"{(one.efficiency or 0):.1%} ({band(one.efficiency)}), bound {one.bound}.\n\n"
            f"**Reasoning for Slowdown:** {shown(one.why)}.\n\n"
            "**Resolution:** see the recommendations above.\n\n"
            f"**Impact estimate:** {gain}."
        )
    return "\n\n".join(blocks) or "No operation meets the criteria of a bottleneck."
