"""One diagnosis and how it comes about: a profile in; times, operations, findings and advice out.

It reads files through the readers beside it, writes none and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.device import advice, tracelens
from analysis.device.advice import Recommendation
from analysis.device.attribution import BY_KERNEL, Work, attribute
from analysis.device.enclosing import asked_name
from analysis.device.findings import NO_MOE, Finding, findings_of, status_of
from analysis.device.names import Names
from analysis.device.offload import Offloaded
from analysis.device.operations import Active, Operation, operations_of
from analysis.device.profile_trace import ANNOTATION, FRAME, MODULE, ProfileTrace, read_profile
from analysis.device.roofline import Peaks
from analysis.device.shapes import Known, Shape
from analysis.device.shares import Times, times_of
from analysis.device.step_routing import Imbalance, StepRouting, fits, imbalance, ranks_to_show
from prefetch.errors import ConfigError

BY_NAME = (
    "Some kernels are known by their names alone, as nothing that launched them is MoE: the router's product and "
    "whatever else has a library's plain name is not among them, and layers are told apart by the order of kernels."
)
BY_NAME_IN_GRAPH = BY_NAME.replace(
    "as nothing that launched them is MoE", "as a captured graph launched them"
)
ONLY_MOE = (
    "TraceLens tables hold MoE only: shares of kernel time are not computable from this input."
)
NO_TABLE = (
    "The folder has no table of MoE operations; TraceLens leaves them out also where it does not know their names. "
    "Diagnose the profile itself (profile_trace=TRACE.json.gz) before believing it."
)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    status: str
    source: str
    times: Times | None  # None: tables tell no denominators
    operations: list[Operation]
    findings: list[Finding]
    recommendations: list[Recommendation]
    n_calls: int
    n_layers: int
    peaks: Peaks | None
    total_ms: float | None  # elapsed, idle included: what the seed's percent_of_compute divides by
    layer_us: pd.DataFrame  # call -> µs
    kernels: pd.DataFrame
    routing: StepRouting | None = None
    imbalances: Sequence[Imbalance] = ()
    offload: Offloaded | None = None
    notes: Sequence[str] = ()
    hinted: Sequence[str] = ()
    sections: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def moe_ns(self) -> int:
        return sum(op.time_ns for op in self.operations)

    @property
    def modelled_ns(self) -> int:
        return sum(op.time_ns for op in self.operations if op.is_modelled)


@dataclass(frozen=True, eq=False)
class Beside:
    """What a diagnosis has beyond the profile."""

    peaks: Peaks | None = None
    routing: StepRouting | None = None
    remedies: pd.DataFrame = field(default_factory=pd.DataFrame)
    offload: Offloaded | None = None
    sections: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile that was read and attributed, before anything is judged."""

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
    def n_steps(self) -> int:
        return max(1, sum(self.names.is_step(name) for name in self.annotations))

    @property
    def hinted(self) -> list[str]:
        """Modules of models that look like MoE, though nothing in them was found to be it."""
        spans, found = self.trace.spans, dict[str, None]()
        for name, kind in {(int(n), int(k)) for n, k in zip(spans.name, spans.kind, strict=True)}:
            if kind in (MODULE, FRAME) and self.names.hint(
                text := asked_name(self.trace.names[name], kind)
            ):
                found[text] = None
        return sorted(found)


def read(path: Path, names: Names) -> Profile:
    trace = read_profile(path, names)
    return Profile(trace, attribute(trace, names), names)


def diagnose(profile: Profile, known: Known, beside: Beside) -> Diagnosis:
    """A raw profile."""
    trace, work = profile.trace, profile.work
    operations = operations_of(trace, work, known, beside.peaks, active_of(beside.routing, known))
    times = times_of(trace, work)
    calls, layers = _count(profile)
    return _concluded(
        operations,
        known,
        beside,
        source=str(trace.path),
        times=times,
        n_calls=calls,
        n_layers=layers,
        total_ms=times.elapsed_ns / 1e6,
        layer_us=_by_call(work),
        kernels=_by_kernel(trace, work),
        hinted=profile.hinted if not operations else (),
        notes=[*_notes(profile, operations), *beside.notes],
    )


