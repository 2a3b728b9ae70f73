"""Which pictures an analysis has: each is drawn from the tables that were found, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.routing import group_pictures, pictures
from analysis.routing.everything import Findings
from analysis.routing.paths import layer_names
from analysis.routing.words import knows_ranks
from prefetch.progress import Progress
from prefetch.trace.card import ModelCard

LEAST_SEEN = 0.01  # of what the layer that saw most has of a phase
SEEN = ("tokens", "accesses", "mean")  # columns that say how much a layer saw; `mean` is of choices


def draw_all(found: Findings, card: ModelCard, folder: Path, note: str) -> list[Path]:
    """Every picture whose tables there are, as SVG and PNG."""
    drawn: list[Path] = []
    tables = {name: well_seen(table) for name, table in (found.tables | found.data).items()}
    if len(tables["statistics"]) < len(found.tables["statistics"]):
        note = f"Layers with under {LEAST_SEEN:.0%} of a phase's choices are not drawn. {note}"
    todo = [(needs, draw) for needs, draw in _pictures(found, card) if needs <= set(tables)]
    with Progress("drawing", len(todo), "pictures") as progress:
        for _, draw in todo:
            drawn += draw(tables, folder, note)
            progress.advance()
    return drawn


Draw = Callable[[dict[str, pd.DataFrame], Path, str], list[Path]]


def _pictures(found: Findings, card: ModelCard) -> list[tuple[set[str], Draw]]:
    """(the tables that it needs, how it is drawn)"""
    n_experts, top_k = card.n_experts, card.top_k
    empty, is_ranked = pd.DataFrame(), knows_ranks(found, card)
    return [
        ({"load"}, lambda t, *to: pictures.layer_expert_frequency(_all(t["load"]), *to)),
        (
            {"statistics"},
            lambda t, *to: pictures.comparative_layer_statistics(t["statistics"], *to),
        ),
        (
            {"paths"},
            lambda t, *to: pictures.expert_selection_traces(
                t["paths"], *to, n_experts=n_experts, is_ranked=is_ranked
            ),
        ),
        (
            {"expert_transitions"},
            lambda _, *to: pictures.expert_transition_heatmap(_joint(found, card), *to),
        ),
        (
            {"usage_timeline"},
            lambda t, *to: pictures.expert_usage_timeline(
                t["usage_timeline"], *to, n_experts=n_experts
            ),
        ),
        (
            {"statistics"},
            lambda t, *to: pictures.entropy_by_layer(
                t["statistics"],
                t.get("transitions", empty),
                t.get("next_tokens", empty),
                *to,
                n_experts=n_experts,
                top_k=top_k,
            ),
        ),
        (
            {"recall_curve"},
            lambda t, *to: pictures.recall_by_horizon(
                t["recall_curve"], *to, top_k=top_k, summary=t["recall_summary"]
            ),
        ),
        (
            {"cache_curves"},
            lambda t, *to: pictures.cache_curves(
                t["cache_curves"], *to, n_experts=n_experts, top_k=top_k
            ),
        ),
        (
            {"domain_usage", "domain_information"},
            lambda t, *to: group_pictures.domain_usage(
                t["domain_usage"],
                t["domain_information"],
                t.get("domain_transfer", empty),
                *to,
                n_experts=n_experts,
            ),
        ),
        (
            {"coactivation"},
            lambda t, *to: group_pictures.coactivation(
                t["coactivation"], t.get("expert_clusters", empty), *to, n_experts=n_experts
            ),
        ),
        (
            {"health"},
            lambda t, *to: group_pictures.balance_overview(
                _all(t["health"]), t.get("capacity_factors", empty), *to
            ),
        ),
        (
            {"gate_distances"},
            lambda t, *to: group_pictures.gate_inputs(
                t["gate_distances"], t.get("gate_lookahead", empty), *to
            ),
        ),
    ]


def well_seen(table: pd.DataFrame) -> pd.DataFrame:
    """Without the layers that saw nearly nothing of their phase (a last layer runs for one token of each prompt).

    Their numbers are of a handful of tokens, and would set the scale of all others.
    """
    weight = next((name for name in SEEN if name in table), None)
    if weight is None or not {"layer", "phase"} <= set(table):
        return table
    most = table.groupby("phase")[weight].transform("max")
    return table[table[weight] >= LEAST_SEEN * most]


def _all(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.phase == "all"]


def _joint(found: Findings, card: ModelCard) -> list[tuple[int | str, int | str, Any]]:
    names: list[int | str] = list(layer_names(card))
    return list(zip(names, names[1:], found.joint_LEE, strict=False))
