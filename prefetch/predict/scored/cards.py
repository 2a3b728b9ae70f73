"""What the cards of guesses say beside their scores: what was known, and how the time of an event was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import pandas as pd

from prefetch.trace.predictions import PredictionsCard

Cards = Sequence[PredictionsCard]  # of one predictor, one per fold


def mean_event_us(cards: Cards) -> float | None:
    known = [card.event_us for card in cards if card.event_us is not None]
    return fmean(known) if known else None


def add_to(table: pd.DataFrame, cards: Mapping[str, Cards]) -> None:
    """Columns of the table `predictors`: `mark` of all that is not decode, and how times were found."""
    of_row = [cards[name] for name in table.predictor]
    table["mark"] = [_mark(each) for each in of_row]
    at = table.columns.get_loc("predict_us_per_event")
    assert isinstance(at, int)
    table.insert(at + 1, "predict_us_p99", [_mean_p99(each) for each in of_row])
    table.insert(at + 2, "predict_us_from", [_only(c.event_us_from for c in e) for e in of_row])


def _mark(cards: Cards) -> str:
    """Only decode rows can be compared: others knew more, or less."""
    causality = _only(card.causality for card in cards)
    return "" if causality == "decode" else causality


def _mean_p99(cards: Cards) -> float:
    known = [card.event_us_p99 for card in cards if card.event_us_p99 is not None]
    return fmean(known) if known else math.nan


def _only(words: Iterable[str | None]) -> str:
    return " + ".join(sorted({word for word in words if word}))
