"""Predicted against measured: errors, orders, and what naive predictors come to. It runs nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

APART = 0.05  # cells whose times differ by more have an order
NOTICED = 0.01  # of the time; a smaller stall has no relative error
# what must hold on a GPU
TARGETS = {
    "median_abs_error": 0.03,
    "worst_abs_error": 0.05,
    "worst_stall_error": 0.10,
    "pairs_in_order": 0.95,
}
NAIVE = ("roofline", "constants")
FILE = "file"  # the simulator, told the measured hardware file and nothing else
GROUP = ["model_card", "batch"]


def compared(predictions: list[dict[str, Any]], runs: list[list[dict[str, Any]]]) -> pd.DataFrame:
    """A row per cell: medians over its runs, equality in all of them."""
    rows = []
    for predicted, of_case in zip(predictions, runs, strict=True):
        measured = {
            name: float(np.median([run[name] for run in of_case]))
            for name in ("measured_ms", "measured_hit_rate", "measured_stall")
        }
        each = [run["measured_ms"] for run in of_case]
        rows.append(
            {
                **predicted,
                **measured,
                "error": predicted["predicted_ms"] / measured["measured_ms"] - 1,
                "free_hit_difference": measured["measured_hit_rate"]
                - predicted["predicted_hit_rate"],
                "engine_spread": (max(each) - min(each)) / float(np.median(each)),
                "hits_equal": all(run["hits_equal"] for run in of_case),
                "bytes_equal": all(run["bytes_equal"] for run in of_case),
            }
        )
    return pd.DataFrame(rows)


def headline(table: pd.DataFrame) -> dict[str, float]:
    error = table.error.abs()
    metrics = {
        "hits_equal": float(table.hits_equal.all()),
        "bytes_equal": float(table.bytes_equal.all()),
        "median_abs_error": float(error.median()),
        "worst_abs_error": float(error.max()),
        "median_signed_error": float(table.error.median()),
        "stall_error": float(stall_errors(table).median()),
        "worst_stall_error": float(stall_errors(table).max()),
        "rank_correlation": rank_correlation(table),
        "pairs_in_order": pairs_in_order(table),
        "engine_spread": float(table.engine_spread.median()),
        "free_hit_difference": float(table.free_hit_difference.abs().max()),
        "cells": float(len(table)),
    }
    for name in (*NAIVE, FILE):
        naive = table[f"{name}_ms"] / table.measured_ms - 1
        metrics[f"{name}_median_abs_error"] = float(naive.abs().median())
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def stall_errors(table: pd.DataFrame) -> pd.Series:
    """Of the time waited for copies, how far off, where either says that it is noticeable."""
    waits = table[table[["measured_stall", "predicted_stall"]].max(axis=1) > NOTICED]
    predicted = waits.predicted_stall * waits.predicted_ms
    return (predicted / (waits.measured_stall * waits.measured_ms) - 1).abs()


def rank_correlation(table: pd.DataFrame) -> float:
    """Kendall's tau of the policies, each with the same cache, guesses, batch and model; the mean over those."""
    taus = [
        kendalltau(part.predicted_ms, part.measured_ms).statistic
        for _, part in table.groupby([*GROUP, "capacity", "horizon"])
        if len(part) > 1
    ]
    return float(np.nanmean(taus)) if taus and not np.isnan(taus).all() else float("nan")


def pairs_in_order(table: pd.DataFrame) -> float:
    """Of pairs of cells of one model card and batch whose measured times are apart, who stands in the right order."""
    right, apart = 0, 0
    for _, part in table.groupby(GROUP):
        cells = list(zip(part.measured_ms.tolist(), part.predicted_ms.tolist(), strict=True))
        for (took_a, said_a), (took_b, said_b) in itertools.combinations(cells, 2):
            if abs(took_a / took_b - 1) > APART:
                apart += 1
                right += (took_a < took_b) == (said_a < said_b)
    return right / apart if apart else float("nan")
