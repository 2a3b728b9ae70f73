"""From a predictions file to what the timed engine is told: for every event whom to copy, best first.

It knows no predictor. T rows of guesses, H horizons, L layers, P width of the file, V events, W guesses per event.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError
from prefetch.sim.machine import Guesses
from prefetch.sim.pool import EMPTY
from prefetch.sim.workload import Workload
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.routing import RoutingTrace, no_expert

MILLION = 1_000_000  # scores are handed on in millionths


def keys_of(request_T: NDArray[np.int32], position_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number per row that is the same in a trace and in guesses about it."""
    keys_T: NDArray[np.int64] = request_T.astype(np.int64) << 32 | position_T.astype(np.int64)
    return keys_T


def guessed_rows(reader: PredictionsReader) -> NDArray[np.int64]:
    """The keys of the rows that the file has guesses about."""
    parts = [keys_of(block.request_T, block.position_T) for block in reader.batches()]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def guesses_of(
    reader: PredictionsReader,
    trace: RoutingTrace,
    work: Workload,
    *,
    horizon: int,
    width: int,
    threshold: float = 0.0,
) -> Guesses:
    """Steps that generate tokens are guessed; those of a prompt are not: its guesses knew all earlier tokens."""
    card = reader.card
    if horizon not in card.horizons:
        raise ConfigError(
            f"simulator.horizon={horizon}: {card.predictor} has guessed {list(card.horizons)} layers ahead; "
            f"pass train.horizons=[{horizon}]"
        )
    if width > card.width:
        raise ConfigError(
            f"simulator.width={width}: {card.predictor} has made {card.width} guesses per layer; "
            f"pass train.width={width}"
        )
    if threshold > 0 and card.score != "probability":
        raise ConfigError(
            f"simulator.threshold={threshold}: scores of {card.predictor} are no probabilities ({card.score})"
        )
    ids_TLW, scores_TLW, keys_T = _read(reader, card.horizons.index(horizon), width)
    row_of = _rows(keys_T, keys_of(trace.request_T, trace.position_T)[work.rows_R])
    ids_RLW = ids_TLW[row_of].astype(np.int32)
    ids_RLW[ids_TLW[row_of] == no_expert(card.n_experts)] = EMPTY
    if threshold > 0:  # scores of many predictors are below 0
        ids_RLW[scores_TLW[row_of] < threshold] = EMPTY
    scores = np.nan_to_num(scores_TLW[row_of].astype(np.float64), posinf=1e9, neginf=-1e9)
    return _by_event(work, ids_RLW, np.round(scores * MILLION).astype(np.int64), horizon)


def _read(
    reader: PredictionsReader, h: int, width: int
) -> tuple[NDArray[np.integer], NDArray[np.float16], NDArray[np.int64]]:
    ids, scores, keys = [], [], []
    for block in reader.batches():
        ids.append(block.ids_THLP[:, h, :, :width])
        scores.append(block.scores_THLP[:, h, :, :width])
        keys.append(keys_of(block.request_T, block.position_T))
    return np.concatenate(ids), np.concatenate(scores), np.concatenate(keys)


def _rows(keys_T: NDArray[np.int64], wanted_R: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(keys_T, kind="stable")
    at = np.searchsorted(keys_T[order], wanted_R)
    found = order[np.minimum(at, len(order) - 1)]
    if (keys_T[found] != wanted_R).any():
        missing = int(wanted_R[keys_T[found] != wanted_R][0])
        raise FormatError(
            f"guesses about request {missing >> 32}, position {missing & 0xFFFFFFFF} are missing: "
            "expected a row for every row that is replayed"
        )
    return found


def _by_event(
    work: Workload, ids_RLW: NDArray[np.int32], scores_RLW: NDArray[np.int64], horizon: int
) -> Guesses:
    """The guesses of all tokens of a step, everyone's best first; of a step with a prompt in it those of nobody."""
    rows_S = np.diff(work.row_start_S)
    is_guessed_S = (work.prefill_S == 0) & (rows_S > 0)
    most, (_, n_layers, width) = int(rows_S[is_guessed_S].max(initial=1)), ids_RLW.shape
    shape = (work.n_steps, n_layers, width, most)
    ids_SLWB, scores_SLWB = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.int64)
    for lane in range(most):
        has_S = is_guessed_S & (rows_S > lane)
        rows = work.row_start_S[:-1][has_S] + lane
        ids_SLWB[has_S, :, :, lane] = ids_RLW[rows]
        scores_SLWB[has_S, :, :, lane] = scores_RLW[rows]
    ids_VW = ids_SLWB.reshape(work.n_steps * n_layers, width * most)
    scores_VW = scores_SLWB.reshape(ids_VW.shape)
    order = np.argsort(ids_VW == EMPTY, axis=1, kind="stable")  # nobody stands last
    return Guesses(
        np.ascontiguousarray(np.take_along_axis(ids_VW, order, axis=1)),
        np.ascontiguousarray(np.take_along_axis(scores_VW, order, axis=1)),
        horizon,
    )
