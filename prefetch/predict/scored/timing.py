"""What one guess costs: one event observed and one layer guessed through the incremental face, on one thread.

Who has no incremental face is timed in a block of tokens: an event's share of it, which an engine would not reach.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import Predictor, cheats, declared

EVENTS = 3000  # timed ones
WARM_UP = 300  # before them: compilation, caches
BATCH_TOKENS = 256


class EventTime(NamedTuple):
    """Microseconds per event, and how they were found."""

    us: float | None = None  # the median
    measured: str | None = None  # of predictions.TIMED
    p99_us: float | None = None  # of single events only


def event_time(predictor: Predictor, part: Part) -> EventTime:
    """At the first horizon; nothing for who cheats: an answer costs nothing real.

    Guesses of others cost what their maker says: looking them up in a table costs nothing real either.
    """
    if said := declared(predictor):
        known = said.event_us is not None
        return EventTime(said.event_us, "declared" if known else None, said.event_us_p99)
    if cheats(predictor):
        return UNTIMED
    with _one_thread():
        times = event_times(predictor, part)
    if times:
        median, late = np.percentile(times, [50, 99]).tolist()
        return EventTime(median, "online", late)
    us = _in_blocks(predictor, part)
    return EventTime(us, None if us is None else "block")


UNTIMED = EventTime()


@contextmanager
def _one_thread() -> Iterator[None]:
    """For libraries that are loaded by now: an engine does not wait for all cores."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def event_times(predictor: Predictor, part: Part) -> list[float]:
    """Microseconds of single events; empty where there is no incremental face."""
    face = getattr(predictor, "online", None)
    if face is None:
        return []
    horizon, times = predictor.horizons[0], list[float]()
    online = face(horizon)
    for block, _ in part.blocks(*predictor.needs):
        n_layers, last_request = block.card.n_layers, -1
        for t in range(block.n_tokens):
            if block.request_T[t] != last_request:
                online.start()
                last_request = block.request_T[t]
            for layer in range(n_layers):
                started = time.perf_counter_ns()
                online.observe(layer, block.ids_TLK[t, layer])
                online.guess((layer + horizon) % n_layers)
                times.append((time.perf_counter_ns() - started) / 1000)
            if len(times) >= EVENTS + WARM_UP:
                return times[WARM_UP:]
    return times[min(WARM_UP, len(times) // 2) :]


def _in_blocks(predictor: Predictor, part: Part) -> float | None:
    for block, _ in part.blocks(*predictor.needs):
        past = Past(block.rows(slice(0, BATCH_TOKENS)), predictor.horizons[0])
        predictor.scores(past)  # loads what it needs
        with _one_thread():
            started = time.perf_counter()
            predictor.scores(past)
            seconds = time.perf_counter() - started
        return 1e6 * seconds / (past.n_tokens * past.card.n_layers)
    return None
