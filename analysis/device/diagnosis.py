"""One diagnosis and how it comes about: a profile in; times, operations, findings and advice out.

It reads files through the readers beside it, writes none and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from analysis.device import tracelens
from analysis.device.advice import Recommendation, advise
from analysis.device.attribution import BY_KERNEL
from analysis.device.beside import Beside, active_of, check_routing, imbalances_of, layer_shape
from analysis.device.doubts import doubts_of, fitting_cards
from analysis.device.findings import NO_MOE, Finding, findings_of, status_of
from analysis.device.offload import Offloaded
from analysis.device.operations import Operation, operations_of
from analysis.device.profile import Counts, Profile, by_call, by_kernel, counts_of, read
from analysis.device.roofline import Peaks
from analysis.device.shapes import Known
from analysis.device.shares import Times, times_of
from analysis.device.step_routing import Imbalance, StepRouting

__all__ = ["Beside", "Diagnosis", "Profile", "diagnose", "diagnose_tables", "read"]
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
NOT_MODULES = (
    "The profile has no modules: a MoE layer that is a loop of plain operations cannot be told from a dense one. "
    "Record it with with_stack=True to be sure."
)
OWN_TIME = (
    "A profile of a CPU: time is what operations spend themselves, without those that they call."
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
    n_layers: int | None
    peaks: Peaks | None
    total_ms: float | None  # elapsed, idle included: what the seed's percent_of_compute divides by
    layer_us: pd.DataFrame  # call -> µs
    kernels: pd.DataFrame
    layers_told_by: str = ""
    routing: StepRouting | None = None
    imbalances: Sequence[Imbalance] = ()
    offload: Offloaded | None = None
    doubts: Sequence[str] = ()  # what may make the numbers wrong: said before them
    notes: Sequence[str] = ()
    hinted: Mapping[str, int] = field(default_factory=dict)  # looks like MoE -> ns inside it
    sections: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def moe_ns(self) -> int:
        return sum(op.time_ns for op in self.operations)

    @property
    def modelled_ns(self) -> int:
        return sum(op.time_ns for op in self.operations if op.is_modelled)


def diagnose(profile: Profile, known: Known, beside: Beside) -> Diagnosis:
    """A raw profile."""
    trace, work = profile.trace, profile.work
    operations = operations_of(trace, work, known, beside.peaks, active_of(beside.routing))
    times = times_of(trace, work)
    counts = counts_of(profile, len(known.card.moe_layers) if known.card else None)
    return _concluded(
        operations,
        known,
        beside,
        counts=counts,
        source=str(trace.path),
        times=times,
        total_ms=times.elapsed_ns / 1e6,
        layer_us=by_call(work),
        kernels=by_kernel(trace, work),
        hinted=profile.hinted if not operations else {},
        notes=[*fitting_cards(known, operations, counts), *_notes(profile, operations)],
        has_modules=trace.has_modules,
    )


def diagnose_tables(found: tracelens.TraceLensOutput, known: Known, beside: Beside) -> Diagnosis:
    """Tables that TraceLens wrote: they hold operations, and no kernels or layers one by one."""
    calls = max((op.calls for op in found.operations), default=0)
    layers = len(known.card.moe_layers) if known.card else None
    return _concluded(
        found.operations,
        known,
        replace(beside, peaks=found.peaks),
        counts=Counts(calls, layers, "by the model card"),
        source=str(found.folder),
        times=None,
        total_ms=found.total_ms,
        layer_us=pd.DataFrame(columns=["call", "time_us"]),
        kernels=pd.DataFrame(),
        hinted={},
        notes=[ONLY_MOE if found.has_tables else NO_TABLE],
    )


def _concluded(
    operations: list[Operation],
    known: Known,
    beside: Beside,
    *,
    counts: Counts,
    notes: Sequence[str],
    has_modules: bool = True,
    **rest: Any,
) -> Diagnosis:
    of_routing = check_routing(beside, known, operations, counts.layers)
    found, shape = findings_of(operations), layer_shape(operations)
    uneven = imbalances_of(shape, known, beside, operations)
    status, elapsed_ns = status_of(operations, rest["hinted"]), (rest["total_ms"] or 0.0) * 1e6
    return Diagnosis(
        status=status, operations=operations, findings=found, n_calls=counts.calls, n_layers=counts.layers,
        layers_told_by=counts.told_by, peaks=beside.peaks, routing=beside.routing, imbalances=uneven,
        offload=beside.offload, sections=beside.sections, notes=[*notes, *beside.notes, *of_routing],
        doubts=[*doubts_of(known, operations, counts, has_modules=has_modules), *beside.doubts],
        recommendations=[] if status == NO_MOE else advise(
            operations, found, shape, beside, uneven, elapsed_ns=elapsed_ns, is_cut=known.given.cuts_experts
        ), **rest,
    )  # fmt: skip


def _notes(profile: Profile, operations: Sequence[Operation]) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [OWN_TIME] if profile.trace.is_cpu else []
    if any(op.told_by == BY_KERNEL for op in operations):
        notes.append(BY_NAME_IN_GRAPH if profile.work.in_graph_W.any() else BY_NAME)
    if not operations and not profile.trace.has_modules:
        notes.append(NOT_MODULES)
    return notes
