"""Ties each piece of work to the operation and module that launched it; finds which of it is MoE, and of which layer.

By what launched it where the profile says so, else (in a captured graph) by the kernel's own name. It knows no shapes.
W pieces of work: kernels, or on a CPU the operations' own time; S host spans, Q moments to look up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.device.enclosing import Around, around, asked_name, found_spans, own_time
from analysis.device.names import Found, Names
from analysis.device.profile_trace import (
    FRAME,
    MODULE,
    NOBODY,
    OPERATION,
    Columns,
    ProfileTrace,
)

BESIDE = "beside"  # in a module round the operation that is the layer: padding, reductions
BY_OPERATION, BY_MODULE, BY_FRAME, BY_KERNEL, BY_HINT = (
    "operation", "module", "function", "kernel name", "looks like it",
)  # fmt: skip
TOLD_BY = {OPERATION: BY_OPERATION, MODULE: BY_MODULE, FRAME: BY_FRAME}
BEFORE, EXPERTS, AFTER = range(3)  # of a layer; what is before the experts again begins the next
PHASE = {
    "router": BEFORE, "routing": BEFORE, "prepare": BEFORE, "permute": BEFORE, "up": EXPERTS, "down": EXPERTS,
    "gemm": EXPERTS, "experts": EXPERTS, "layer": EXPERTS, "combine": AFTER,
}  # fmt: skip
PARTS = (
    "up",
    "down",
    "gemm",
    "router",
    "routing",
    "prepare",
    "permute",
    "activation",
    "combine",
)  # of a layer
FAR_APART = 4  # other kernels between two of one layer at most; attention has more


@dataclass(frozen=True, eq=False)
class Work:
    """What took time, piece by piece. A scope is the outermost span that is MoE; NOBODY where there is none."""

    name_W: NDArray[np.int64]
    start_W: NDArray[np.int64]
    took_W: NDArray[np.int64]
    device_W: NDArray[np.int64]
    scope_W: NDArray[np.int64]  # place among the profile's spans
    detail_W: NDArray[np.int64]  # innermost MoE operation with known inputs, or the scope
    launcher_W: NDArray[np.int64]  # innermost operation
    module_W: NDArray[np.int64]  # innermost module
    thread_W: NDArray[np.int64]  # that launched it, and when; NOBODY where that is not told
    at_W: NDArray[np.int64]
    flops_W: NDArray[np.int64]  # of a matrix product whose sizes the profile gives; else 0
    bytes_W: NDArray[np.int64]
    kind_W: NDArray[np.int64]  # its arithmetic
    in_graph_W: NDArray[np.bool_]
    told_by_W: NDArray[np.object_]  # what says that it is MoE; "" where nothing does; or BESIDE
    role_W: NDArray[np.object_]
    call_W: NDArray[np.int64]  # which passage through a MoE layer it belongs to; NOBODY
    is_cpu: bool

    @property
    def is_moe_W(self) -> NDArray[np.bool_]:
        return (self.told_by_W != "") & ~self.is_beside_W

    @property
    def is_beside_W(self) -> NDArray[np.bool_]:
        return self.told_by_W == BESIDE


def attribute(trace: ProfileTrace, names: Names) -> Work:
    """Every piece of work, with whether it is MoE and why."""
    work = _of_cpu(trace, names) if trace.is_cpu else _of_kernels(trace, names)
    _by_kernel_names(work, trace, names)
    _calls(work, trace, names)
    return work


def _of_kernels(trace: ProfileTrace, names: Names) -> Work:
    kernels = Columns({name: column[trace.kernels] for name, column in trace.activities.of.items()})
    launch_W = _launches(trace, kernels)
    is_known_W = launch_W != NOBODY
    thread_W, at_W = np.full((2, len(kernels)), NOBODY, np.int64)
    thread_W[is_known_W] = trace.launches.thread[launch_W[is_known_W]]
    at_W[is_known_W] = trace.launches.start[launch_W[is_known_W]]
    by_id = {int(e): i for i, e in enumerate(trace.spans.external) if e != NOBODY}
    # of a launch that the profile lost the operation has the same id
    for w in np.flatnonzero(~is_known_W):
        span = by_id.get(int(kernels.external[w]), NOBODY)
        if span != NOBODY:
            thread_W[w], at_W[w] = trace.spans.thread[span], trace.spans.start[span]
    graph_Q = np.array([names.is_graph_launch(trace.names[n]) for n in trace.launches.name], bool)
    in_graph_W = np.zeros(len(kernels), bool)
    in_graph_W[is_known_W] = graph_Q[launch_W[is_known_W]]
    found = found_spans(trace, names)
    near = _with_forward(trace, found, around(trace, found, thread_W, at_W))
    return _work(trace, found, near, kernels, in_graph_W)


def _launches(trace: ProfileTrace, kernels: Columns) -> NDArray[np.int64]:
    """Place of each kernel's launch: by correlation, else by the id of the operation that both name."""
    out_W = np.full(len(kernels), NOBODY, np.int64)
    for wanted_W, offered_Q in (
        (kernels.external, trace.launches.external),
        (kernels.correlation, trace.launches.correlation),
    ):
        known_Q = np.flatnonzero(offered_Q != NOBODY)
        order_Q = known_Q[np.argsort(offered_Q[known_Q], kind="stable")]
        if not len(order_Q):
            continue
        at_W = np.minimum(np.searchsorted(offered_Q[order_Q], wanted_W), len(order_Q) - 1)
        hit_W = (offered_Q[order_Q][at_W] == wanted_W) & (wanted_W != NOBODY)
        out_W[hit_W] = order_Q[at_W[hit_W]]
    return out_W


