"""Every table that a trace, or counts, can give: which passes it takes, and why a table is missing.

Three passes at most: what can be counted at once; what needs those counts (guesses, the optimum); and what the router's
scores and gate inputs tell, in small batches because they are wide. It writes no file and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.routing import balance, cache, coactivation, domains, families, gates, remedies
from analysis.routing.batch import ByPhase, Plan, accumulate, for_layers, plan_of
from analysis.routing.locality import Drift, Gaps, WorkingSets
from analysis.routing.paths import Paths
from analysis.routing.recall import Recall
from analysis.routing.router import RouterStatistics
from analysis.routing.statistics import Usage, layer_statistics, leading
from analysis.routing.transfer import DomainTransfer
from analysis.routing.transitions import NextTokens, Transitions
from analysis.routing.windows import Windows, capacity_curve
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.blocks import BLOCK_ROWS, Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts

WIDE_BYTES = 64 << 20  # of scores or gate inputs in one batch
NO_ORDER = "counts have no order: it takes a trace"


@dataclass
class Settings:
    """What a user may choose; `prefetch.config.AnalyzeConfig` documents each."""

    horizons: tuple[int, ...] = (1, 2, 3, 4)
    train_share: float = 0.7
    significance: float = 0.01
    window_tokens: int = 1024
    seed: int = 0


@dataclass
class Findings:
    """What one analysis found: tables by name, those too long to look at, and what is missing and why."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    data: dict[str, pd.DataFrame] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None
    paths: Paths | None = None
    usage: Usage | None = None
    joint_LEE: Any = None  # horizon 1, for the heat map

    @contextmanager
    def told(self, *names: str) -> Iterator[None]:
        """Whatever cannot be told inside is missing under these names."""
        try:
            yield
        except MissingData as reason:
            self.missing.update(dict.fromkeys(names, str(reason)))

    def tell(self, name: str, table: Callable[[], pd.DataFrame], *, long: bool = False) -> None:
        """A table, unless it has no rows or the trace cannot tell."""
        with self.told(name):
            frame = table()
            if frame.empty:
                raise MissingData("nothing of the kind occurs in this trace")
            (self.data if long else self.tables)[name] = frame


@dataclass(frozen=True, eq=False)
class Passes:
    """A trace, and how it is passed over: here, batch by batch."""

    trace: Traceable
    max_rows: int = BLOCK_ROWS

    def plan(self, *, train_share: float, seed: int) -> Plan:
        return plan_of(self.trace, train_share=train_share, seed=seed, max_rows=self.max_rows)

    def accumulate(
        self,
        plan: Plan,
        parts: list[Any],
        *recorded: str,
        title: str = "counting",
        most_rows: int | None = None,
    ) -> None:
        rows = min(self.max_rows, most_rows or self.max_rows)
        accumulate(self.trace, plan, parts, *recorded, title=title, max_rows=rows)


def analyze_trace(trace: Traceable, settings: Settings, max_rows: int = BLOCK_ROWS) -> Findings:
    """All that the routing of a trace tells."""
    return analyze_in(Passes(trace, max_rows), settings)


def analyze_in(passes: Passes, settings: Settings) -> Findings:
    """The same, whoever reads the trace."""
    found = Findings()
    plan = passes.plan(train_share=settings.train_share, seed=settings.seed)
    found.plan = plan
    first = _count(passes, plan, settings, found)
    _tell_counts(found, first, settings)
    _score(passes, plan, first, found)
    _look_at_gates(passes, plan, settings, found)
    return found


@dataclass
class _Counted:
    """The accumulators of the first pass; None where the trace cannot feed one."""

    usage: Usage
    next_tokens: NextTokens | None
    transitions: Transitions | None
    coactivation: coactivation.CoActivation | None
    domains: domains.Domains | None
    reuse: cache.ReuseDistances
    first_uses: cache.FirstUses
    working_sets: ByPhase[WorkingSets]
    gaps: ByPhase[Gaps]
    drift: Drift
    windows: Windows
    paths: Paths

    def all(self) -> list[Any]:
        return [part for part in vars(self).values() if part is not None]


