"""What was open on the same thread at a moment: the MoE layer, the operation, the module; and operations' own time.

It knows spans of the host and no kernel. S spans, Q moments to look up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.device.names import Found, Names
from analysis.device.profile_trace import (
    ANNOTATION,
    FRAME,
    MODULE,
    MODULE_PREFIX,
    NOBODY,
    OPERATION,
    ProfileTrace,
)

SECTION = {OPERATION: "operations", MODULE: "modules", FRAME: "frames"}
Open = tuple[int, int, int, int, int]  # what `Around` holds, at one moment


@dataclass(frozen=True, eq=False)
class Around:
    """What was open on the same thread at each of Q moments, as places among the spans."""

    scope_Q: NDArray[np.int64]
    detail_Q: NDArray[np.int64]
    operation_Q: NDArray[np.int64]
    module_Q: NDArray[np.int64]
    backward_Q: NDArray[np.int64]  # sequence number of the forward operation whose gradient runs
    wrappers: frozenset[int] = frozenset()  # scopes that only wrap an operation that is the layer


def found_spans(trace: ProfileTrace, names: Names) -> dict[int, Found]:
    """Spans that a rule calls MoE. Of modules the class is asked, without the number behind it."""
    answers = dict[tuple[int, int], Found | None]()
    found = dict[int, Found]()
    spans = trace.spans
    for i, (name, kind) in enumerate(zip(spans.name.tolist(), spans.kind.tolist(), strict=True)):
        if kind == ANNOTATION:
            continue
        if (name, kind) not in answers:
            answers[name, kind] = _answer(trace.names[name], kind, names)
        if (answer := answers[name, kind]) is not None:
            found[i] = answer
    for span in _holders(trace, found):
        del found[span]
    return found


def _holders(trace: ProfileTrace, found: dict[int, Found]) -> list[int]:
    """Modules that hold several layers: whole models are called MoE too."""
    spans = trace.spans
    layers = [
        s for s, answer in found.items() if spans.kind[s] == MODULE and answer.role == "layer"
    ]
    layers.sort(key=lambda s: (int(spans.thread[s]), int(spans.start[s]), -int(spans.took[s])))
    inside, stack = dict.fromkeys(layers, 0), list[int]()
    for s in layers:
        while stack and not _holds(trace, stack[-1], s):
            stack.pop()
        if stack:
            inside[stack[-1]] += 1
        stack.append(s)
    return [s for s, n in inside.items() if n > 1]


def _holds(trace: ProfileTrace, outer: int, inner: int) -> bool:
    spans = trace.spans
    return bool(
        spans.thread[outer] == spans.thread[inner]
        and spans.start[inner] + spans.took[inner] <= spans.start[outer] + spans.took[outer]
    )


def _answer(name: str, kind: int, names: Names) -> Found | None:
    """An operation that only looks like MoE is found too; a module is not: whole models are called so."""
    asked = asked_name(name, kind)
    found = names.find(SECTION[kind], asked)
    if found is None and kind == OPERATION and names.hint(asked):
        return names.find("hints", asked)
    return found


def asked_name(name: str, kind: int) -> str:
    return name.removeprefix(MODULE_PREFIX).rsplit("_", 1)[0] if kind == MODULE else name


def around(
    trace: ProfileTrace,
    found: dict[int, Found],
    thread_Q: NDArray[np.int64],
    at_Q: NDArray[np.int64],
) -> Around:
    """One pass over each thread's spans and moments in the order of time."""
    out = np.full((5, len(at_Q)), NOBODY, np.int64)
    spans, wrappers = trace.spans, set[int]()
    for thread in np.unique(thread_Q):
        place_S = np.flatnonzero((spans.thread == thread) & (spans.kind != ANNOTATION))
        place_S = place_S[np.lexsort((-spans.took[place_S], spans.start[place_S]))]
        mine_Q = np.flatnonzero(thread_Q == thread)
        mine_Q = mine_Q[np.argsort(at_Q[mine_Q], kind="stable")]
        for q, row in _sweep(trace, found, place_S.tolist(), mine_Q.tolist(), at_Q, wrappers):
            out[:, q] = row
    return Around(out[0], out[1], out[2], out[3], out[4], frozenset(wrappers))


def _sweep(
    trace: ProfileTrace,
    found: dict[int, Found],
    spans: list[int],
    moments: list[int],
    at_Q: NDArray[np.int64],
    wrappers: set[int],
) -> Iterator[tuple[int, Open]]:
    """A stack of what is open; each entry knows what it and all below it are."""
    start_S, took_S, kind_S = trace.spans.start, trace.spans.took, trace.spans.kind
    stack: list[tuple[int, Open]] = []
    nothing, place = (NOBODY,) * 5, 0
    for q in moments:
        now = int(at_Q[q])
        while place < len(spans) and start_S[spans[place]] <= now:
            span = spans[place]
            place += 1
            while stack and stack[-1][0] <= start_S[span]:
                stack.pop()
            below = stack[-1][1] if stack else nothing
            opened = _opened(span, int(kind_S[span]), below, found, trace)
            if below[0] not in (NOBODY, opened[0]):
                wrappers.add(below[0])
            stack.append((int(start_S[span] + took_S[span]), opened))
        while stack and stack[-1][0] < now:
            stack.pop()
        yield q, stack[-1][1] if stack else nothing


def _opened(
    span: int, kind: int, below: Open, found: dict[int, Found], trace: ProfileTrace
) -> Open:
    """The outermost is the layer, but for an operation that is the whole layer: it stands before modules round it."""
    scope, detail, operation, module, backward = below
    spans, answer = trace.spans, found.get(span)
    if answer is not None and (scope != NOBODY or not answer.rule.inside):
        is_layer = kind == OPERATION and answer.role == "layer"
        is_wrapped = is_layer and scope != NOBODY and spans.kind[scope] != OPERATION
        has_inputs = answer.rule.dims and spans.inputs[span] != NOBODY
        detail = span if has_inputs or is_wrapped or detail == NOBODY else detail
        scope = span if scope == NOBODY or is_wrapped else scope
    operation, module = span if kind == OPERATION else operation, span if kind == MODULE else module
    if spans.backward[span] and spans.sequence[span] >= 0:
        backward = int(spans.sequence[span])
    return scope, detail, operation, module, backward


def own_time(trace: ProfileTrace) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each operation's time without those that it calls, and whether it is no product inside another's."""
    spans = trace.spans
    own_S, is_outer_S = spans.took.copy(), np.ones(len(spans), bool)
    for thread in np.unique(spans.thread):
        place_S = np.flatnonzero((spans.thread == thread) & (spans.kind == OPERATION))
        place_S = place_S[np.lexsort((-spans.took[place_S], spans.start[place_S]))]
        stack: list[tuple[int, int, bool]] = []
        for s in place_S.tolist():
            start, end = int(spans.start[s]), int(spans.start[s] + spans.took[s])
            while stack and stack[-1][0] <= start:
                stack.pop()
            in_product = bool(stack) and stack[-1][2]
            if stack:
                own_S[stack[-1][1]] -= min(end, stack[-1][0]) - start
            is_outer_S[s] = not in_product
            stack.append((end, s, in_product or bool(spans.flops[s])))
    return np.maximum(own_S, 0), is_outer_S
