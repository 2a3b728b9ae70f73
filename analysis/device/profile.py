"""A profile that was read and attributed, before anything is judged: its steps, passages, layers and kernels.

It knows no shape, cost or hardware. W pieces of work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.device.attribution import Work, attribute
from analysis.device.enclosing import around, asked_name, looks_like_moe
from analysis.device.names import Found, Names
from analysis.device.profile_trace import (
    ANNOTATION,
    MODULE,
    NOBODY,
    ProfileTrace,
    read_profile,
)

MOST_HINTED = 12  # names whose time is looked up


@dataclass(frozen=True, eq=False)
class Profile:
    trace: ProfileTrace
    work: Work
    names: Names

    @property
    def annotations(self) -> list[str]:
        spans = self.trace.spans
        return [self.trace.names[n] for n in spans.name[spans.kind == ANNOTATION]]

    @property
    def step_tokens(self) -> int | None:
        """None where steps differ: their mean would be nobody's."""
        found = {tokens for name in self.annotations if (tokens := self.names.tokens_of(name))}
        return found.pop() if len(found) == 1 else None

    @property
    def is_decode(self) -> bool | None:
        """Whether all annotated steps only generate; None where that is not told."""
        found = {
            told for name in self.annotations if (told := self.names.is_decode(name)) is not None
        }
        return found.pop() if len(found) == 1 else None

    @property
    def hinted(self) -> dict[str, int]:
        """What looks like MoE though no work was found to be it, and the ns of work inside."""
        spans, looks = self.trace.spans, dict[str, dict[int, Found]]()
        pairs = np.stack([spans.name, spans.kind])[:, spans.kind != ANNOTATION]
        for name, kind in np.unique(pairs, axis=1).T.tolist():
            text = asked_name(self.trace.names[name], kind)
            answer = looks_like_moe(text, kind, self.names)
            if answer is not None:
                mine_S = np.flatnonzero((spans.name == name) & (spans.kind == kind))
                looks.setdefault(text, {}).update(dict.fromkeys(mine_S.tolist(), answer))
        listed = sorted(looks.items())[:MOST_HINTED]
        return {text: self._inside(found) for text, found in listed}

    def _inside(self, found: dict[int, Found]) -> int:
        work = self.work
        near = around(self.trace, found, work.thread_W, work.at_W)
        return int(work.took_W[near.scope_Q != NOBODY].sum())


@dataclass(frozen=True)
class Counts:
    """Passages through a MoE layer, layers, and what tells how many layers there are."""

    calls: int
    layers: int | None
    told_by: str


def read(path: Path, names: Names) -> Profile:
    trace = read_profile(path, names)
    return Profile(trace, attribute(trace, names), names)


def counts_of(profile: Profile, layers_of_card: int | None = None) -> Counts:
    """Modules have numbers; else passages of one step."""
    work, trace = profile.work, profile.trace
    calls = len(np.unique(work.call_W[work.call_W >= 0]))
    scopes = np.unique(work.scope_W[work.is_moe_W & (work.scope_W >= 0)])
    found = Counts(calls, calls, "if the profile is of one step")
    if len(scopes) and (trace.spans.kind[scopes] == MODULE).all():
        n_modules = len({int(n) for n in trace.spans.name[scopes]})
        return replace(found, layers=n_modules, told_by="by their modules")
    n_steps = profile.names.n_steps(profile.annotations)
    if n_steps and calls % n_steps == 0:
        plural = "s" if n_steps > 1 else ""
        told = f"by {n_steps:,} annotated step{plural}"
        return replace(found, layers=calls // n_steps, told_by=told)
    if layers_of_card and calls and calls % layers_of_card == 0:
        return replace(found, layers=layers_of_card, told_by="by the model card")
    return found


def by_call(work: Work) -> pd.DataFrame:
    """Time of each passage, in the order in which they began."""
    mine_W = work.call_W >= 0
    frame = pd.DataFrame(
        {
            "call": work.call_W[mine_W],
            "start_ns": work.start_W[mine_W],
            "time_us": work.took_W[mine_W] / 1e3,
        }
    )
    if frame.empty:
        return pd.DataFrame(columns=["call", "kernels", "time_us"])
    grouped = frame.groupby("call").agg(
        start_ns=("start_ns", "min"), kernels=("time_us", "size"), time_us=("time_us", "sum")
    )
    ordered = grouped.sort_values("start_ns").drop(columns="start_ns").reset_index(drop=True)
    ordered.insert(0, "call", np.arange(len(ordered)))
    return ordered


def by_kernel(trace: ProfileTrace, work: Work) -> pd.DataFrame:
    """Every kernel of the profile by name, MoE or not."""
    frame = pd.DataFrame(
        {
            "kernel": [trace.names[n] for n in work.name_W],
            "is_moe": work.is_moe_W,
            "role": work.role_W.astype(str),
            "found_by": work.told_by_W.astype(str),
            "time_us": work.took_W / 1e3,
        }
    )
    keys = ["kernel", "is_moe", "role", "found_by"]
    grouped = frame.groupby(keys, as_index=False).agg(
        count=("time_us", "size"), time_us=("time_us", "sum")
    )
    return grouped.sort_values("time_us", ascending=False, kind="stable").reset_index(drop=True)