def _count(passes: Passes, plan: Plan, settings: Settings, found: Findings) -> _Counted:
    pairs = (
        "transitions",
        "recall",
        "recall_curve",
        "recall_summary",
        "expert_transitions",
        "families",
    )
    parts: dict[str, Any] = dict.fromkeys(("next_tokens", "transitions", "coactivation", "domains"))
    with found.told(*pairs):
        parts["transitions"] = Transitions(plan, settings.horizons)
    with found.told("next_tokens"):
        parts["next_tokens"] = NextTokens(plan)
    with found.told("coactivation", "coactivation_summary", "expert_clusters"):
        parts["coactivation"] = coactivation.CoActivation(plan)
    with found.told(*DOMAIN_TABLES):
        parts["domains"] = domains.Domains(plan)
    counted = _Counted(
        usage=Usage(plan),
        reuse=cache.ReuseDistances(plan),
        first_uses=cache.FirstUses(plan),
        working_sets=ByPhase(plan, lambda: WorkingSets(plan)),
        gaps=ByPhase(plan, lambda: Gaps(plan)),
        drift=Drift(plan),
        windows=Windows(plan, settings.window_tokens),
        paths=Paths(plan),
        **parts,
    )
    passes.accumulate(plan, counted.all(), *plan.recorded("weights"))
    return counted


DOMAIN_TABLES = (
    "domain_usage",
    "domain_specialisation",
    "domain_information",
    "domain_accuracy",
    "domain_transfer",
)


def _tell_counts(found: Findings, counted: _Counted, settings: Settings) -> None:
    """Everything that the first pass knows."""
    usage, card, phases = counted.usage, counted.usage.plan.card, counted.usage.plan.phases
    found.usage, found.paths = usage, counted.paths
    found.tell("statistics", usage.table)
    together = counted.coactivation, counted.transitions, counted.next_tokens
    pieces = [piece for part in together if part is not None for piece in part.pieces()]
    for_layers(lambda i: pieces[i](), len(pieces))
    if counted.transitions is not None:
        _tell_transitions(found, counted.transitions)
    if counted.next_tokens is not None:
        found.tell("next_tokens", counted.next_tokens.table)
    if counted.coactivation is not None:
        found.tell("coactivation", counted.coactivation.pairs, long=True)
        found.tell("coactivation_summary", counted.coactivation.table)
        found.tell("expert_clusters", counted.coactivation.clusters)
    found.tell("reuse_distances", lambda: cache.reuse_distances(counted.reuse), long=True)
    found.tell("working_sets", lambda: counted.working_sets.table(lambda part: part.table()))
    found.tell("gaps", lambda: counted.gaps.table(lambda part: part.table()))
    found.tell("gap_histogram", lambda: counted.gaps.table(lambda part: part.histogram()))
    found.tell("drift", counted.drift.table)
    found.tell("usage_timeline", counted.drift.timeline, long=True)
    counts = {phase: (usage.counts(phase), usage.tokens(phase)) for phase in phases}
    tell_balance(found, counts, card, settings, counted.windows)
    _tell_windows(found, counted, settings)
    found.tell("paths", counted.paths.table, long=True)


def _tell_transitions(found: Findings, counted: Transitions) -> None:
    card = counted.plan.card
    found.tell("transitions", counted.table)
    found.tell("expert_transitions", counted.sparse, long=True)
    if 1 in counted.horizons:
        found.joint_LEE = counted.joint(1)
        margins = counted.here(1), counted.there(1), counted.tokens(1)
        found.tell(
            "families",
            lambda: families.families(counted.joint(1), *margins, card, spread=counted.spread),
        )


def tell_balance(
    found: Findings,
    counts: dict[str, tuple[Any, Any]],
    card: ModelCard,
    settings: Settings,
    windows: Windows | None = None,
) -> None:
    """Load and health from counts [L, E] and tokens [L] of every phase; windows know the whole trace only."""
    alpha, k = settings.significance, card.top_k

    def load() -> pd.DataFrame:
        frames = [
            balance.load(*counted, k, card, significance=alpha).assign(phase=phase)
            for phase, counted in counts.items()
        ]
        return leading(pd.concat(frames, ignore_index=True), "phase")

    def health() -> pd.DataFrame:
        frames = [
            balance.health(
                *counted, k, card, windows if phase == "all" else None, significance=alpha
            ).assign(phase=phase)
            for phase, counted in counts.items()
        ]
        return leading(pd.concat(frames, ignore_index=True), "phase")

    found.tell("load", load)
    found.tell("health", health)
    sets = found.tables.get("working_sets")
    sets = None if sets is None else sets[sets.phase == "all"]
    found.tell("memory", lambda: remedies.memory(counts["all"][0], sets, card))


def _tell_windows(found: Findings, counted: _Counted, settings: Settings) -> None:
    """What takes the windows, and what would help."""
    windows, usage, card = counted.windows, counted.usage, counted.usage.plan.card
    load = found.tables["load"]
    load, alpha = load[load.phase == "all"].drop(columns="phase"), settings.significance
    found.tell("capacity_factors", lambda: capacity_curve(windows))
    found.tell("hotspots", lambda: balance.hotspots(load, windows, card, significance=alpha))
    parts = usage.counts(part=TRAIN), usage.counts(part=TEST)
    found.tell("remedies", lambda: remedies.remedies(*parts, card, windows))


