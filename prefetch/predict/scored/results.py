"""From counts to the tables that a person reads: a row per predictor and horizon, by layer, by width, differences.

Headlines leave template rows and near copies out. Every rate is a mean over layers of a fold, and the mean over folds;
its interval is of the same. It knows no predictor by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.predict.predictor import ANSWER
from prefetch.predict.scored import measures as m
from prefetch.predict.scored.estimates import (
    Sums,
    holm,
    interval,
    interval_of_gain,
    mean,
    rate,
    ratio,
)
from prefetch.predict.scored.measures import BINS, CACHE_SHARE, Counts
from prefetch.trace.card import ModelCard

NEW_TEXT, ALL_ROWS = "new_text", "all"
WITH_COPIES = "with_copies"  # new text, and near copies of what was learnt from
MANY_COPIES = 0.03  # of the tested requests; a person should know of more
HEADLINE = (
    "recall_at_k",
    "recall_at_2k",
    "exact_match",
    "first_layers_recall_at_k",
    "recall_at_k_with_near_copies",
    "near_copies",
    "requests",
    "calibration_error",
    "parameter_bytes",
    "fit_seconds",
    "predict_us_per_event",
)
HEADLINE_FAR = ("recall_at_k", "recall_at_2k", "miss_recall", "useful_load_share")


@dataclass(frozen=True)
class Scored:
    """One predictor over the folds that were run."""

    name: str
    sees: str
    is_probability: bool
    folds: tuple[Counts, ...]
    parameter_bytes: int
    fit_seconds: float  # of one fold, on average
    event_us: float | None
    curve: tuple[dict[str, float], ...] = ()  # of a network: a row per fold, horizon and epoch

    @property
    def horizons(self) -> tuple[int, ...]:
        return self.folds[0].horizons


def summary(scored: Sequence[Scored], seed: int) -> pd.DataFrame:
    """A row per predictor, horizon and set of rows."""
    rows = [
        _row(one, h, part, seed)
        for one in scored
        for h in range(len(one.horizons))
        for part in (NEW_TEXT, ALL_ROWS)
    ]
    return pd.DataFrame(rows)


def _row(one: Scored, h: int, part: str, seed: int) -> dict[str, Any]:
    horizon = one.horizons[h]
    by_fold = [_rates(_layers(counts, h, part)[horizon:], counts) for counts in one.folds]
    first = [_rates(_layers(counts, h, part)[:horizon], counts) for counts in one.folds]
    with_copies = [_rates(_layers(c, h, WITH_COPIES)[horizon:], c) for c in one.folds]
    rates = {name: mean([fold[name] for fold in by_fold]) for name in by_fold[0]}
    low, high, *_ = interval(_sums(one, h, part, m.HITS_K), seed)
    two_low, two_high, *_ = interval(_sums(one, h, part, m.HITS_2K), seed)
    knows, knows_2k = _knows(one.folds[0])
    return {
        "predictor": one.name,
        "mark": "cheats" if one.sees == ANSWER else "",
        "sees": one.sees,
        "horizon": horizon,
        "rows": part,
        "split": one.folds[0].split,
        "recall_at_k": rates["recall_at_k"],
        "low": low if knows else math.nan,
        "high": high if knows else math.nan,
        "recall_at_2k": rates["recall_at_2k"],
        "low_2k": two_low if knows_2k else math.nan,
        "high_2k": two_high if knows_2k else math.nan,
        "first_layers_recall_at_k": mean([fold["recall_at_k"] for fold in first]),
        **{name: rates[name] for name in list(rates)[2:]},
        "recall_at_k_with_near_copies": mean([fold["recall_at_k"] for fold in with_copies]),
        "calibration_error": _calibration_error(one.folds, h) if one.is_probability else math.nan,
        "parameter_bytes": one.parameter_bytes,
        "fit_seconds": one.fit_seconds,
        "predict_us_per_event": math.nan if one.event_us is None else one.event_us,
        "requests": sum(int(_rows_R(counts, part).astype(bool).sum()) for counts in one.folds),
        "near_copies": sum(int(counts.row_XR[m.COPIES].astype(bool).sum()) for counts in one.folds),
    }


def _knows(counts: Counts) -> tuple[bool, bool]:
    """Are the lists long enough to tell recall at k, and at 2k? With all experts in it, a list always is."""
    k, two_k = (min(n * counts.top_k, counts.n_experts) for n in (1, 2))
    return counts.width >= k, counts.width >= two_k


def _rows_R(counts: Counts, part: str) -> NDArray[np.int64]:
    """[R] scored rows of every request."""
    return _of_part(counts.row_XR, part)


def _of_part(count_X: NDArray[np.int64], part: str) -> NDArray[np.int64]:
    chosen = {NEW_TEXT: [m.NEW], WITH_COPIES: [m.NEW, m.COPIES]}.get(part)
    return count_X.sum(axis=0) if chosen is None else count_X[chosen].sum(axis=0)


def _layers(counts: Counts, h: int, part: str) -> NDArray[np.int64]:
    """[L, M]"""
    return _of_part(counts.layer_HXLM[h], part)


def _rates(layer_LM: NDArray[np.int64], counts: Counts) -> dict[str, float]:
    """Means over layers; NaN where there is nothing to divide by, or where lists are too short to tell."""

    def mean_of(above: int, below: int) -> float:
        return ratio(layer_LM[:, above], layer_LM[:, below])

    has_cache = counts.n_experts // CACHE_SHARE >= counts.top_k
    rates = {
        "recall_at_k": mean_of(m.HITS_K, m.CHOICES),
        "recall_at_2k": mean_of(m.HITS_2K, m.CHOICES),
        "precision_at_k": mean_of(m.HITS_K, m.GUESSED_K),
        "exact_match": mean_of(m.EXACT, m.EVENTS),
        "rank_of_first_miss": mean_of(m.FIRST_MISS, m.EVENTS),
        "miss_recall": mean_of(m.MISSES_K, m.MISSES),
        "miss_recall_2k": mean_of(m.MISSES_2K, m.MISSES),
        "useful_load_share": mean_of(m.MISSES_K, m.LOADS_K),
        "useful_load_share_2k": mean_of(m.MISSES_2K, m.LOADS_2K),
        "lru_miss_rate": mean_of(m.MISSES, m.CHOICES),
    }
    if not has_cache:
        rates |= dict.fromkeys(
            [name for name in rates if "miss_r" in name or "load" in name], math.nan
        )
    knows, knows_2k = _knows(counts)
    unknown = [name for name in rates if "2k" in name] if not knows_2k else []
    if not knows:
        unknown = [name for name in rates if name != "lru_miss_rate"]
    return rates | dict.fromkeys(unknown, math.nan)


def _sums(one: Scored, h: int, part: str, column: int) -> list[Sums]:
    """Per fold and unit: the choices that were hit, and all choices, at the layers from the horizon on."""
    of_folds = []
    for counts in one.folds:
        unit_ULM = counts.unit_HYULM[h, 0 if part == NEW_TEXT else 1, :, one.horizons[h] :]
        of_folds.append(Sums(unit_ULM[:, :, column], unit_ULM[:, :, m.CHOICES]))
    return of_folds


def differences(scored: Sequence[Scored], seed: int) -> pd.DataFrame:
    """The first predictor against every other one, on the same requests; `p_holm` is of all comparisons together."""
    chosen, rows, chances = scored[0], list[dict[str, Any]](), list[float]()
    for other in scored[1:]:
        for h, horizon in enumerate(chosen.horizons):
            if not (_knows(chosen.folds[0])[0] and _knows(other.folds[0])[0]):
                continue
            ours, theirs = (_sums(one, h, NEW_TEXT, m.HITS_K) for one in (chosen, other))
            low, high, _, chance = interval_of_gain(ours, theirs, seed)
            chances.append(chance)
            rows.append(
                {
                    "predictor": chosen.name,
                    "against": other.name,
                    "horizon": horizon,
                    "gain_at_k": rate(ours) - rate(theirs),
                    "low": low,
                    "high": high,
                }
            )
    together = zip(rows, holm(chances), strict=True)
    return pd.DataFrame([row | {"p_holm": p} for row, p in together])


def recalls(folds_LM: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """At k and at 2k."""
    at_k, at_2k = (
        mean([ratio(sum_LM[:, hits], sum_LM[:, m.CHOICES]) for sum_LM in folds_LM])
        for hits in (m.HITS_K, m.HITS_2K)
    )
    return at_k, at_2k


def by_layer(scored: Sequence[Scored], card: ModelCard) -> pd.DataFrame:
    """Recall of every layer, of new text and of all rows; layers below the horizon are guessed as a token begins."""
    rows = []
    for one in scored:
        knows, knows_2k = _knows(one.folds[0])
        for h, horizon in enumerate(one.horizons):
            for part in (NEW_TEXT, ALL_ROWS):
                of_folds = [_layers(counts, h, part) for counts in one.folds]
                for layer in range(card.n_layers):
                    sums = [layer_LM[layer : layer + 1] for layer_LM in of_folds]
                    at_k, at_2k = recalls(sums)
                    rows.append(
                        {
                            "predictor": one.name,
                            "horizon": horizon,
                            "rows": part,
                            "layer": card.layer_numbers[layer],
                            "is_first_layer": layer < horizon,
                            "choices": sum(int(one_LM[0, m.CHOICES]) for one_LM in sums),
                            "recall_at_k": at_k if knows else math.nan,
                            "recall_at_2k": at_2k if knows_2k else math.nan,
                        }
                    )
    return pd.DataFrame(rows)


def by_width(scored: Sequence[Scored]) -> pd.DataFrame:
    """Recall at every width that was kept, new text, mean over the layers from the horizon on."""
    rows = []
    for one in scored:
        for h, horizon in enumerate(one.horizons):
            within = [counts.rank_HXLP[h, m.NEW, horizon:].cumsum(axis=1) for counts in one.folds]
            of = [counts.layer_HXLM[h, m.NEW, horizon:, m.CHOICES] for counts in one.folds]
            for width in range(one.folds[0].width):
                recall = mean(
                    [ratio(w_LP[:, width], of_L) for w_LP, of_L in zip(within, of, strict=True)]
                )
                rows.append(
                    {
                        "predictor": one.name,
                        "horizon": horizon,
                        "width": width + 1,
                        "recall": recall,
                    }
                )
    return pd.DataFrame(rows)


def reliability(scored: Sequence[Scored]) -> pd.DataFrame:
    """Of the guesses with scores around p, how many were right; probabilities, the rows of the headline, 2k guesses."""
    rows = []
    for one in scored:
        for h, horizon in enumerate(one.horizons) if one.is_probability else ():
            bin_BC = _bins(one.folds, h)
            for place in np.flatnonzero(bin_BC[:, 0]).tolist():
                guesses, scores, right = bin_BC[place].tolist()
                rows.append(
                    {
                        "predictor": one.name,
                        "horizon": horizon,
                        "bin_from": place / BINS,
                        "guesses": int(guesses),
                        "mean_score": scores / guesses,
                        "share_right": right / guesses,
                    }
                )
    return pd.DataFrame(rows)


def _bins(folds: Sequence[Counts], h: int) -> NDArray[np.float64]:
    return np.sum([counts.bin_HBC[h] for counts in folds], axis=0)


def _calibration_error(folds: Sequence[Counts], h: int) -> float:
    """Mean distance of score and share of right guesses over the bins, weighted by guesses (Naeini et al. 2015)."""
    bin_BC = _bins(folds, h)
    total = bin_BC[:, 0].sum()
    return float(np.abs(bin_BC[:, 1] - bin_BC[:, 2]).sum() / total) if total else math.nan


def by_fold(scored: Sequence[Scored]) -> pd.DataFrame:
    """Every fold on its own: how far they lie apart."""
    rows = []
    for one in scored:
        for number, counts in enumerate(one.folds):
            for h, horizon in enumerate(one.horizons):
                rates = _rates(_layers(counts, h, NEW_TEXT)[horizon:], counts)
                rows.append(
                    {
                        "predictor": one.name,
                        "fold": number,
                        "horizon": horizon,
                        "recall_at_k": rates["recall_at_k"],
                        "recall_at_2k": rates["recall_at_2k"],
                    }
                )
    return pd.DataFrame(rows)


def said_of_rows(table: pd.DataFrame, folds: int) -> str:
    """How many requests were tested, and how they were set apart."""
    row = table[table["rows"] == NEW_TEXT].iloc[0]
    n, copies = int(row.requests), int(row.near_copies)
    several = f"{n:,} request{'s' if n != 1 else ''}"
    said = {
        "requests": f"{several} tested, {folds} fold{'s' if folds > 1 else ''}",
        "time": f"the last part of too few requests tested ({several}), split in time",
        "whole": f"{several} tested, all of another trace",
    }[str(row.split)]
    return f"{said}; {copies:,} near copies left out" if copies else said


def warning_of_copies(table: pd.DataFrame) -> str:
    """Of a trace whose requests hold the same texts; empty where few do."""
    row = table[table["rows"] == NEW_TEXT].iloc[0]
    tested = int(row.requests) + int(row.near_copies)
    if row.near_copies <= MANY_COPIES * tested:
        return ""
    return (
        f"{int(row.near_copies):,} of {tested:,} tested requests are near copies of requests in the part to "
        f"learn from: they are no new text and not in the headline (with them {row.predictor} has recall@k "
        f"{row.recall_at_k_with_near_copies:.3f})"
    )


def headline(table: pd.DataFrame, chosen: str) -> dict[str, float]:
    """`metrics.json`: the chosen predictor at the shortest horizon, and at four layers with `_h4` in the name."""
    shortest = int(table.horizon.min())
    cells: dict[tuple[str, str, int], dict[str, Any]] = {
        (row["predictor"], row["rows"], row["horizon"]): {str(key): row[key] for key in row}
        for row in table.to_dict("records")
    }
    near = cells[chosen, NEW_TEXT, shortest]
    numbers = {name: near[name] for name in HEADLINE}
    numbers |= {
        "recall_at_k_low": near["low"],
        "recall_at_k_high": near["high"],
        "is_split_in_time": near["split"] == "time",
        "recall_at_k_all_rows": cells[chosen, ALL_ROWS, shortest]["recall_at_k"],
        "horizon": shortest,
    }
    numbers |= {name: near[name] for name in HEADLINE_FAR}
    far = cells.get((chosen, NEW_TEXT, 4), {})
    numbers |= {f"{name}_h4": far[name] for name in HEADLINE_FAR if name in far}
    numbers |= {f"recall_at_k_h4_{end}": far[end] for end in ("low", "high") if end in far}
    for baseline in ("popularity", "previous_token", "markov"):
        for horizon, suffix in ((shortest, ""), (4, "_h4")):
            if (baseline, NEW_TEXT, horizon) in cells:
                recall = cells[baseline, NEW_TEXT, horizon]["recall_at_k"]
                numbers[f"{baseline}_recall_at_k{suffix}"] = recall
    for suffix in ("", "_h4"):
        if {f"recall_at_k{suffix}", f"markov_recall_at_k{suffix}"} <= numbers.keys():
            gain = numbers[f"recall_at_k{suffix}"] - numbers[f"markov_recall_at_k{suffix}"]
            numbers[f"gain_over_markov{suffix}"] = gain
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
