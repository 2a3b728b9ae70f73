"""Which recorded tokens a step of the profile's size holds: a prompt's neighbours, or one of each of many requests.

It counts no expert. T rows of a trace, S steps.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.blocks import Traceable, blocks_of
from prefetch.trace.parquet import concat
from prefetch.trace.routing import PHASES, RoutingTrace, trace_of

MOST_ROWS = 1 << 18  # of a trace, from its start: their mean is known to three digits


@dataclass(frozen=True, eq=False)
class Steps:
    """`rows` are whole steps, one behind the other; its requests are the steps."""

    rows: RoutingTrace
    tokens: int
    requests: float  # in a step, mean
    is_phase_recorded: bool  # else rows of the other phase stand for it


def steps_of(trace: Traceable, tokens: int, *, is_decode: bool, source: str) -> Steps:
    """Generated tokens are taken as a server batches them: who ends makes room for the next request."""
    rows = _rows(trace)
    phase = PHASES.index("decode" if is_decode else "prefill")
    is_asked_T = rows.phase_T == phase
    if is_asked_T.any():
        rows = rows.rows(np.flatnonzero(is_asked_T))
    order_T = batched(rows.request_T, tokens) if is_decode else np.arange(rows.n_tokens)
    n_steps = len(order_T) // tokens
    if n_steps == 0:
        raise FormatError(
            f"{source or 'trace'}: expected at least the {tokens:,} tokens of one step of the profile, found "
            f"{len(order_T):,} executed rows; record more, or pass diagnose.tokens"
        )
    order_T = order_T[: n_steps * tokens]
    step_T = np.repeat(np.arange(n_steps), tokens)
    pairs = np.unique(np.stack([step_T, rows.request_T[order_T]]), axis=1)
    steps = trace_of(rows.card, rows.ids_TLK[order_T], request_T=step_T, phase_T=phase)
    return Steps(steps, tokens, pairs.shape[1] / n_steps, bool(is_asked_T.any()))


def batched(request_T: NDArray[np.integer], tokens: int) -> NDArray[np.int64]:
    """Rows in the order of steps that hold one token of each of `tokens` requests; of fewer requests, in turn."""
    _, request_T, lengths_R = np.unique(request_T, return_inverse=True, return_counts=True)
    start_T = np.concatenate([[0], np.cumsum(lengths_R)[:-1]])[request_T]
    ordinal_T = np.arange(len(request_T)) - start_T  # rows of one request stand together
    free = [0] * tokens
    first_R = np.zeros(len(lengths_R), np.int64)
    for request, length in enumerate(lengths_R.tolist()):
        first_R[request] = free[0]
        heapq.heapreplace(free, free[0] + length)
    step_T = first_R[request_T] + ordinal_T
    is_full_T = (np.bincount(step_T) == tokens)[step_T]
    if not is_full_T.any():
        return np.lexsort((request_T, ordinal_T))
    order_T = np.lexsort((request_T, step_T))
    return order_T[is_full_T[order_T]]


def _rows(trace: Traceable) -> RoutingTrace:
    blocks, total = [], 0
    for block in blocks_of(trace):
        kept = block.rows(np.flatnonzero(block.executed_T))
        blocks.append(kept)
        total += kept.n_tokens
        if total >= MOST_ROWS:
            break
    if not total:
        raise FormatError("the trace has no executed rows")
    return concat(blocks)