def _score(passes: Passes, plan: Plan, counted: _Counted, found: Findings) -> None:
    """The second pass: guesses from counts, the optimum, transitions carried to other domains."""
    optimal = cache.OptimalCurve(plan, counted.first_uses)
    recall = transfer = None
    if counted.transitions is not None:
        with found.told("recall", "recall_curve", "recall_summary"):
            recall = Recall(plan, counted.usage, counted.transitions)
    if counted.domains is not None:
        _tell_domains(found, counted.domains)
        with found.told("domain_transfer"):
            transfer = DomainTransfer(plan, counted.domains)
    parts = [part for part in (optimal, recall, transfer) if part is not None]
    passes.accumulate(plan, parts, title="scoring")
    if recall is not None:
        found.tell("recall_summary", recall.summary)
        found.tell("recall", recall.table)
        found.tell("recall_curve", recall.curve, long=True)
    if transfer is not None:
        found.tell("domain_transfer", transfer.table)
    curves = cache.cache_curves(counted.reuse, optimal)
    found.tell("cache_curves", lambda: curves, long=True)
    found.tell("cache_for_90", lambda: cache.capacity_for(curves, 0.9))


def _tell_domains(found: Findings, counted: domains.Domains) -> None:
    found.notes += counted.notes
    found.tell("domain_usage", counted.usage, long=True)
    found.tell("domain_specialisation", counted.specialisation)
    found.tell("domain_information", counted.information)
    found.tell("domain_accuracy", counted.accuracy)


def _look_at_gates(passes: Passes, plan: Plan, settings: Settings, found: Findings) -> None:
    """The third pass, over what is wide."""
    router = distances = lookahead = None
    with found.told("router", "router_probability"):
        router = RouterStatistics(plan)
    with found.told("gate_distances", "gate_distances_by_step", "gate_lookahead"):
        distances = gates.GateDistances(plan)
        with found.told("gate_lookahead"):
            decoder, encoder = gates.recorded_gates(passes.trace)
            lookahead = gates.Lookahead(plan, decoder, settings.horizons, encoder_weights=encoder)
    parts = [part for part in (router, distances, lookahead) if part is not None]
    if not parts:
        return
    columns = plan.recorded(
        "weights", "scores", "score_ids", *(("gate_inputs",) if distances else ())
    )
    rows = max(256, min(BLOCK_ROWS, WIDE_BYTES // _row_bytes(plan, columns)))
    passes.accumulate(plan, parts, *columns, title="reading scores and gates", most_rows=rows)
    if router is not None:
        found.tell("router", router.table)
        found.tell("router_probability", router.mean_probability, long=True)
        found.notes += router.notes
    if distances is not None:
        found.tell("gate_distances", distances.table)
        found.tell("gate_distances_by_step", distances.by_step, long=True)
    if lookahead is not None:
        found.tell("gate_lookahead", lookahead.table)


def _row_bytes(plan: Plan, columns: tuple[str, ...]) -> int:
    card = plan.card
    width = {"gate_inputs": card.hidden_size or 4096, "scores": card.n_experts}
    return sum(2 * card.n_layers * width.get(name, card.top_k) for name in columns) or 1


def analyze_counts(counts: ExpertCounts, settings: Settings) -> Findings:
    """What counts without order allow; whatever needs tokens is missing, and says so."""
    found, card = Findings(), counts.card
    frames = [layer_statistics(counts.counts_LE, card).assign(choices="all")]
    if card.top_k == 1:
        frames.append(layer_statistics(counts.counts_LE, card).assign(choices="first"))
    tokens_L = counts.counts_LE.sum(axis=1) // card.top_k
    table = pd.concat([f.assign(tokens=tokens_L) for f in frames], ignore_index=True)
    found.tell("statistics", lambda: leading(table.assign(phase="all"), "phase", "choices"))
    tell_balance(found, {"all": (counts.counts_LE, tokens_L)}, card, settings)
    found.missing |= dict.fromkeys(NEED_A_TRACE, NO_ORDER)
    return found


NEED_A_TRACE = (
    "cache_for_90",
    "coactivation_summary",
    "expert_transitions",
    "gap_histogram",
    "gate_distances_by_step",
    "paths",
    "recall_curve",
    "recall_summary",
    "reuse_distances",
    "router_probability",
    "usage_timeline",
    "transitions",
    "next_tokens",
    "recall",
    "cache_curves",
    "working_sets",
    "gaps",
    "drift",
    "coactivation",
    "expert_clusters",
    "families",
    *DOMAIN_TABLES,
    "router",
    "gate_distances",
    "gate_lookahead",
    "capacity_factors",
    "hotspots",
    "remedies",
)
