"""From a predictions file to what the timed engine is told: for every event whom to copy, best first.

It knows no predictor. T rows of guesses, H horizons, L layers, P width of the file, V events, W guesses per event.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.workload import Workload
from prefetch.trace.predictions import PredictionsCard, PredictionsReader
from prefetch.trace.routing import RoutingTrace, no_expert

MILLION = 1_000_000  # scores are handed on in millionths
ROWS = 1 << 12  # of guesses that are read at once
BLOCK = 1 << 16  # events whose lists are put in order at once


def keys_of(request_T: NDArray[np.int32], position_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number per row that is the same in a trace and in guesses about it."""
    keys_T: NDArray[np.int64] = request_T.astype(np.int64) << 32 | position_T.astype(np.int64)
    return keys_T


def guessed_rows(reader: PredictionsReader) -> NDArray[np.int64]:
    """The keys of the rows that the file has guesses about, ascending."""
    parts = [keys_of(*rows) for rows in reader.rows()]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def is_among(values_T: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """As `numpy.isin`, which would sort all that are many once more for every block."""
    at_T = np.searchsorted(ascending, values_T)
    is_there_T: NDArray[np.bool_] = np.append(ascending, values_T[:1])[at_T] == values_T
    return is_there_T & (at_T < len(ascending))


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
    card, asked = reader.card, _Asked.of(work, trace)
    h = _checked(card, horizon, width, threshold)
    shape = (work.n_steps, work.card.n_layers, width, asked.most)
    ids_SLWB, scores_SLWB = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.int64)
    for block in reader.batches(max_rows=ROWS):
        at_T, row_T = asked.rows_of(keys_of(block.request_T, block.position_T))
        found_TLW = block.ids_THLP[at_T, h, :, :width]
        score_TLW = block.scores_THLP[at_T, h, :, :width]
        ids_TLW = found_TLW.astype(np.int32)
        ids_TLW[found_TLW == no_expert(card.n_experts)] = EMPTY
        if threshold > 0:  # scores of many predictors are below 0
            ids_TLW[score_TLW < threshold] = EMPTY
        score_TLW = np.nan_to_num(score_TLW.astype(np.float64), posinf=1e9, neginf=-1e9)
        step_T, lane_T = asked.step_R[row_T], asked.lane_R[row_T]
        ids_SLWB[step_T, :, :, lane_T] = ids_TLW
        scores_SLWB[step_T, :, :, lane_T] = np.round(score_TLW * MILLION).astype(np.int64)
    asked.end()
    by_event = (work.n_steps * work.card.n_layers, width * asked.most)
    guesses = Guesses(ids_SLWB.reshape(by_event), scores_SLWB.reshape(by_event), horizon)
    _nobody_last(guesses)
    return guesses


def _checked(card: PredictionsCard, horizon: int, width: int, threshold: float) -> int:
    """Where the horizon stands in the file."""
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
    return card.horizons.index(horizon)


@dataclass(frozen=True, eq=False)
class _Asked:
    """The rows that are replayed, by their keys: where in its step each stands, and whether guesses about it came.

    The guesses of all tokens of a step stand together, everyone's best first; of a step with a prompt in it, those of
    nobody.
    """

    keys_R: NDArray[np.int64]
    order_R: NDArray[np.int64]  # that sorts them
    sorted_R: NDArray[np.int64]
    step_R: NDArray[np.int64]
    lane_R: NDArray[np.int64]  # the token's place in its step
    is_guessed_R: NDArray[np.bool_]
    is_there_R: NDArray[np.bool_]
    most: int  # tokens of a step that is guessed

    @classmethod
    def of(cls, work: Workload, trace: RoutingTrace) -> _Asked:
        keys_R = keys_of(trace.request_T, trace.position_T)[work.rows_R]
        order_R, rows_S = np.argsort(keys_R, kind="stable"), np.diff(work.row_start_S)
        is_guessed_S = (work.prefill_S == 0) & (rows_S > 0)
        return cls(
            keys_R=keys_R,
            order_R=order_R,
            sorted_R=keys_R[order_R],
            step_R=np.repeat(np.arange(work.n_steps), rows_S),
            lane_R=np.arange(len(keys_R)) - np.repeat(work.row_start_S[:-1], rows_S),
            is_guessed_R=np.repeat(is_guessed_S, rows_S),
            is_there_R=np.zeros(len(keys_R), np.bool_),
            most=int(rows_S[is_guessed_S].max(initial=1)),
        )

    def rows_of(self, keys_T: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of guesses about these rows those that are wanted, and which rows they are about; of several the first."""
        keys, first_T = np.unique(keys_T, return_index=True)
        at_T = np.minimum(np.searchsorted(self.sorted_R, keys), len(self.sorted_R) - 1)
        row_T = self.order_R[at_T]
        is_new_T = (self.sorted_R[at_T] == keys) & ~self.is_there_R[row_T]
        self.is_there_R[row_T[is_new_T]] = True
        is_new_T &= self.is_guessed_R[row_T]
        return first_T[is_new_T], row_T[is_new_T]

    def end(self) -> None:
        if not self.is_there_R.all():
            missing = int(self.keys_R[~self.is_there_R][0])
            raise FormatError(
                f"guesses about request {missing >> 32}, position {missing & 0xFFFFFFFF} are missing: "
                "expected a row for every row that is replayed"
            )


def _nobody_last(guesses: Guesses) -> None:
    """In every event's list, in place; most lists are full, and stay as they are."""
    for first in range(0, len(guesses.ids_VW), BLOCK):
        ids_VW, score_VW = (array[first : first + BLOCK] for array in guesses[:2])
        order = np.argsort(ids_VW == EMPTY, axis=1, kind="stable")
        ids_VW[:] = np.take_along_axis(ids_VW, order, axis=1)
        score_VW[:] = np.take_along_axis(score_VW, order, axis=1)