def diagnose_tables(found: tracelens.TraceLensOutput, known: Known, beside: Beside) -> Diagnosis:
    """Tables that TraceLens wrote: they hold operations, and no kernels or layers one by one."""
    calls = max((op.calls for op in found.operations), default=0)
    notes = [ONLY_MOE] if found.has_tables else [NO_TABLE]
    return _concluded(
        found.operations,
        known,
        Beside(**{**vars(beside), "peaks": found.peaks}),
        source=str(found.folder),
        times=None,
        n_calls=calls,
        n_layers=calls,
        total_ms=found.total_ms,
        layer_us=pd.DataFrame(columns=["call", "time_us"]),
        kernels=pd.DataFrame(),
        hinted=(),
        notes=[*notes, *beside.notes],
    )


def _concluded(
    operations: list[Operation], known: Known, beside: Beside, *, hinted: Sequence[str], **rest: Any
) -> Diagnosis:
    found = findings_of(operations)
    shape = layer_shape(operations)
    uneven = _imbalances(shape, known, beside, operations)
    todo = advice.advise(
        operations,
        found,
        moe_ns=sum(op.time_ns for op in operations) or 1,
        shape=shape,
        peaks=beside.peaks,
        routing=beside.routing,
        imbalances=uneven,
        remedies=beside.remedies,
        offload=beside.offload,
    )
    status = status_of(operations, hinted)
    return Diagnosis(
        status=status,
        operations=operations,
        findings=found,
        recommendations=[] if status == NO_MOE else todo,
        peaks=beside.peaks,
        routing=beside.routing,
        imbalances=uneven,
        offload=beside.offload,
        hinted=hinted,
        sections=beside.sections,
        **rest,
    )


def layer_shape(operations: Sequence[Operation]) -> Shape | None:
    """Of the longest expert product whose sizes are known."""
    return next((op.shape for op in operations if not op.shape.missing("experts")), None)


def active_of(routing: StepRouting | None, known: Known) -> Active | None:
    """Experts that a recorded step needed; of experts that are cut over ranks, the ranks' mean."""
    if routing is None:
        return None

    def active(shape: Shape) -> float | None:
        return (
            None
            if fits(routing.card, shape.experts, shape.top_k)
            else routing.active * shape.local_share
        )

    return active


def _imbalances(
    shape: Shape | None, known: Known, beside: Beside, operations: Sequence[Operation]
) -> list[Imbalance]:
    routing, peaks = beside.routing, beside.peaks
    if routing is None or shape is None or peaks is None:
        return []
    if reason := fits(routing.card, shape.experts, shape.top_k):
        raise ConfigError(f"trace={routing.source}: {reason}")
    tile = next((op.tile for op in operations if op.tile), None) or 1
    ranks = ranks_to_show(routing.card.n_experts, known.given.expert_parallel)
    return [imbalance(routing, shape, peaks, n, tile) for n in ranks]


def _count(profile: Profile) -> tuple[int, int]:
    """Passages through a MoE layer, and layers: modules have names; else passages of one step."""
    work, trace = profile.work, profile.trace
    calls = np.unique(work.call_W[work.call_W >= 0])
    scopes = np.unique(work.scope_W[work.is_moe_W & (work.scope_W >= 0)])
    names = {int(n) for n in trace.spans.name[scopes]}
    if len(scopes) and (trace.spans.kind[scopes] == MODULE).all():
        return len(calls), len(names)
    whole = len(calls) % profile.n_steps == 0
    return len(calls), len(calls) // profile.n_steps if whole else len(calls)


def _by_call(work: Work) -> pd.DataFrame:
    mine = work.call_W >= 0
    frame = pd.DataFrame(
        {
            "call": work.call_W[mine],
            "start_ns": work.start_W[mine],
            "time_us": work.took_W[mine] / 1e3,
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


def _by_kernel(trace: ProfileTrace, work: Work) -> pd.DataFrame:
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


def _notes(profile: Profile, operations: Sequence[Operation]) -> list[str]:
    """What a reader must know before believing the numbers."""
    trace, notes = profile.trace, []
    if trace.is_cpu:
        notes.append(
            "A profile of a CPU: time is what operations spend themselves, without those that they call."
        )
    if any(op.told_by == BY_KERNEL for op in operations):
        notes.append(BY_NAME_IN_GRAPH if profile.work.in_graph_W.any() else BY_NAME)
    if not operations and not trace.has_modules:
        notes.append(
            "The profile has no modules: a MoE layer that is a loop of plain operations cannot be told from a dense "
            "one. Record it with with_stack=True to be sure."
        )
    return notes
