"""From counts to the tables that a person reads: a row per predictor and horizon, by layer, by width, differences.

Headlines leave template rows out; rates are means over layers of a fold, and the mean over folds; intervals are drawn
over requests. It knows no predictor by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.predict import measures as m
from prefetch.predict.measures import BINS, CACHE_SHARE, Counts
from prefetch.predict.predictor import ANSWER
from prefetch.scoring import bootstrap
from prefetch.trace.card import ModelCard

NEW_TEXT, ALL_ROWS = "new_text", "all"
ENOUGH_REQUESTS = 10  # fewer give an interval that is far too narrow
DRAWS = 1000
HEADLINE = (
    "recall_at_k",
    "recall_at_2k",
    "exact_match",
    "first_layers_recall_at_k",
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
    rates = {name: _mean([fold[name] for fold in by_fold]) for name in by_fold[0]}
    hits_R, of_R = _requests(one.folds, h, part, m.HITS_K)
    low, high = _interval(hits_R, of_R, seed)
    two_low, two_high = _interval(*_requests(one.folds, h, part, m.HITS_2K), seed)
    return {
        "predictor": one.name,
        "mark": "cheats" if one.sees == ANSWER else "",
        "sees": one.sees,
        "horizon": horizon,
        "rows": part,
        "recall_at_k": rates["recall_at_k"],
        "low": low,
        "high": high,
        "recall_at_2k": rates["recall_at_2k"],
        "low_2k": two_low,
        "high_2k": two_high,
        "first_layers_recall_at_k": _mean([fold["recall_at_k"] for fold in first]),
        **{name: rates[name] for name in list(rates)[2:]},
        "calibration_error": _calibration_error(one.folds, h) if one.is_probability else math.nan,
        "parameter_bytes": one.parameter_bytes,
        "fit_seconds": one.fit_seconds,
        "predict_us_per_event": math.nan if one.event_us is None else one.event_us,
        "requests": len(of_R),
    }


def _layers(counts: Counts, h: int, part: str) -> NDArray[np.int64]:
    """[L, M]"""
    per_X = counts.layer_HXLM[h]
    return per_X[0] if part == NEW_TEXT else per_X.sum(axis=0)


def _rates(layer_LM: NDArray[np.int64], counts: Counts) -> dict[str, float]:
    """Means over layers; NaN where there is nothing to divide by."""

    def mean_of(above: int, below: int) -> float:
        seen = layer_LM[:, below] > 0
        return (
            float((layer_LM[seen, above] / layer_LM[seen, below]).mean())
            if seen.any()
            else math.nan
        )

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
    return rates


def _requests(
    folds: Sequence[Counts], h: int, part: str, column: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per tested request: the choices that were hit, and all choices, at the layers from the horizon on."""
    per_fold = []
    for counts in folds:
        per_XRM = counts.request_HXGRM[h, :, 1]
        per_fold.append(per_XRM[0] if part == NEW_TEXT else per_XRM.sum(axis=0))
    request_RM = np.concatenate(per_fold)
    return request_RM[:, column], request_RM[:, m.CHOICES]


def _interval(hits_R: NDArray[np.int64], of_R: NDArray[np.int64], seed: int) -> tuple[float, float]:
    told = of_R > 0
    if told.sum() < ENOUGH_REQUESTS:
        return math.nan, math.nan
    return bootstrap(hits_R[told], of_R[told], seed=seed, draws=DRAWS)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def differences(scored: Sequence[Scored], seed: int) -> pd.DataFrame:
    """The first predictor against every other one, on the same requests."""
    chosen, rows = scored[0], []
    for other in scored[1:]:
        for h, horizon in enumerate(chosen.horizons):
            hits_R, of_R = _requests(chosen.folds, h, NEW_TEXT, m.HITS_K)
            theirs_R, _ = _requests(other.folds, h, NEW_TEXT, m.HITS_K)
            told = of_R > 0
            gain_R = (hits_R - theirs_R)[told]
            low, high = _interval(gain_R, of_R[told], seed)
            rows.append(
                {
                    "predictor": chosen.name,
                    "against": other.name,
                    "horizon": horizon,
                    "gain_at_k": gain_R.sum() / max(1, int(of_R.sum())),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


def by_layer(scored: Sequence[Scored], card: ModelCard) -> pd.DataFrame:
    """Recall of every layer, of new text and of all rows; layers below the horizon are guessed as a token begins."""
    rows = []
    for one in scored:
        for h, horizon in enumerate(one.horizons):
            for part in (NEW_TEXT, ALL_ROWS):
                total_LM = sum(_layers(counts, h, part) for counts in one.folds)
                assert not isinstance(total_LM, int)
                for layer, sums in enumerate(total_LM):
                    of = max(1, int(sums[m.CHOICES]))
                    rows.append(
                        {
                            "predictor": one.name,
                            "horizon": horizon,
                            "rows": part,
                            "layer": card.layer_numbers[layer],
                            "is_first_layer": layer < horizon,
                            "choices": int(sums[m.CHOICES]),
                            "recall_at_k": sums[m.HITS_K] / of if sums[m.CHOICES] else math.nan,
                            "recall_at_2k": sums[m.HITS_2K] / of if sums[m.CHOICES] else math.nan,
                        }
                    )
    return pd.DataFrame(rows)


def by_width(scored: Sequence[Scored]) -> pd.DataFrame:
    """Recall at every width that was kept, new text, mean over the layers from the horizon on."""
    rows = []
    for one in scored:
        for h, horizon in enumerate(one.horizons):
            rank_LP = sum(counts.rank_HXLP[h, 0] for counts in one.folds)
            of_L = sum(counts.layer_HXLM[h, 0, :, m.CHOICES] for counts in one.folds)
            assert not isinstance(rank_LP, int) and not isinstance(of_L, int)
            seen = np.flatnonzero(of_L[horizon:]) + horizon
            recall_P = (rank_LP[seen].cumsum(axis=1) / of_L[seen, None]).mean(axis=0)
            rows += [
                {"predictor": one.name, "horizon": horizon, "width": width + 1, "recall": recall}
                for width, recall in enumerate(recall_P.tolist())
            ]
    return pd.DataFrame(rows)


def reliability(scored: Sequence[Scored]) -> pd.DataFrame:
    """Of the guesses with scores around p, how many were right; probabilities only."""
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
        "recall_at_k_all_rows": cells[chosen, ALL_ROWS, shortest]["recall_at_k"],
        "horizon": shortest,
    }
    far = cells.get((chosen, NEW_TEXT, 4), {})
    numbers |= {f"{name}_h4": far[name] for name in HEADLINE_FAR if name in far}
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