def _with_forward(trace: ProfileTrace, found: dict[int, Found], near: Around) -> Around:
    """What autograd runs belongs to the layer whose forward has the same sequence number."""
    is_backward_Q = near.backward_Q != NOBODY
    if not is_backward_Q.any():
        return near
    spans, wanted = trace.spans, np.unique(near.backward_Q[is_backward_Q])
    forward_S = np.flatnonzero((spans.backward == 0) & np.isin(spans.sequence, wanted))
    # several may bear a number that none of them has used yet: the last to begin has
    forward_S = forward_S[np.lexsort((-spans.took[forward_S], spans.start[forward_S]))]
    ahead = around(trace, found, spans.thread[forward_S], spans.start[forward_S])
    owners = zip(forward_S, ahead.scope_Q, ahead.detail_Q, ahead.module_Q, strict=True)
    layer_of = {int(spans.sequence[s]): tuple(map(int, owner)) for s, *owner in owners}
    scope_Q, detail_Q, module_Q = near.scope_Q.copy(), near.detail_Q.copy(), near.module_Q.copy()
    for q in np.flatnonzero(is_backward_Q):
        owner = layer_of.get(int(near.backward_Q[q]))
        if owner is None:
            continue
        scope_Q[q], module_Q[q] = owner[0], owner[2]
        detail_Q[q] = owner[1] if detail_Q[q] == NOBODY else detail_Q[q]
    return dataclasses.replace(near, scope_Q=scope_Q, detail_Q=detail_Q, module_Q=module_Q)


def _of_cpu(trace: ProfileTrace, names: Names) -> Work:
    """On a CPU an operation's own time is what those that it calls leave of it."""
    spans, own_of = trace.spans, own_time(trace)
    place_W = np.flatnonzero(spans.kind == OPERATION)
    own = Columns(
        {
            **{name: column[place_W] for name, column in spans.of.items()},
            "took": own_of.own_S[place_W],
            "flops": np.where(own_of.is_outer_S, spans.flops, 0)[place_W],
            "bytes": np.where(own_of.is_outer_S, spans.bytes, 0)[place_W],
            "device": np.zeros(len(place_W), np.int64),
        }
    )
    found = found_spans(trace, names)
    near = around(trace, found, own.thread, own.start)
    # of operations that begin in the same nanosecond the innermost was found: each asks for itself
    near = dataclasses.replace(near, operation_Q=place_W)
    near = _with_forward(trace, found, near)
    return _work(trace, found, near, own, np.zeros(len(place_W), bool))


def _work(
    trace: ProfileTrace,
    found: dict[int, Found],
    near: Around,
    pieces: Columns,
    in_graph_W: NDArray[np.bool_],
) -> Work:
    told_W, role_W = _by_scope(trace, found, near)
    flops_W, bytes_W, kind_W = _products(trace, near, pieces)
    return Work(
        name_W=pieces.name, start_W=pieces.start, took_W=pieces.took, device_W=pieces.device,
        scope_W=near.scope_Q, detail_W=near.detail_Q, launcher_W=near.operation_Q, module_W=near.module_Q,
        flops_W=flops_W, bytes_W=bytes_W, kind_W=kind_W, in_graph_W=in_graph_W, told_by_W=told_W, role_W=role_W,
        thread_W=near.thread_Q, at_W=near.at_Q, call_W=np.full(len(pieces), NOBODY, np.int64), is_cpu=trace.is_cpu,
    )  # fmt: skip


def _by_scope(
    trace: ProfileTrace, found: dict[int, Found], near: Around
) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    told_W, role_W = np.full((2, len(near.scope_Q)), "", object)
    for w in np.flatnonzero(near.scope_Q != NOBODY):
        scope = int(near.scope_Q[w])
        told_W[w] = BESIDE if scope in near.wrappers else TOLD_BY[int(trace.spans.kind[scope])]
        role_W[w] = found[int(near.detail_Q[w])].role
    return told_W, role_W


