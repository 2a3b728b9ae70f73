"""What was open on the same thread at a moment: the MoE layer, the operation, the module; and operations' own time.

It knows spans of the host and no kernel. S spans, Q moments to look up.
"""

from __future__ import annotations

import re
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

NUMBER = re.compile(r"_\d+$")  # of a module's instance
SECTION = {OPERATION: "operations", MODULE: "modules", FRAME: "frames"}
Open = tuple[
    int, int, int, int, int
]  # scope, detail, operation, module, backward: as `Around` holds them


@dataclass(frozen=True, eq=False)
class Around:
    """What was open on the same thread at each of Q moments, as places among the spans."""

    thread_Q: NDArray[np.int64]
    at_Q: NDArray[np.int64]
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
    for span in _holders(trace, found, names):
        del found[span]
    return found


def _holders(trace: ProfileTrace, found: dict[int, Found], names: Names) -> list[int]:
    """Modules that hold several layers, or something that no layer has: whole models are called MoE too."""
    spans = trace.spans
    layers = [
        s for s, answer in found.items() if spans.kind[s] == MODULE and answer.role == "layer"
    ]
    others = [] if not layers else _outside(trace, names)
    layers += others
    layers.sort(key=lambda s: (int(spans.thread[s]), int(spans.start[s]), -int(spans.took[s])))
    inside, stack = dict.fromkeys(layers, 0), list[int]()
    for s in layers:
        while stack and not _holds(trace, stack[-1], s):
            stack.pop()
        if stack:
            inside[stack[-1]] += 1 if s in found else 2
        stack.append(s)
    return [s for s, n in inside.items() if n > 1 and s in found]


def _outside(trace: ProfileTrace, names: Names) -> list[int]:
    """Modules that stand beside MoE layers and never in them."""
    spans = trace.spans
    kind = np.array([names.is_outside(asked_name(name, MODULE)) for name in trace.names], bool)
    return [int(s) for s in np.flatnonzero((spans.kind == MODULE) & kind[spans.name])]


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


def looks_like_moe(asked: str, kind: int, names: Names) -> Found | None:
    """By a rule that needs nothing round it, or by a hint."""
    found = names.find(SECTION[kind], asked)
    if found is not None and not found.rule.inside:
        return found
    return names.find("hints", asked) if names.hint(asked) else None


def asked_name(name: str, kind: int) -> str:
    return NUMBER.sub("", name.removeprefix(MODULE_PREFIX)) if kind == MODULE else name


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
        in_order = _in_order(trace, int(thread), spans.kind != ANNOTATION)
        mine_Q = np.flatnonzero(thread_Q == thread)
        mine_Q = mine_Q[np.argsort(at_Q[mine_Q], kind="stable")]
        for q, row in _sweep(trace, found, in_order, mine_Q.tolist(), at_Q, wrappers):
            out[:, q] = row
    scope_Q, detail_Q, operation_Q, module_Q, backward_Q = out
    return Around(
        thread_Q, at_Q, scope_Q, detail_Q, operation_Q, module_Q, backward_Q, frozenset(wrappers)
    )


def _sweep(
    trace: ProfileTrace,
    found: dict[int, Found],
    spans: list[int],
    moments: list[int],
    at_Q: NDArray[np.int64],
    wrappers: set[int],
) -> Iterator[tuple[int, Open]]:
    """A stack of what is open; each entry knows what it and all below it are."""
    start_S, stack = trace.spans.start, list[tuple[int, Open]]()
    nothing, place = (NOBODY,) * 5, 0
    for q in moments:
        now = int(at_Q[q])
        while place < len(spans) and start_S[spans[place]] <= now:
            _open(trace, found, spans[place], stack, wrappers)
            place += 1
        while stack and stack[-1][0] < now:
            stack.pop()
        yield q, stack[-1][1] if stack else nothing


def _open(
    trace: ProfileTrace,
    found: dict[int, Found],
    span: int,
    stack: list[tuple[int, Open]],
    wrappers: set[int],
) -> None:
    start, took = int(trace.spans.start[span]), int(trace.spans.took[span])
    # one that only begins before the end of another (clocks are rounded) is not inside it
    while stack and stack[-1][0] <= start + took // 2:
        stack.pop()
    below = stack[-1][1] if stack else (NOBODY,) * 5
    opened = _opened(span, int(trace.spans.kind[span]), below, found, trace)
    if below[0] not in (NOBODY, opened[0]):
        wrappers.add(below[0])
    stack.append((start + took, opened))


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


@dataclass(frozen=True, eq=False)
class OwnTime:
    """G stretches of time in which an operation did not wait for one that it had called; S spans."""

    owner_G: NDArray[np.int64]
    start_G: NDArray[np.int64]
    took_G: NDArray[np.int64]
    is_outer_S: NDArray[np.bool_]  # no product inside another's

    @property
    def own_S(self) -> NDArray[np.int64]:
        total_S = np.zeros(len(self.is_outer_S), np.int64)
        np.add.at(total_S, self.owner_G, self.took_G)
        return total_S


def own_time(trace: ProfileTrace) -> OwnTime:
    """Each operation's time without those that it calls."""
    spans, stretches = trace.spans, list[tuple[int, int, int]]()
    is_outer_S = np.ones(len(spans), bool)
    for thread in np.unique(spans.thread):
        in_order = _in_order(trace, int(thread), spans.kind == OPERATION)
        stretches += _stretches(trace, in_order, is_outer_S)
    table = np.array(stretches, np.int64).reshape(-1, 3)
    return OwnTime(table[:, 0], table[:, 1], table[:, 2] - table[:, 1], is_outer_S)


def _stretches(
    trace: ProfileTrace, in_order: list[int], is_outer_S: NDArray[np.bool_]
) -> Iterator[tuple[int, int, int]]:
    """(operation, from, to) of one thread, each nanosecond once: the innermost that is open has it."""
    spans, now = trace.spans, -(2**63)
    stack: list[tuple[int, int, bool]] = []
    for s in [*in_order, NOBODY]:
        start, took = (int(spans.start[s]), int(spans.took[s])) if s != NOBODY else (2**63, 0)
        while stack and stack[-1][0] <= start + took // 2:
            end, owner, _ = stack.pop()
            end = min(end, start)
            if end > now:
                yield owner, now, end
            now = max(now, end)
        if s == NOBODY:
            return
        if stack and start > now:
            yield stack[-1][1], now, start
        in_product = bool(stack) and stack[-1][2]
        is_outer_S[s] = not in_product
        stack.append((start + took, s, in_product or bool(spans.flops[s])))
        now = max(now, start)


def _in_order(trace: ProfileTrace, thread: int, wanted_S: NDArray[np.bool_]) -> list[int]:
    """A thread's spans by their start; of those that begin together the longest first, as it holds the others."""
    spans = trace.spans
    place_S = np.flatnonzero((spans.thread == thread) & wanted_S)
    in_order = place_S[np.lexsort((-spans.took[place_S], spans.start[place_S]))]
    return [int(s) for s in in_order]
