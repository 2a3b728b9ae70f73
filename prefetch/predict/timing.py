"""What one guess costs: one event observed and one layer guessed through the incremental face, on one thread."""

from __future__ import annotations

import time

import numpy as np

from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import Predictor, cheats

EVENTS = 3000  # timed ones
WARM_UP = 300  # before them: compilation, caches
BATCH_TOKENS = 256


def event_microseconds(predictor: Predictor, part: Part) -> float | None:
    """Median microseconds per event at the first horizon; None for who cheats: an answer costs nothing real.

    Without an incremental face it is the share of an event in a block of tokens, which an engine would not reach.
    """
    if cheats(predictor):
        return None
    times = event_times(predictor, part)
    return float(np.median(times)) if len(times) else _in_blocks(predictor, part)


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
        predictor.scores(past)
        started = time.perf_counter()
        predictor.scores(past)
        seconds = time.perf_counter() - started
        return 1e6 * seconds / (past.n_tokens * past.card.n_layers)
    return None
