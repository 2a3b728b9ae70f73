"""Rows that policies are told of events, made of what a trace recorded or a predictor guessed.

It knows no cache. A policy names what it needs: `scores`, the router's probabilities of all experts, of which the best
`top` count; `weights`, how important a use is: 1 less the weights before it in its token's order; `tokens`, how many
chose each; `guesses`, predicted use. Fractions are millionths.
T tokens, R rows of the trace in the order of steps, V events, L layers, E experts, K choices, W guesses of an event.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import MissingData
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY, FIRST, NOTHING_TOLD, TOLD, UNTOLD, Told
from prefetch.sim.policy import ROWS, Policy
from prefetch.sim.workload import Workload
from prefetch.trace.routing import RoutingTrace, no_expert

MILLION = 1_000_000
CLOSE = 0.02  # float16 probabilities of many experts sum to one within this
BLOCK = 4096  # rows of a trace at a time


def told_of(
    policy: Policy,
    trace: RoutingTrace,
    work: Workload,
    n_caches: int,
    guesses: Guesses | None = None,
    guess_score: str = "probability",
) -> Told:
    """What this policy asks for; `guesses`: with all the guesses that were made, whoever copies fewer of them."""
    need = next((need for need in policy.needs if need in ROWS), None)
    name = type(policy).__name__
    if need is None:
        return NOTHING_TOLD
    if need == "guesses":
        if guesses is None:
            raise MissingData(
                f"{name} needs guesses, and predictor=none makes none: pass predictor=..., or another policy"
            )
        return _of_guesses(work, guesses, guess_score)
    if need == "tokens":
        row_VE = np.zeros((len(work.start_V) - 1, work.card.n_experts), np.int32)
        event_A = np.repeat(np.arange(len(row_VE)), np.diff(work.start_V))
        row_VE[event_A, work.ids_A] = work.tokens_A
    elif need == "scores":
        row_VE = _of_scores(trace, work, getattr(policy, "top", None) or 2 * work.card.top_k, name)
    else:
        row_VE = _of_weights(trace, work, name)
    return Told(row_VE, _kinds(trace.request_T[work.rows_R], work, n_caches), 0)


def _kinds(request_R: NDArray[np.int32], work: Workload, n_caches: int) -> NDArray[np.uint8]:
    """Which events are told, and with which a cache begins a sequence: a step without a request of the step before."""
    n_layers = work.card.n_layers
    sequence_S, running, sequence = np.zeros(work.n_steps, np.int64), set[int](), 0
    for step in range(work.n_steps):
        here = set(request_R[work.row_start_S[step] : work.row_start_S[step + 1]].tolist())
        sequence += here.isdisjoint(running)
        sequence_S[step], running = sequence, here
    is_told_V = np.diff(work.start_V) > 0
    cache_V = np.arange(len(is_told_V)) % n_layers % n_caches
    kind_V = np.where(is_told_V, TOLD, UNTOLD).astype(np.uint8)
    for cache in range(n_caches):
        events = np.flatnonzero(is_told_V & (cache_V == cache))
        is_first = np.diff(sequence_S[events // n_layers], prepend=0) > 0
        kind_V[events[is_first]] = FIRST
    return kind_V


def _of_scores(trace: RoutingTrace, work: Workload, top: int, name: str) -> NDArray[np.int32]:
    """The mean over a step's tokens of the probabilities that the router gave, the best `top` of them."""
    n_experts = work.card.n_experts
    if trace.scores_TLM is None or trace.score_ids_TLM is not None:
        found = "none" if trace.scores_TLM is None else f"the best {trace.scores_TLM.shape[2]}"
        raise MissingData(
            f"{name} needs the router's scores of all {n_experts} experts; the trace of {trace.card.name} has "
            f"{found}: record it with source.scores=all, or choose another policy"
        )
    parts = []
    for begin in range(0, len(work.rows_R), BLOCK):
        rows = work.rows_R[begin : begin + BLOCK]
        is_there = (trace.ids_TLK[rows] != no_expert(n_experts)).any(axis=2, keepdims=True)
        score_TLE = trace.scores_TLM[rows].astype(np.float32)
        parts.append(_probabilities(score_TLE, trace.card.score_function) * is_there)
    mean_VE = _over_steps(np.concatenate(parts), work, np.add)
    mean_VE /= np.maximum(1, np.repeat(np.diff(work.row_start_S), work.card.n_layers))[:, None]
    row_VE = np.rint(mean_VE * MILLION).astype(np.int32)
    if top < n_experts:
        order = np.argsort(-row_VE, axis=1, kind="stable")
        np.put_along_axis(row_VE, order[:, top:], 0, axis=1)
    return row_VE


