"""`findings.md`: what a person reads of a diagnosis. It computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.device.diagnosis import Diagnosis
from analysis.device.efficiency import efficiency_of
from analysis.device.findings import (
    ANOMALY,
    BOTTLENECK,
    MOE_UNMODELED,
    NO_MOE,
    NOT_JUDGED,
    UNMODELED,
    Finding,
    band,
)
from analysis.device.operations import Operation
from analysis.device.routing_page import routing_page
from analysis.device.rows import rates

MOST_ROWS = 12
UNIFORM = "assumed: every token takes any k experts with equal chance"


def first_line(found: Diagnosis) -> str:
    """The status first; the share beside it."""
    if found.status == NO_MOE:
        return f"{NO_MOE}: no operation, kernel or module looks like a Mixture of Experts"
    text = f"{found.status}: MoE {found.moe_ns / 1e3:,.1f} µs"
    if found.times is not None:
        text += f", {found.times.of_kernel_time:.1%} of kernel time, {found.times.of_elapsed_time:.1%} of elapsed time"
    if found.status == MOE_UNMODELED:
        text += "; no product of experts has a model, see what was found"
    return text


def page(found: Diagnosis) -> str:
    parts = [f"# Diagnosis\n\n**{first_line(found)}**\n\nOf {found.source}.", _times(found)]
    if found.operations:
        parts += [
            _operations(found),
            _judged(found),
            _efficiency(found),
            _rests_on(found.operations),
        ]
    if found.hinted:
        names = ", ".join(found.hinted[:MOST_ROWS])
        parts.append(f"## Names that look like MoE\n\nNothing in them was recognised: {names}.")
    parts += [routing_page(found)] if found.status != NO_MOE else []
    if found.recommendations:
        parts.append(_recommendations(found))
    if found.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in found.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _times(found: Diagnosis) -> str:
    times = found.times
    if times is None:
        share = (
            f", {found.moe_ns / found.total_ms / 1e4:.1f} % of elapsed time"
            if found.total_ms
            else ""
        )
        return f"## Time\n\nMoE kernels: {found.moe_ns / 1e3:,.1f} µs{share}."
    rows = [
        ("kernel time", "sum of durations; kernels that overlap count twice", times.moe_kernel_ns, times.kernel_ns),
        ("busy time", "when the device did anything, copies included", times.moe_busy_ns, times.busy_ns),
        ("elapsed time", "from first activity to last, waiting included", times.moe_busy_ns, times.elapsed_ns),
    ]  # fmt: skip
    lines = [
        f"| {name} | {meaning} | {part / 1e3:,.1f} | {whole / 1e3:,.1f} | {part / whole if whole else 0:.1%} |"
        for name, meaning, part, whole in rows
    ]
    text = (
        f"## Time\n\n{times.n_moe_kernels:,} of {times.n_kernels:,} {times.unit} are MoE, in {found.n_calls:,} "
        f"passages through a MoE layer ({found.n_layers:,} layers).\n\n"
        "| share of | what it is | MoE (µs) | all (µs) | share |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
    )
    if len(found.layer_us) > 1:
        us = found.layer_us.time_us
        text += f"\n\nA passage takes {us.min():,.1f} / {us.median():,.1f} / {us.max():,.1f} µs (least, median, most)."
    if times.beside_ns:
        text += (
            f"\n\nModules round the MoE operation spend {times.beside_ns / 1e3:,.1f} µs more outside it (padding, "
            "reductions over ranks): not counted as MoE."
        )
    return text


def _operations(found: Diagnosis) -> str:
    head = (
        "| operation | called with | found by | calls | time (µs) | of MoE | GFLOP | MiB | TFLOP/s | TB/s "
        "| arithmetic | bound | efficiency |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = "\n".join(_operation(op, found.moe_ns) for op in found.operations)
    against = (
        f"Peaks: {found.peaks.name} ({found.peaks.source})." if found.peaks else "No hardware file."
    )
    return (
        f"## Operations\n\n{head}{rows}\n\n{against} GFLOP and MiB are of one call; rates are totals over total time. "
        "Efficiency is time at the roofline over time taken; scales of quantised weights are not counted."
    )


def _operation(op: Operation, moe_ns: int) -> str:
    cost, judged = op.cost, op.judged
    cells = [
        op.title,
        op.args or "—",
        op.told_by,
        f"{op.calls:,}",
        f"{op.time_ns / 1e3:,.1f}",
        f"{op.time_ns / max(1, moe_ns):.1%}",
    ]
    cells += [f"{cost.flops / 1e9:,.3f}", f"{cost.n_bytes / 2**20:,.3f}"] if cost else ["—", "—"]
    has_rate = cost is not None and op.time_ns > 0
    cells += [f"{rate:,.3f}" for rate in rates(op)] if has_rate else ["—", "—"]
    cells += [judged.ran_in, judged.bound] if judged else ["—", "—"]
    cells.append(
        "anomaly" if op.anomaly else f"{op.efficiency:.1%}" if op.efficiency is not None else "—"
    )
    return "| " + " | ".join(cells) + " |"


def _judged(found: Diagnosis) -> str:
    groups = (
        (BOTTLENECK, "Bottlenecks", "None: nothing takes over 100 ms or 5 % of the MoE time below 40 % efficiency."),
        (ANOMALY, "Anomalies", ""),
        (UNMODELED, "Found, but not modelled", ""),
        (NOT_JUDGED, "Modelled, but not judged", ""),
    )  # fmt: skip
    parts = []
    for kind, title, otherwise in groups:
        lines = [_finding(one) for one in found.findings if one.kind == kind]
        if lines or otherwise:
            parts.append(f"## {title}\n\n" + ("\n".join(lines) or otherwise))
    return "\n\n".join(parts)


def _finding(one: Finding) -> str:
    text = f"- **{one.title}**: {one.time_ns / 1e3:,.1f} µs, {one.share_of_moe:.1%} of the MoE time"
    if one.efficiency is not None:
        text += f", {one.efficiency:.1%} of the {one.bound} bound ({band(one.efficiency)})"
    return f"{text}. {one.why}."


def _efficiency(found: Diagnosis) -> str:
    told = efficiency_of(found.operations, found.peaks)
    lines = {
        "operations of the expert products, of the device's peak": _percent(told.flops_utilisation),
        "bytes of the expert products, of the memory's rate": _percent(told.bandwidth_utilisation),
        "one expert's matrices on this rank, MiB, scales left out": _digits(
            told.expert_bytes, 2**20
        ),
        "experts that a call needs": _digits(told.active_experts),
        "share of the experts' memory that a call reads": _percent(told.resident_use),
        "tokens per expert that is needed": _digits(told.tokens_per_expert),
    }
    rows = "\n".join(
        f"- {what}: {value or 'not computable from this input'}" for what, value in lines.items()
    )
    return f"## Efficiency\n\n{rows}"


def _digits(value: float | None, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value / unit:,.2f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _rests_on(operations: Sequence[Operation]) -> str:
    told: dict[str, None] = {}
    for op in operations:
        if op.is_modelled:
            told |= dict.fromkeys(op.shape.assumptions(op.role))
            if op.cost and op.cost.active_experts is not None:
                how = (
                    "recorded routing"
                    if op.is_exact
                    else "assumed: every token takes any k experts with equal chance"
                )
                told[
                    f"{op.cost.active_experts:,.2f} experts needed per call of the {op.role} product ({how})"
                ] = None
    lines = "\n".join(f"- {text}" for text in told)
    return f"## What the costs rest on\n\nBeside what the profile says:\n\n{lines}" if told else ""


def _recommendations(found: Diagnosis) -> str:
    head = "| kind | what | impact | effort | rests on |\n|---|---|---|---|---|\n"
    rows = "\n".join(
        f"| {one.kind} | **{one.title}.** {one.action} | {one.impact} | {one.effort} | {one.assumption or '—'} |"
        for one in found.recommendations
    )
    return f"## Recommendations\n\n{head}{rows}"
