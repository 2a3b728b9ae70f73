"""The MoE operations of a profile: where each is from, its time, shape and cost, and how near to the roofline it came.

An operation is a part of the layer (its `up` product, its routing, ...) with one set of inputs. W pieces of work.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.device.attribution import BY_HINT, BY_KERNEL, Work
from analysis.device.enclosing import asked_name
from analysis.device.matrix_products import ARITHMETIC
from analysis.device.names import Found, Names, Rule
from analysis.device.profile_trace import FRAME, NOBODY, OPERATION, ProfileTrace
from analysis.device.roofline import (
    PRODUCTS,
    Cost,
    Judged,
    Peaks,
    cost_of,
    judge,
    why_too_fast,
)
from analysis.device.shapes import Known, Shape, shape_of

WORDS = {  # beside each the role, as figures and tables call it
    "experts": "expert products (experts)", "up": "first expert product (up)", "down": "second expert product (down)",
    "gemm": "expert product (gemm)", "router": "product of the router", "routing": "routing",
    "prepare": "preparing of tokens (prepare)", "permute": "sorting of tokens by expert (permute)",
    "activation": "activation", "combine": "combining of outputs (combine)",
    "dispatch": "sending of tokens to ranks (dispatch)", "collect": "collecting over ranks (collect)",
    "other": "other work",
}  # fmt: skip
NO_SHAPES = "record_shapes=True records what PyTorch's operations are called with"
Active = Callable[[Shape], float | None]  # experts that a call needed, where routing is known


@dataclass(frozen=True)
class Operation:
    """All calls of one part of the layer with the same inputs."""

    name: str  # the operation, the module's class, or the library that the kernels' names give
    role: str
    library: str
    told_by: str
    calls: int
    time_ns: int
    kernels: Mapping[str, tuple[int, int]] = field(hash=False)  # name -> how often, how long
    shape: Shape
    cost: Cost | None = None  # of one call
    judged: Judged | None = None
    why_not: str = ""  # why there is no cost, or no efficiency
    anomaly: str = ""
    args: str = ""
    modules: tuple[str, ...] = ()
    tile: int | None = None
    mean_rate_per_ns: float = (
        0.0  # calls per nanosecond, mean over calls: how TraceLens averages rates
    )
    is_counted: bool = False  # its products one by one, from the sizes they were called with
    is_exact: bool = False  # experts needed from recorded routing, or sizes from the call itself

    @property
    def mean_ns(self) -> float:
        return self.time_ns / self.calls

    @property
    def is_modelled(self) -> bool:
        return self.cost is not None

    @property
    def efficiency(self) -> float | None:
        """None where it cannot be told, and where it would be more than all: that is no efficiency."""
        return None if self.judged is None or self.judged.is_anomaly else self.judged.efficiency

    @property
    def assumptions(self) -> list[str]:
        """What its cost rests on, in words; of counted products nothing but what they were called with."""
        return [] if self.is_counted else self.shape.assumptions(self.role)

    @property
    def title(self) -> str:
        return f"{WORDS[self.role]} of {self.name}" if self.role in WORDS else self.name


def operations_of(
    trace: ProfileTrace, work: Work, known: Known, peaks: Peaks | None, active: Active | None = None
) -> list[Operation]:
    """The longest first."""
    groups: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    roles = _roles(work, known.names, trace)
    for w in np.flatnonzero(work.is_moe_W):
        groups[_key(trace, work, int(w), roles[w], known.names)].append(int(w))
    found = [
        _operation(trace, work, key, pieces, known, peaks, active) for key, pieces in groups.items()
    ]
    return sorted(found, key=lambda operation: -operation.time_ns)


def _roles(work: Work, names: Names, trace: ProfileTrace) -> list[str]:
    """Two products of one layer that nothing else tells apart: the first is up, the second down."""
    roles = [str(role) for role in work.role_W]
    products: dict[int, list[int]] = defaultdict(list)
    for w in np.flatnonzero(work.is_moe_W & (work.role_W == "gemm") & (work.flops_W == 0)):
        if (
            not _inputs(trace, int(work.detail_W[w])).get("Input Dims")
            or work.told_by_W[w] == BY_KERNEL
        ):
            products[int(work.call_W[w])].append(int(w))
    for pieces in products.values():
        if len(pieces) == 2:
            first, second = sorted(pieces, key=lambda w: int(work.start_W[w]))
            roles[first], roles[second] = "up", "down"
    return roles


def _key(
    trace: ProfileTrace, work: Work, w: int, role: str, names: Names
) -> tuple[str, str, int, str]:
    told, name = str(work.told_by_W[w]), trace.names[work.name_W[w]]
    if told == BY_HINT:
        return name, role, NOBODY, told
    if told == BY_KERNEL:
        found = names.find("kernels", name)
        return (found.rule.library if found else name), role, NOBODY, told
    scope, detail = int(work.scope_W[w]), int(work.detail_W[w])
    kind = int(trace.spans.kind[scope])
    shown = asked_name(trace.names[trace.spans.name[scope]], kind)
    shown = shown.rsplit("/", 1)[-1] if kind == FRAME else shown
    return shown, role, int(trace.spans.inputs[detail]), told


def _inputs(trace: ProfileTrace, span: int) -> Mapping[str, Any]:
    kept = int(trace.spans.inputs[span]) if span != NOBODY else NOBODY
    return trace.inputs[kept] if kept != NOBODY else {}


def _operation(
    trace: ProfileTrace,
    work: Work,
    key: tuple[str, str, int, str],
    pieces: Sequence[int],
    known: Known,
    peaks: Peaks | None,
    active: Active | None,
) -> Operation:
    name, role, _, told = key
    kernels = _kernels(trace, work, pieces)
    detail = int(work.detail_W[pieces[0]])
    rule, inputs = _rule(trace, detail, known.names), _inputs(trace, detail)
    said = _said(kernels, known.names)
    calls = _n_calls(work, pieces, rule if inputs.get("Input Dims") else None)
    tile = str(said.get("tile", ""))
    base = Operation(
        name=name, role=role, library=_library(kernels, rule, known.names), told_by=told, calls=calls,
        time_ns=sum(took for _, took in kernels.values()), kernels=kernels,
        shape=shape_of(known, rule, inputs, said), args=str(inputs.get("Input Dims", "")),
        modules=_modules(trace, work, pieces), mean_rate_per_ns=_mean_rate(work, pieces),
        tile=int(tile) if tile.isdigit() else None,
    )  # fmt: skip
    counted = _counted(work, pieces, calls) if role not in PRODUCTS[:3] else None
    return judged(base, peaks, active, counted)


def _kernels(trace: ProfileTrace, work: Work, pieces: Sequence[int]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for w in pieces:
        name = trace.names[work.name_W[w]]
        count, took = found.get(name, (0, 0))
        found[name] = count + 1, took + int(work.took_W[w])
    return found


def _n_calls(work: Work, pieces: Sequence[int], rule: Rule | None) -> int:
    """Passages through the layer; of an operation that is called with these inputs several times in each, its calls."""
    passages = len({int(work.call_W[w]) for w in pieces})
    if rule is None or not rule.dims:
        return passages
    products = sum(int(work.flops_W[w] > 0) for w in pieces)
    return max(passages, products or len({int(work.detail_W[w]) for w in pieces}))


def _modules(trace: ProfileTrace, work: Work, pieces: Sequence[int]) -> tuple[str, ...]:
    innermost = {int(work.module_W[w]) for w in pieces} - {NOBODY}
    return tuple(sorted({trace.names[trace.spans.name[m]] for m in innermost})[:3])


def _mean_rate(work: Work, pieces: Sequence[int]) -> float:
    per_call = pd.Series(work.took_W[pieces]).groupby(work.call_W[pieces]).sum()
    is_timed = per_call > 0
    return float((1 / per_call[is_timed]).mean()) if is_timed.any() else 0.0


def _counted(work: Work, pieces: Sequence[int], calls: int) -> Cost | None:
    """Products whose sizes the profile gives one by one need no formula."""
    flops, n_bytes = int(work.flops_W[pieces].sum()), int(work.bytes_W[pieces].sum())
    if not flops:
        return None
    longest = max(pieces, key=lambda w: int(work.flops_W[w]))
    return Cost(flops / calls, n_bytes / calls, ARITHMETIC[int(work.kind_W[longest])])


def judged(
    base: Operation, peaks: Peaks | None, active: Active | None, counted: Cost | None = None
) -> Operation:
    """The same with its cost, if a formula fits, and its distance from the roofline, if the device is known."""
    exact = active(base.shape) if active is not None and base.role in PRODUCTS else None
    by_formula = cost_of(base.role, base.shape, exact)  # knows that idle experts are not read
    cost = by_formula or counted
    is_counted = by_formula is None and counted is not None
    is_exact = exact is not None or is_counted
    op = replace(base, cost=cost, is_counted=is_counted, is_exact=is_exact)
    found = None if cost is None or peaks is None else judge(cost, base.mean_ns, peaks)
    if cost is None or peaks is None or found is None:
        return replace(op, why_not=_why_not(op, peaks))
    if not found.is_anomaly:
        return replace(op, judged=found)
    why = why_too_fast(base.role, base.shape, base.mean_ns, peaks, is_exact=exact is not None)
    return replace(op, judged=found, anomaly=why)


def _why_not(op: Operation, peaks: Peaks | None) -> str:
    """Why there is no cost, else why there is no efficiency."""
    if op.cost is None:
        missing = ", ".join(op.shape.missing(op.role))
        why = f"not known: {missing}" if missing else "no formula for what it does"
        of_product = op.role == "gemm" and op.told_by != BY_KERNEL
        remedy = NO_SHAPES if of_product else op.shape.why_not
        return "; ".join(filter(None, (why, remedy if missing else "")))
    if peaks is None:
        return "no hardware file for this device"
    if op.cost.on_network:
        return "the network's rate is not known"
    return f"{peaks.name} has no rate for it" if op.time_ns else "no time was measured"


def _rule(trace: ProfileTrace, span: int, names: Names) -> Rule | None:
    if span == NOBODY or trace.spans.kind[span] != OPERATION:
        return None
    found = names.find("operations", trace.names[trace.spans.name[span]])
    return found.rule if found else None


def _by_name(kernels: Mapping[str, Any], names: Names) -> list[Found]:
    return [found for name in kernels if (found := names.find("kernels", name)) is not None]


def _said(kernels: Mapping[str, tuple[int, int]], names: Names) -> Mapping[str, str]:
    """Of several kernels the longest speaks."""
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1][1]))
    return next((found.said for found in _by_name(ordered, names) if found.said), {})


def _library(kernels: Mapping[str, tuple[int, int]], rule: Rule | None, names: Names) -> str:
    counted = Counter(found.rule.library for found in _by_name(kernels, names))
    return counted.most_common(1)[0][0] if counted else (rule.library if rule else "unknown")