def _probabilities(score_TLE: NDArray[np.float32], function: str | None) -> NDArray[np.float32]:
    """Traces hold probabilities or what they are made of: all from 0 to 1, and with a softmax a sum of 1."""
    is_share = bool((score_TLE >= 0).all() and (score_TLE <= 1).all())
    if function == "sigmoid":
        return score_TLE if is_share else np.reciprocal(1 + np.exp(-score_TLE))
    if is_share and bool((np.abs(score_TLE.sum(axis=2) - 1) < CLOSE).all()):
        return score_TLE
    power_TLE = np.exp(score_TLE - score_TLE.max(axis=2, keepdims=True))
    shares: NDArray[np.float32] = power_TLE / power_TLE.sum(axis=2, keepdims=True)
    return shares


def _of_weights(trace: RoutingTrace, work: Workload, name: str) -> NDArray[np.int32]:
    """Of a step's tokens the one that finds the expert most important; above 0 for whoever was chosen."""
    if trace.weights_TLK is None:
        raise MissingData(
            f"{name} needs the router's weights of the chosen experts; the trace of {trace.card.name} has none: "
            "record them, pass policy.lhu=0, or choose another policy"
        )
    nobody, n_experts = no_expert(work.card.n_experts), work.card.n_experts
    ids_RLK = trace.ids_TLK[work.rows_R].astype(np.int64)
    weight_RLK = np.where(ids_RLK == nobody, 0, trace.weights_TLK[work.rows_R].astype(np.float64))
    order = np.argsort(-weight_RLK, axis=2, kind="stable")
    sorted_RLK = np.take_along_axis(weight_RLK, order, axis=2)
    whole_RL1 = np.maximum(sorted_RLK.sum(axis=2, keepdims=True), 1e-9)
    before_RLK = (sorted_RLK.cumsum(axis=2) - sorted_RLK) / whole_RL1
    important_RLK = np.empty(ids_RLK.shape, np.int64)
    of_sorted = np.maximum(1, np.rint((1 - before_RLK) * MILLION)).astype(np.int64)
    np.put_along_axis(important_RLK, order, of_sorted, axis=2)
    row_VE = np.zeros((len(work.start_V) - 1, n_experts), np.int32)
    step_R = np.repeat(np.arange(work.n_steps), np.diff(work.row_start_S))
    event_RL = step_R[:, None] * work.card.n_layers + np.arange(work.card.n_layers)
    event_RLK = np.broadcast_to(event_RL[:, :, None], ids_RLK.shape)
    is_there = ids_RLK != nobody
    np.maximum.at(row_VE, (event_RLK[is_there], ids_RLK[is_there]), important_RLK[is_there])
    return row_VE


def _over_steps(value_RLE: NDArray[Any], work: Workload, how: Any) -> NDArray[Any]:
    """Rows of one step become one, per event."""
    if not work.n_steps:
        return value_RLE.reshape(-1, value_RLE.shape[2])
    value_SLE = how.reduceat(value_RLE, work.row_start_S[:-1], axis=0)
    return value_SLE.reshape(-1, value_SLE.shape[2])


def _of_guesses(work: Workload, guesses: Guesses, score: str) -> Told:
    """The score that an expert was guessed with, 0 without; guesses that are no probabilities count by their order."""
    n_events, width = guesses.ids_VW.shape
    row_VE = np.zeros((n_events, work.card.n_experts), np.int32)
    value_VW = np.clip(guesses.score_VW, 0, MILLION)
    if score == "logit":
        value_VW = np.rint(MILLION / (1 + np.exp(-guesses.score_VW / MILLION))).astype(np.int64)
    elif score != "probability":
        place_W = np.arange(width)
        value_VW = np.broadcast_to((width - place_W) * MILLION // max(1, width), (n_events, width))
    v, w = np.nonzero(guesses.ids_VW != EMPTY)
    np.maximum.at(row_VE, (v, guesses.ids_VW[v, w]), value_VW[v, w].astype(np.int32))
    is_told_V = (guesses.ids_VW != EMPTY).any(axis=1)
    return Told(row_VE, np.where(is_told_V, TOLD, UNTOLD).astype(np.uint8), guesses.ahead)