def _products(
    trace: ProfileTrace, near: Around, pieces: Columns
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Operations, bytes and arithmetic of matrix products; a kernel has those of what launched it."""
    if trace.is_cpu:
        return pieces.flops, pieces.bytes, pieces.arithmetic
    flops_W, bytes_W, kind_W = np.zeros((3, len(pieces)), np.int64)
    has_W = near.operation_Q != NOBODY
    launcher_W = near.operation_Q[has_W]
    flops_W[has_W], bytes_W[has_W] = _once(trace, launcher_W, pieces.took[has_W])
    kind_W[has_W] = trace.spans.arithmetic[launcher_W]
    return flops_W, bytes_W, kind_W


def _once(
    trace: ProfileTrace, operation_W: NDArray[np.int64], took_W: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An operation's products are counted at its longest kernel, and not at each."""
    order_W = np.lexsort((-took_W, operation_W))
    first_W = np.zeros(len(operation_W), bool)
    first_W[order_W] = np.diff(operation_W[order_W], prepend=NOBODY) != 0
    flops_W, bytes_W = trace.spans.flops[operation_W], trace.spans.bytes[operation_W]
    return np.where(first_W, flops_W, 0), np.where(first_W, bytes_W, 0)


def _by_kernel_names(work: Work, trace: ProfileTrace, names: Names) -> None:
    """Roles in a layer; MoE kernels that no operation owns; and names that only look like MoE."""
    section = "operations" if work.is_cpu else "kernels"
    for w, name in enumerate(trace.names[n] for n in work.name_W):
        answer = names.find(section, name) or (names.find("kernels", name) if work.is_cpu else None)
        if work.scope_W[w] != NOBODY:
            answer = answer or _of_launcher(work, trace, names, w)
            if answer is not None and answer.role == "gemm" and _is_router(work, trace, names, w):
                work.role_W[w] = "router"
                continue
            if answer is not None and answer.role != "layer":
                work.role_W[w] = answer.role
            elif work.role_W[w] == "layer":
                work.role_W[w] = "other"
        elif answer is not None and not answer.rule.inside and not work.is_cpu:
            work.told_by_W[w], work.role_W[w] = BY_KERNEL, answer.role
        elif names.hint(name):
            work.told_by_W[w], work.role_W[w] = BY_HINT, "other"


def _of_launcher(work: Work, trace: ProfileTrace, names: Names, w: int) -> Found | None:
    launcher = int(work.launcher_W[w])
    return (
        names.find("operations", trace.names[trace.spans.name[launcher]]) if launcher >= 0 else None
    )


def _is_router(work: Work, trace: ProfileTrace, names: Names, w: int) -> bool:
    module = int(work.module_W[w])
    if module == NOBODY:
        return False
    found = names.find("modules", asked_name(trace.names[trace.spans.name[module]], MODULE))
    return found is not None and found.role == "router"


def _calls(work: Work, trace: ProfileTrace, names: Names) -> None:
    """Numbers the passages through a layer: by scope, else by the order of kernels on their device."""
    has_W = (work.scope_W != NOBODY) & ~work.is_beside_W
    scope_C, number_W = np.unique(work.scope_W[has_W], return_inverse=True)
    number_W = _passages(trace, names, scope_C)[number_W]
    work.call_W[has_W] = number_W
    taken = int(number_W.max(initial=-1)) + 1
    free_W = np.flatnonzero((work.told_by_W == BY_KERNEL) | (work.told_by_W == BY_HINT))
    for device in np.unique(work.device_W[free_W]):
        mine_W = np.flatnonzero(work.device_W == device)
        mine_W = mine_W[np.argsort(work.start_W[mine_W], kind="stable")]
        taken = _cut(work, mine_W.tolist(), taken)


def _passages(trace: ProfileTrace, names: Names, scope_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """A scope is a passage; operations that are parts of a layer share one until the first of them comes again."""
    spans, passage_C = trace.spans, np.zeros(len(scope_C), np.int64)
    seen, last, passage = set[tuple[int, int]](), (NOBODY, NOBODY), -1
    for c in np.lexsort((spans.start[scope_C], spans.thread[scope_C])).tolist():
        span = int(scope_C[c])
        found = names.find("operations", trace.names[spans.name[span]])
        is_part = spans.kind[span] == OPERATION and found is not None and found.role in PARTS
        key = int(spans.name[span]), int(spans.inputs[span])
        if not is_part or not seen or (key in seen and key != last):
            passage, seen = passage + 1, set()
        passage_C[c], last = passage, key
        seen |= {key} if is_part else set()
    return passage_C


def _cut(work: Work, in_order: list[int], taken: int) -> int:
    """A layer ends where its experts or what follows them are over and something before experts comes, or far off."""
    phase, others, call = BEFORE, FAR_APART + 1, taken - 1
    for w in in_order:
        if work.told_by_W[w] == "" or work.scope_W[w] != NOBODY:
            others += 1
            continue
        now = PHASE.get(str(work.role_W[w]), phase)
        if others > FAR_APART or (now == BEFORE and phase > BEFORE):
            call += 1
        work.call_W[w], phase, others = call, now, 0
    return call + 1
