"""Which operations are bottlenecks, and which numbers cannot be right: the criteria of the analyzer that this serves.

A bottleneck takes more than 100 ms or 5 % of the MoE time and reaches less than 40 % of the roofline. What is over
100 % is an anomaly: explained, never an opportunity. It reads operations and knows no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from analysis.device.operations import Operation
from analysis.device.roofline import MEMORY, PRODUCTS

OK, NO_MOE, MOE_UNMODELED, ERROR = "OK", "NO_MOE", "MOE_UNMODELED", "ERROR"
LONG_NS, LONG_SHARE, LOW = 100_000_000, 0.05, 0.40
GOOD, ACCEPTABLE = 0.50, 0.30
BOTTLENECK, ANOMALY, UNMODELED, NOT_JUDGED = "bottleneck", "anomaly", "unmodelled", "not judged"


@dataclass(frozen=True)
class Finding:
    kind: str
    title: str
    role: str
    time_ns: int
    share_of_moe: float
    efficiency: float | None
    bound: str | None
    why: str
    recoverable_ns: float | None  # at most, were it at the roofline; None = not computable


def status_of(operations: Sequence[Operation], hinted: Sequence[str]) -> str:
    """ "No MoE" is said only where nothing looks like it."""
    if not operations:
        return MOE_UNMODELED if hinted else NO_MOE
    return OK if any(op.role in PRODUCTS and op.is_modelled for op in operations) else MOE_UNMODELED


def findings_of(operations: Sequence[Operation]) -> list[Finding]:
    """The longest first; each operation stands once, told from its namesakes by what it was called with."""
    total = sum(op.time_ns for op in operations)
    found = ((op, one) for op in operations if (one := _finding(op, total)) is not None)
    namesakes = Counter(op.title for op in operations)
    return [
        replace(one, title=f"{op.title}, called with {op.args}")
        if namesakes[op.title] > 1 and op.args
        else one
        for op, one in found
    ]


def _finding(op: Operation, total_ns: int) -> Finding | None:
    share, judged = op.time_ns / total_ns if total_ns else 0.0, op.judged
    why = op.why_not or "no formula"
    found = Finding(UNMODELED, op.title, op.role, op.time_ns, share, None, None, why, None)
    if judged is None:
        return replace(found, kind=NOT_JUDGED if op.is_modelled else UNMODELED)
    if judged.is_anomaly:
        why = f"{judged.efficiency:.1%} of the roofline: {op.anomaly}"
        return replace(found, kind=ANOMALY, bound=judged.bound, why=why)
    if not is_long(op.time_ns, share) or judged.efficiency >= LOW:
        return None
    return replace(
        found,
        kind=BOTTLENECK,
        efficiency=judged.efficiency,
        bound=judged.bound,
        why=_reason(op),
        recoverable_ns=op.time_ns - judged.roofline_ns * op.calls,
    )


def is_long(time_ns: float, share: float) -> bool:
    return time_ns > LONG_NS or share > LONG_SHARE


def _reason(op: Operation) -> str:
    assert op.judged is not None
    took_us, least_us = op.mean_ns / 1e3, op.judged.roofline_ns / 1e3
    limit = (
        "moving its bytes" if op.judged.bound == MEMORY else f"its operations in {op.judged.ran_in}"
    )
    text = f"{took_us:,.1f} µs a call, where {limit} needs {digits(least_us)} µs"
    if op.role not in PRODUCTS and took_us < 20:
        text += "; work so short mostly starts and waits: fewer kernels help more than faster ones"
    return text


def digits(value: float) -> str:
    """Three that count: a small number is not printed as none."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1g}"


def percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "less than 0.1%"


def band(efficiency: float | None) -> str:
    """The words of the seed's thresholds."""
    if efficiency is None:
        return "not known"
    if efficiency > GOOD:
        return "good for MoE"
    return (
        "acceptable, check routing balance"
        if efficiency >= ACCEPTABLE
        else "investigate load imbalance or kernels"
    )


def worst_efficiency(operations: Sequence[Operation]) -> float | None:
    """Of the expert products; routing and copies are small and never near a roofline."""
    known = [
        op.efficiency for op in operations if op.role in PRODUCTS and op.efficiency is not None
    ]
    return min(known, default=None)
