"""Guesses are told event by event, and only those of rows that are replayed; the file is read in any parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.sim import foresight
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.foresight import guessed_rows, guesses_of, is_among, keys_of
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.predictions import (
    Predictions,
    PredictionsCard,
    PredictionsReader,
    PredictionsWriter,
)
from prefetch.trace.routing import RoutingTrace
from tests.routing_traces import random_trace

WIDTH, HORIZONS = 5, (1, 4)


def written(folder: Path, trace: RoutingTrace, seed: int = 0) -> Predictions:
    """Guesses about every row: lists of any length, scores of float16 that fall."""
    rng, card = np.random.default_rng(seed), trace.card
    about = PredictionsCard(
        trace="abc",
        predictor="toy",
        n_experts=card.n_experts,
        n_layers=card.n_layers,
        width=WIDTH,
        horizons=HORIZONS,
        causality="decode",
        score="probability",
        requests=tuple(np.unique(trace.request_T).tolist()),
        fitted_requests=(),
    )
    shape = (trace.n_tokens, len(HORIZONS), card.n_layers, card.n_experts)
    ids = rng.random(shape).argsort(axis=-1)[..., :WIDTH].astype(np.uint8)
    given = rng.integers(0, WIDTH + 1, shape[:3])[..., None]
    ids[np.arange(WIDTH) >= given] = 255
    scores = -np.sort(-rng.random((*shape[:3], WIDTH)), axis=-1).astype(np.float16)
    block = Predictions(about, trace.request_T, trace.position_T, ids, scores)
    writer = PredictionsWriter(folder, about)
    writer.append(block)
    writer.close()
    return block


def by_definition(
    block: Predictions, trace: RoutingTrace, work: Workload, width: int, threshold: float
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Event by event: of all tokens of the step everyone's best first, nobody at the end."""
    h, n_layers = HORIZONS.index(4), work.card.n_layers
    rows_S = np.diff(work.row_start_S)
    most = int(rows_S[work.prefill_S == 0].max(initial=1))
    ids_VW = np.full((work.n_steps * n_layers, width * most), EMPTY, np.int32)
    score_VW = np.zeros(ids_VW.shape, np.int64)
    for step in range(work.n_steps):
        rows = work.rows_R[work.row_start_S[step] : work.row_start_S[step + 1]]
        for layer in range(n_layers):
            told, nobody = [], []
            for w in range(width):
                for lane in range(most):
                    row = rows[lane] if lane < len(rows) and work.prefill_S[step] == 0 else None
                    score = np.float16(0) if row is None else block.scores_THLP[row, h, layer, w]
                    expert = 255 if row is None else int(block.ids_THLP[row, h, layer, w])
                    is_guess = expert != 255 and score >= np.float16(threshold)
                    pair = (expert if is_guess else EMPTY, round(float(score) * 1e6))
                    (told if is_guess else nobody).append(pair)
            event = step * n_layers + layer
            ids_VW[event] = [expert for expert, _ in told + nobody]
            score_VW[event] = [score for _, score in told + nobody]
    return ids_VW, score_VW


def told(folder: Path, trace: RoutingTrace, work: Workload, **how: object) -> Guesses:
    return guesses_of(PredictionsReader(folder), trace, work, horizon=4, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [7, 1 << 12])
@pytest.mark.parametrize(("batch", "threshold"), [(1, 0.0), (3, 0.0), (1, 0.7), (4, 0.3)])
def test_every_event_is_told_what_was_guessed_about_its_rows(
    tmp_path, monkeypatch, rows, batch, threshold
):
    monkeypatch.setattr(foresight, "ROWS", rows)
    monkeypatch.setattr(foresight, "BLOCK", 11)
    trace = random_trace(n_requests=6, tokens=10)
    block = written(tmp_path, trace)
    some = trace.rows(np.isin(trace.request_T, [1, 2, 5]))
    work = workload_of(some, batch=batch, phase="auto" if threshold else "decode")
    found = told(tmp_path, some, work, width=3, threshold=threshold)
    is_some = np.isin(trace.request_T, [1, 2, 5])
    of_some = Predictions(block.card, *(getattr(block, name)[is_some] for name in (
        "request_T", "position_T", "ids_THLP", "scores_THLP")))  # fmt: skip
    ids_VW, score_VW = by_definition(of_some, some, work, 3, threshold)
    np.testing.assert_array_equal(found.ids_VW, ids_VW)
    np.testing.assert_array_equal(found.score_VW, score_VW)
    assert (found.ids_VW != EMPTY).any() and (found.ids_VW == EMPTY).any()
    assert found.ahead == 4


def test_a_row_without_guesses_is_named(tmp_path):
    trace = random_trace(n_requests=4, tokens=10)
    written(tmp_path, trace.rows(trace.position_T != 3))
    with pytest.raises(FormatError, match="request 0, position 3 are missing"):
        told(tmp_path, trace, workload_of(trace), width=2)


def test_the_rows_of_a_file_are_known_without_its_guesses(tmp_path):
    trace = random_trace(n_requests=4, tokens=10)
    written(tmp_path, trace)
    expected = np.sort(keys_of(trace.request_T, trace.position_T))
    np.testing.assert_array_equal(guessed_rows(PredictionsReader(tmp_path)), expected)


def test_among_is_membership():
    rng = np.random.default_rng(0)
    for n in (0, 1, 5, 40):
        some, values = np.unique(rng.integers(-9, 30, n)), rng.integers(-12, 33, 100)
        np.testing.assert_array_equal(is_among(values, some), np.isin(values, some))
