"""`findings.md`: what a person reads of a diagnosis. It computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.device.advice import NOT_COMPUTABLE, Recommendation
from analysis.device.diagnosis import Diagnosis
from analysis.device.doubts import waiting
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
    digits,
    percent,
)
from analysis.device.operations import Operation
from analysis.device.plain_text import short, shown
from analysis.device.routing_page import routing_page
from analysis.device.rows import rates
from analysis.device.shares import Times

EVEN = "assumed: every token takes any k experts with equal chance"
EXACT = "recorded routing"
NOTHING = "—"


def first_line(found: Diagnosis) -> str:
    """The status first; the share beside it."""
    times = found.times
    if found.status == NO_MOE and times is None:
        return f"{NO_MOE}: TraceLens lists no operation that looks like a Mixture of Experts"
    if found.status == NO_MOE:
        return f"{NO_MOE}: no operation, kernel or module looks like a Mixture of Experts"
    if not found.operations:
        return f"{found.status}: names look like MoE, and no work in them was recognised as it"
    text = f"{found.status}: MoE {found.moe_ns / 1e3:,.1f} µs"
    if times is not None:
        text += f", {times.of_kernel_time:.1%} of {times.sum_of}, {times.of_elapsed_time:.1%} of elapsed time"
    if found.status == MOE_UNMODELED:
        text += "; no product of experts has a model, see what was found"
    return text


def page(found: Diagnosis) -> str:
    title = f"# Diagnosis\n\n**{first_line(found)}**\n\nOf {shown(found.source)}."
    parts = [title, *(shown(doubt) for doubt in found.doubts), _times(found)]
    advice = _recommendations(found.recommendations)
    if found.operations:
        parts += [_operations(found), _judged(found), advice, _efficiency(found), _rests_on(found)]
    if found.hinted:
        lines = "\n".join(
            f"- {shown(name)}: {took / 1e3:,.1f} µs of work inside"
            for name, took in found.hinted.items()
        )
        parts.append(f"## Names that look like MoE\n\nNothing in them was recognised:\n\n{lines}")
    parts += [routing_page(found)] if found.status != NO_MOE else []
    parts += [] if found.operations else [advice]
    if found.notes:
        notes = "\n".join(f"- {shown(note)}" for note in found.notes)
        parts.append(f"## Notes\n\n{notes}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _times(found: Diagnosis) -> str:
    times = found.times
    if times is None:
        whole_ns = (found.total_ms or 0) * 1e6
        share = f", {found.moe_ns / whole_ns:.1%} of elapsed time" if whole_ns else ""
        return f"## Time\n\nMoE kernels: {found.moe_ns / 1e3:,.1f} µs{share}."
    parts = [f"## Time\n\n{_counted(found, times)}", _shares(times)]
    parts += filter(None, [waiting(times)])
    if len(found.layer_us) > 1:
        us = found.layer_us.time_us
        least, middle, most = (f"{value:,.1f}" for value in (us.min(), us.median(), us.max()))
        parts.append(f"A passage takes {least} / {middle} / {most} µs (least, median, most).")
    if times.beside_ns:
        parts.append(
            f"Modules round the MoE operation spend {times.beside_ns / 1e3:,.1f} µs more outside it (padding, "
            "reductions over ranks): not counted as MoE."
        )
    return "\n\n".join(parts)


def _counted(found: Diagnosis, times: Times) -> str:
    verb = "is" if times.n_moe_kernels == 1 else "are"
    text = f"{times.n_moe_kernels:,} of {times.n_kernels:,} {times.unit} {verb} MoE"
    if not found.n_calls:
        return f"{text}."
    layers = ""
    if found.n_layers is not None:
        layers = f" ({_some(found.n_layers, 'layer')} {found.layers_told_by})"
    return f"{text}, in {_some(found.n_calls, 'passage')} through a MoE layer{layers}."


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _shares(times: Times) -> str:
    if times.is_cpu:
        added, busy = "sum of what each spends itself", "when any operation ran"
        elapsed = "from the first operation to the last, Python included"
    else:
        added = "sum of durations; kernels that overlap count twice"
        busy = "when the device did anything, copies included"
        elapsed = "from first activity to last, waiting included"
    rows = (
        (times.sum_of, added, times.moe_kernel_ns, times.kernel_ns),
        ("busy time", busy, times.moe_busy_ns, times.busy_ns),
        ("elapsed time", elapsed, times.moe_busy_ns, times.elapsed_ns),
    )
    lines = "\n".join(
        f"| {name} | {meaning} | {part / 1e3:,.1f} | {whole / 1e3:,.1f} | {part / whole if whole else 0:.1%} |"
        for name, meaning, part, whole in rows
    )
    return (
        f"| share of | what it is | MoE (µs) | all (µs) | share |\n|---|---|---|---|---|\n{lines}"
    )


def _operations(found: Diagnosis) -> str:
    head = (
        "| operation | called with | found by | calls | time (µs) | of MoE | GFLOP | MiB | TFLOP/s | TB/s "
        "| arithmetic | bound | efficiency |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = "\n".join(_operation(op, found.moe_ns) for op in found.operations)
    peaks = found.peaks
    against = f"Peaks: {shown(peaks.name)} ({peaks.source})." if peaks else "No hardware file."
    return (
        f"## Operations\n\n{head}{rows}\n\n{against} GFLOP and MiB are of one call; rates are totals over total time. "
        "Efficiency is time at the roofline over time taken."
    )


def _operation(op: Operation, moe_ns: int) -> str:
    cost, judged = op.cost, op.judged
    cells = [shown(short(op.title)), shown(short(op.args)) or NOTHING, op.told_by, f"{op.calls:,}"]
    cells += [f"{op.time_ns / 1e3:,.1f}", f"{op.time_ns / max(1, moe_ns):.1%}"]
    does_products = cost is not None and cost.flops > 0
    tflops, tbs = rates(op) if cost is not None and op.time_ns > 0 else (None, None)
    cells += [digits(cost.flops / 1e9) if cost and does_products else NOTHING]
    cells += [digits(cost.n_bytes / 2**20) if cost else NOTHING]
    cells += [digits(tflops) if tflops else NOTHING, digits(tbs) if tbs is not None else NOTHING]
    cells += [judged.ran_in if judged and does_products else NOTHING]
    cells += [judged.bound if judged else NOTHING]
    known = percent(op.efficiency) if op.efficiency is not None else NOTHING
    return "| " + " | ".join([*cells, "anomaly" if op.anomaly else known]) + " |"


def _judged(found: Diagnosis) -> str:
    groups = (
        (BOTTLENECK, "Bottlenecks", _no_bottleneck(found)),
        (ANOMALY, "Anomalies", ""),
        (UNMODELED, "Found, but not modelled", ""),
        (NOT_JUDGED, "Modelled, but not judged", ""),
    )
    parts = []
    for kind, title, otherwise in groups:
        lines = [_finding(one) for one in found.findings if one.kind == kind]
        if lines or otherwise:
            parts.append(f"## {title}\n\n" + ("\n".join(lines) or otherwise))
    return "\n\n".join(parts)


def _no_bottleneck(found: Diagnosis) -> str:
    """None that is known: what could not be judged may be one."""
    judged_ns = sum(op.time_ns for op in found.operations if op.efficiency is not None)
    share = judged_ns / max(1, found.moe_ns)
    if not judged_ns:
        return "Not known: no operation could be judged."
    text = "nothing takes over 100 ms or 5 % of the MoE time below 40 % efficiency"
    return (
        f"None: {text}."
        if share > 0.995
        else f"None in the {share:.1%} that could be judged: {text}."
    )


def _finding(one: Finding) -> str:
    title = shown(short(one.title))
    text = f"- **{title}**: {one.time_ns / 1e3:,.1f} µs, {one.share_of_moe:.1%} of the MoE time"
    if one.efficiency is not None:
        text += f", {percent(one.efficiency)} of the {one.bound} bound ({band(one.efficiency)})"
    return f"{text}. {shown(one.why[:1].upper() + one.why[1:])}."


def _efficiency(found: Diagnosis) -> str:
    """What is not known is named in one line, and not line by line."""
    told = efficiency_of(found.operations, found.peaks)
    even = "" if told.is_exact or told.active_experts is None else ", if routing is even"
    lines = {
        "operations of the expert products, of the device's peak": _percent(told.flops_utilisation),
        "bytes of the expert products, of the memory's rate": _percent(told.bandwidth_utilisation),
        "one expert's matrices on this rank (MiB)": _digits(told.expert_bytes, 2**20),
        f"experts that a call needs{even}": _digits(told.active_experts),
        f"share of the experts' memory that a call reads{even}": _percent(told.resident_use),
        f"tokens per expert that is needed{even}": _digits(told.tokens_per_expert),
    }
    rows = [f"- {what}: {value}" for what, value in lines.items() if value]
    missing = [what for what, value in lines.items() if not value]
    rows += [f"- {NOT_COMPUTABLE}: {'; '.join(missing)}"] if missing else []
    return "## Efficiency\n\n" + "\n".join(rows)


def _digits(value: float | None, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value / unit:,.2f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else percent(share)


def _rests_on(found: Diagnosis) -> str:
    told: dict[str, None] = {}
    active: dict[str, dict[str, None]] = {}
    for op in (op for op in found.operations if op.is_modelled):
        told |= dict.fromkeys(op.assumptions)
        if op.cost and op.cost.active_experts is not None:
            how = EXACT if op.is_exact else EVEN
            text = f"{op.cost.active_experts:,.2f} experts needed in a call ({how})"
            active.setdefault(text, {})[op.role] = None
    told |= dict.fromkeys(f"{text}: {', '.join(roles)}" for text, roles in active.items())
    lines = "\n".join(f"- {shown(text)}" for text in told)
    return f"## What the costs rest on\n\nBeside what the profile says:\n\n{lines}" if told else ""


def _recommendations(listed: Sequence[Recommendation]) -> str:
    """Those without an impact need something: they are grouped by what."""
    if not listed:
        return ""
    computed = [one for one in listed if one.is_computed]
    head = "| kind | what | impact | effort | rests on |\n|---|---|---|---|---|\n"
    rows = "\n".join(
        f"| {one.kind} | **{shown(one.title)}.** {shown(one.action)} | {shown(one.impact)} | {one.effort} "
        f"| {shown(one.assumption) or NOTHING} |"
        for one in computed
    )
    parts = ["## Recommendations", head + rows if computed else "", _unknown(listed)]
    return "\n\n".join(part for part in parts if part)


def _unknown(listed: Sequence[Recommendation]) -> str:
    needs: dict[str, list[str]] = {}
    for one in (one for one in listed if not one.is_computed):
        needs.setdefault(one.action, []).append(f"{one.title} ({one.kind}, {one.effort} effort)")
    lines = [f"- {why[0].upper()}{why[1:]}: {'; '.join(titles)}." for why, titles in needs.items()]
    if not lines:
        return ""
    return f"Worth a look, their impact {NOT_COMPUTABLE}:\n\n" + "\n".join(lines)
