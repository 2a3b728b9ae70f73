"""A few tokens of a run, nanosecond by nanosecond: what GPU, link and host did, as spans and as a trace file.

It decides nothing: the plain timed engine runs the cell, and a recorder listens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefetch.sim.engines.machine import no_guesses
from prefetch.sim.engines.recorder import LANES, Recorder, Span
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.excerpt import cell_of, work_of
from prefetch.sim.workload import MIXED, Workload

SHOWN_TOKENS, WARM_STEPS = 3, 64
MOST_WORK = 2e7  # accesses times slots: the plain engine looks through them one by one


@dataclass(frozen=True, eq=False)
class Timeline:
    """Spans that touch the shown tokens, cut to them; times count from the first one's beginning."""

    spans: tuple[Span, ...]
    begins_ns: tuple[int, ...]  # of every shown step, and the end of the last
    warm_steps: int  # that ran before
    start: str  # what those began from
    request: int  # MIXED where steps serve several


def timeline_of(cell: Cell, work: Workload, *, tokens: int = SHOWN_TOKENS) -> Timeline | None:
    """A few tokens that follow on others of the same request (of the same run, where requests share steps).

    None where no token is generated.
    """
    steps = _steps(work, max(1, *cell.budget.slots_G), tokens)
    if steps is None:
        return None
    first, shown, last = steps
    done = recorded(cell_of(cell, first, last), work_of(work, first, last))
    begins = done.begins()[shown - first :]
    return Timeline(
        cut(done.spans, begins[0], begins[-1]),
        tuple(at - begins[0] for at in begins),
        shown - first,
        cell.start_words,
        MIXED if (work.request_S == MIXED).any() else int(work.request_S[shown]),
    )


def recorded(cell: Cell, work: Workload) -> Recorder:
    budget = cell.budget
    recorder = Recorder(
        work,
        cell.policy,
        budget.room_G,
        budget.size_L,
        cell.machine,
        cell.guesses or no_guesses(),
        cell.semantics,
        told=cell.told,
        warm=cell.warm.tolist(),
        pinned=cell.pinned.tolist(),
    )
    recorder.run()
    return recorder


def _steps(work: Workload, slots: int, tokens: int) -> tuple[int, int, int] | None:
    """Where the run begins, where what is shown begins, and where it ends."""
    edges = np.flatnonzero(np.diff(work.request_S)) + 1
    if (work.request_S == MIXED).any():  # served side by side: from the beginning
        edges = edges[:0]
    starts, ends = np.append(0, edges), np.append(edges, work.n_steps)
    decoding = [
        np.flatnonzero(work.is_decode_S[a:b]) + a for a, b in zip(starts, ends, strict=True)
    ]
    wanted = min(WARM_STEPS + tokens, max(map(len, decoding), default=0))
    if not wanted:
        return None
    i = next(i for i, steps in enumerate(decoding) if len(steps) >= wanted)
    shown_steps = decoding[i][max(0, wanted - tokens) : wanted]
    shown, last = int(shown_steps[0]), int(shown_steps[-1]) + 1
    accesses_S = work.start_V[:: work.card.n_layers]
    is_cheap_S = (accesses_S[last] - accesses_S[starts[i] : shown]) * slots <= MOST_WORK
    return shown - int(is_cheap_S.sum()), shown, last


def cut(spans: Sequence[Span], begin: int, end: int) -> tuple[Span, ...]:
    """What lies between, counted from the beginning."""
    inside = []
    for span in spans:
        a, b = max(begin, span.begin_ns), min(end, span.end_ns)
        if a < b:
            inside.append(dataclasses.replace(span, begin_ns=a - begin, took_ns=b - a))
    return tuple(inside)


def write_chrome_trace(path: Path, shown: Timeline, title: str) -> None:
    """For Perfetto or chrome://tracing: complete events in microseconds, a thread per lane."""
    names = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": title}},
        *(
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": lane}}
            for tid, lane in enumerate(LANES, 1)
        ),
    ]
    events = [_complete(span) for span in sorted(shown.spans, key=lambda span: span.begin_ns)]
    about = {"warm_steps": shown.warm_steps, "start": shown.start, "request": shown.request}
    about["times"] = "simulated"
    told = {"traceEvents": names + events, "displayTimeUnit": "ns", "otherData": about}
    path.write_text(json.dumps(told) + "\n")


def _complete(span: Span) -> dict[str, Any]:
    about = {"step": span.step, "layer": span.layer}
    if span.expert >= 0:
        about["expert"] = span.expert
    return {
        "name": span.kind,
        "cat": span.lane,
        "ph": "X",
        "pid": 1,
        "tid": 1 + LANES.index(span.lane),
        "ts": span.begin_ns / 1000,
        "dur": span.took_ns / 1000,
        "args": about,
    }
