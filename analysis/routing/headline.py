"""The few numbers of an analysis that runs are compared by, `metrics.json`: means over layers, absent where unknown."""

from __future__ import annotations

import math

import pandas as pd

from analysis.routing.everything import Findings

SPELT = {"markov_shuffled": "markov_recall_at_k_shuffled"}


def metrics(found: Findings, top_k: int, n_experts: int) -> dict[str, float]:
    """Flat, finite numbers only: what a trace cannot tell is not there."""
    tables = found.tables
    numbers: dict[str, float] = {}
    numbers |= _of_usage(tables)
    if "transitions" in tables:
        rows = where(tables["transitions"], phase="all", horizon=1)
        for name in (
            "conditional_entropy_bits",
            "mutual_information_bits",
            "mutual_information_shuffled_bits",
            "mutual_information_shifted_bits",
        ):
            numbers[name] = rows[name].mean()
    if "recall_summary" in tables:
        numbers |= _of_recall(tables["recall_summary"])
    if "next_tokens" in tables:
        rows = where(tables["next_tokens"], phase="all")
        numbers["repeat_rate"] = rows.repeat_rate.mean()
        numbers["conditional_entropy_previous_token_bits"] = rows.conditional_entropy_bits.mean()
    if "cache_curves" in found.data:
        numbers |= _of_cache(found.data["cache_curves"], n_experts)
    if "gate_lookahead" in tables:
        numbers |= _of_gates(tables["gate_lookahead"])
    if "domain_accuracy" in tables:
        rows = tables["domain_accuracy"]
        numbers["domain_accuracy"] = rows.accuracy.iloc[0]
    if found.plan is not None:
        survey = found.plan.survey
        numbers |= {"tokens": survey.executed_rows, "requests": len(survey.request_R)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _of_usage(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    rows = where(tables["statistics"], phase="all", choices="all")
    rows = rows[rows.total_usage > 0]  # a layer that never ran has no entropy
    return {
        "entropy_bits": rows.entropy_bits.mean(),
        "normalized_entropy": rows.normalized_entropy.mean(),
        "effective_experts": rows.effective_experts.mean(),
        "gini": rows.gini.mean(),
        "max_violation": rows.max_violation.mean(),
        "dead_experts": where(tables["health"], phase="all").dead_experts.mean(),
    }


def _of_recall(summary: pd.DataFrame) -> dict[str, float]:
    """At horizon 1, or at the shortest there is; longer ones with their horizon in the name."""
    numbers = {}
    rows = where(summary, part="all")
    shortest = rows.horizon.min()
    cells = zip(rows.predictor, rows.horizon, rows.recall_at_k, strict=True)
    for predictor, horizon, recall in cells:
        suffix = "" if horizon == shortest else f"_horizon_{horizon}"
        name = SPELT.get(predictor, f"{predictor}_recall_at_k")
        numbers[f"{name}{suffix}"] = float(recall)
    markov = where(rows, horizon=shortest, predictor="markov")
    low, high = float(markov.low.iloc[0]), float(markov.high.iloc[0])
    return numbers | {"markov_recall_at_k_low": low, "markov_recall_at_k_high": high}


def _of_cache(curves: pd.DataFrame, n_experts: int) -> dict[str, float]:
    """A cache of a quarter of the experts, in every layer; absent where an event does not fit it."""
    rows = where(curves, phase="all", capacity=n_experts // 4)
    return {
        "lru_hit_rate_25": rows.lru_hit_rate.mean(),
        "optimal_hit_rate_25": rows.optimal_hit_rate.mean(),
    }


def _of_gates(lookahead: pd.DataFrame) -> dict[str, float]:
    rows = where(lookahead, phase="all")
    ahead = rows[rows.horizon > 0]
    numbers = {"own_gate_recall_at_k": where(rows, horizon=0).recall_at_k.mean()}
    for horizon, group in ahead.groupby("horizon"):
        suffix = "" if horizon == 1 else f"_horizon_{horizon}"
        numbers[f"lookahead_recall_at_k{suffix}"] = group.recall_at_k.mean()
    return numbers


def where(frame: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame
