"""Stage `analyze`: everything that a routing trace (or counts) can tell, as tables, figures and sentences."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.routing import words
from analysis.routing.batch import Plan
from analysis.routing.everything import Findings, Passes, Settings, analyze_counts, analyze_in
from analysis.routing.headline import metrics
from analysis.routing.paths import layer_names
from analysis.routing.statistics import GUIDE_FIELDS, SCHEMA
from prefetch.artifacts import Store
from prefetch.cluster.mapping import cluster_of
from prefetch.config import Config
from prefetch.runs.outputs import Outputs, write_json
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import load_counts
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance

log = logging.getLogger(__name__)


def run(cfg: Config, store: Store, outputs: Outputs) -> dict[str, float]:
    """A trace or counts in; the run's folder filled, and the headline numbers out."""
    artifact = store.need("routing", cfg)
    if artifact.kind == "counts":
        counts = load_counts(artifact.folder)
        card, provenance = counts.card, counts.provenance
        found = analyze_counts(counts, settings_of(cfg, card))
        counts_LE = counts.counts_LE
    else:
        reader = TraceReader(artifact.folder)
        card, provenance = reader.card, reader.provenance
        found = analyze_in(passes_of(cfg, reader), settings_of(cfg, card))
        assert found.usage is not None
        counts_LE = found.usage.counts()
    return _write(found, card, provenance, counts_LE, outputs, cfg)


def settings_of(cfg: Config, card: ModelCard) -> Settings:
    """As many layers ahead as were asked for, or as there are."""
    return Settings(
        horizons=tuple(range(1, min(cfg.analyze.horizon, card.n_layers) + 1)),
        train_share=cfg.analyze.train_share,
        significance=cfg.analyze.significance,
        window_tokens=cfg.analyze.window_tokens,
        seed=cfg.seed,
    )


def passes_of(cfg: Config, reader: TraceReader) -> Passes:
    """Over the trace in this process, or on the cluster that was chosen."""
    if (cluster := cluster_of(cfg)) is None:
        return Passes(reader)
    from analysis.routing.shares import Shares

    return Shares(trace=reader, cluster=cluster)


def _write(
    found: Findings,
    card: ModelCard,
    provenance: Provenance,
    counts_LE: Any,
    outputs: Outputs,
    cfg: Config,
) -> dict[str, float]:
    for name, frame in found.tables.items():
        outputs.table(name, frame)
    for name, frame in found.data.items():
        outputs.data(name, frame)
    if found.missing:
        rows = [{"table": name, "why": why} for name, why in found.missing.items()]
        outputs.table("missing", pd.DataFrame(rows))
    write_guide_files(found, card, counts_LE, outputs.folder)
    numbers = metrics(found, card.top_k, card.n_experts)
    outputs.metrics(numbers)
    text = words.summary(found, card, provenance, numbers)
    (outputs.folder / "summary.md").write_text(text)
    if cfg.analyze.figures:
        from analysis.routing.gallery import draw_all  # matplotlib: slow, and not everyone draws

        for path in draw_all(found, card, outputs.folder, footnote(card, provenance, found.plan)):
            if path.suffix == ".png":
                outputs.figure(path)
    print(words.for_terminal(text))
    return numbers


def footnote(card: ModelCard, provenance: Provenance, plan: Plan | None) -> str:
    """What a figure says of where it comes from."""
    tokens = "" if plan is None else f", {plan.survey.executed_rows:,} tokens"
    return f"{card.name}: {provenance.kind} routing, source {provenance.source}{tokens}"


def write_guide_files(found: Findings, card: ModelCard, counts_LE: Any, folder: Path) -> None:
    """The JSON files of the expert analysis guide, by its names and fields, with the conventions stated."""
    table = found.tables["statistics"]
    write_json(
        folder / "comprehensive_expert_statistics.json",
        {
            "analysis_type": "comprehensive_expert_statistics",
            "schema": {**SCHEMA, "layer_statistics": f"all {card.top_k} choices of a token"},
            "num_layers": card.n_layers,
            "num_experts": card.n_experts,
            "metrics_included": list(GUIDE_FIELDS),
            "layer_statistics": _guide_rows(table, card, "all"),
            "layer_statistics_first_choice": _guide_rows(table, card, "first"),
        },
    )
    write_json(folder / "proper_3d_statistics.json", _usage_json(card, counts_LE))
    if found.paths is not None:
        write_json(folder / "sample_trace_paths.json", found.paths.to_json())


def _guide_rows(table: pd.DataFrame, card: ModelCard, choices: str) -> dict[str, Any]:
    rows = table[(table.phase == "all") & (table.choices == choices)]
    named = zip(layer_names(card), card.layer_numbers, rows.to_dict("records"), strict=False)
    return {
        name: {"layer_id": number, **{field: _plain(row[field]) for field in GUIDE_FIELDS}}
        for name, number, row in named
    }


def _plain(value: Any) -> float | int | None:
    """A number as JSON has it; None for what is not defined (the skewness of an even layer)."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if np.isfinite(value) else None


def _usage_json(card: ModelCard, counts_LE: Any) -> dict[str, Any]:
    names = layer_names(card)
    rows = dict(zip(names, counts_LE.tolist(), strict=True))
    return {
        "format": "3D_layer_expert_frequency",
        "schema": {"statistics": "choices of every expert, zeros included", **SCHEMA},
        "description": "layer -> expert -> choices",
        "dimensions": [card.n_layers, card.n_experts],
        "structure": "statistics[layer][expert] = choices",
        "num_experts": card.n_experts,
        "num_layers": card.n_layers,
        "layers": names,
        "statistics": {
            name: dict(zip(map(str, range(len(row))), row, strict=True))
            for name, row in rows.items()
        },
        "layer_summaries": {
            name: {
                "active_experts": sum(count > 0 for count in row),
                "total_usage": sum(row),
                "diversity_percentage": 100 * sum(count > 0 for count in row) / card.n_experts,
            }
            for name, row in rows.items()
        },
    }
