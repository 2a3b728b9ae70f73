"""From scores to guesses: the best `width` experts of every (token, layer), best first, written as predictions.

Ties go to the smaller id. It knows no predictor by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.predict.part import PART_ROWS, Part
from prefetch.predict.past import Answered, Past
from prefetch.predict.predictor import Predictor, cheats, declared
from prefetch.predict.scored.timing import UNTIMED, EventTime
from prefetch.progress import Progress
from prefetch.trace.predictions import Predictions, PredictionsCard, PredictionsWriter
from prefetch.trace.routing import RoutingTrace, id_dtype, no_expert

HALF_MAX = float(np.finfo(np.float16).max)


def ranked(scores_TLE: NDArray[Any], width: int) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """ids [T, L, P] best first and their scores; "no expert" where a predictor does not guess."""
    n_tokens, n_layers, n_experts = scores_TLE.shape
    if np.isnan(scores_TLE).any():
        t, layer, expert = (int(x) for x in np.argwhere(np.isnan(scores_TLE))[0])
        raise FormatError(
            f"row {t}, layer slot {layer}, expert {expert}: the score is not a number"
        )
    ids = np.full((n_tokens, n_layers, width), no_expert(n_experts), id_dtype(n_experts))
    best = np.zeros((n_tokens, n_layers, width), np.float32)
    _rank(np.ascontiguousarray(scores_TLE, np.float32), ids, best)
    return ids, np.clip(best, -HALF_MAX, HALF_MAX).astype(np.float16)


@njit(cache=True, nogil=True)
def _rank(scores_TLE, ids_TLP, best_TLP):  # type: ignore[no-untyped-def]
    """Keeps the best in order while it walks over the experts: most are below the last and cost one comparison."""
    width = ids_TLP.shape[2]
    for t in range(scores_TLE.shape[0]):
        for layer in range(scores_TLE.shape[1]):
            found = 0
            ids, best = ids_TLP[t, layer], best_TLP[t, layer]
            for expert in range(scores_TLE.shape[2]):
                score = scores_TLE[t, layer, expert]
                if score == -np.inf or (found == width and score <= best[width - 1]):
                    continue
                place = found if found < width else width - 1
                while place > 0 and best[place - 1] < score:
                    ids[place], best[place] = ids[place - 1], best[place - 1]
                    place -= 1
                ids[place], best[place] = expert, score
                found = min(found + 1, width)


def guess_part(
    predictor: Predictor, part: Part, width: int
) -> Iterator[tuple[RoutingTrace, NDArray[Any], NDArray[np.float16]]]:
    """(rows, ids_THLP, scores_THLP) of every block, of the rows that count: what was before is known, not asked."""
    view = Answered if cheats(predictor) else Past
    for block, counted_T in part.blocks(*predictor.needs, max_rows=PART_ROWS):
        guesses = []
        for horizon in predictor.horizons:
            scores_TLE = scores_of(predictor, view(block, horizon))
            guesses.append(ranked(scores_TLE[counted_T], width))
        ids_THLP = np.stack([ids for ids, _ in guesses], axis=1)
        scores_THLP = np.stack([scores for _, scores in guesses], axis=1)
        yield block.rows(counted_T), ids_THLP, scores_THLP


def scores_of(predictor: Predictor, past: Past) -> NDArray[np.float32]:
    """A predictor's scores, if they are what they should be."""
    scores_TLE = predictor.scores(past)
    if np.shape(scores_TLE) != past.shape:
        kind = type(predictor)
        raise FormatError(
            f"{kind.__module__}.{kind.__qualname__}.scores: expected [tokens, layers, experts] = {list(past.shape)}, "
            f"got {list(np.shape(scores_TLE))}"
        )
    return scores_TLE


def write_guesses(
    predictor: Predictor,
    part: Part,
    folder: Path,
    *,
    name: str,
    trace: str,
    width: int,
    fitted: tuple[int, ...],
    n_bytes: int,
    event_time: EventTime = UNTIMED,
    fitted_trace: str | None = None,
) -> None:
    """A predictions folder for the requests of a part."""
    said = declared(predictor)
    card = PredictionsCard(
        trace=trace,
        predictor=name,
        n_experts=part.card.n_experts,
        n_layers=part.card.n_layers,
        width=width,
        horizons=predictor.horizons,
        causality=said.causality if said else "cheats" if cheats(predictor) else "decode",
        score=predictor.score,
        requests=tuple(part.asked().tolist()),
        fitted_requests=fitted,
        parameter_bytes=n_bytes,
        event_us=event_time.us,
        event_us_from=event_time.measured,
        event_us_p99=event_time.p99_us,
        fitted_trace=fitted_trace,
    )
    writer = PredictionsWriter(folder, card)
    with Progress(f"guessing: {name}", None, "tokens") as progress:
        for rows, ids_THLP, scores_THLP in guess_part(predictor, part, width):
            writer.append(Predictions(card, rows.request_T, rows.position_T, ids_THLP, scores_THLP))
            progress.advance(rows.n_tokens)
    writer.close()
