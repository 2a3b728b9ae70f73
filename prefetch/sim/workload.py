"""What an engine has to run: a trace's rows put into steps, and for every step and layer the set of experts needed.

It knows no cache and no clock. A step is one forward pass over a batch; an event is a step at one layer. The experts of
an event are distinct and stand in the order of their last choice, so that later in the row means more recent.
S steps, L layers, V = S * L events, A accesses (an expert that an event needs), R rows of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import PREFILL, RoutingTrace, no_expert

NEVER = np.int64(2**62)  # the access that next needs an expert that nobody needs again
MIXED = -1  # the request of a step that serves several
PHASE_CHOICES = ("auto", "decode", "prefill")


@dataclass(frozen=True, eq=False)
class Workload:
    """Events in the order in which they run; those of step s are s * L to s * L + L - 1, one per layer."""

    card: ModelCard
    ids_A: NDArray[np.uint16]
    tokens_A: NDArray[np.int32]  # of this step that chose the expert
    start_V: NDArray[np.int64]  # [V + 1] first access of every event
    rows_R: NDArray[np.int64]  # rows of the trace, step after step
    row_start_S: NDArray[np.int64]  # [S + 1]
    decode_S: NDArray[np.int32]  # tokens that are generated in the step
    prefill_S: NDArray[np.int32]  # tokens of prompts
    context_S: NDArray[
        np.int64
    ]  # tokens whose keys and values are read: of every request in the step, all so far
    pairs_S: NDArray[np.int64]  # of a token of the step and one that it attends to, itself included
    request_S: NDArray[np.int32]  # MIXED where a step serves several
    is_teacher_forced: bool = False  # rows of a prompt that run as if they had been generated

    @property
    def n_steps(self) -> int:
        return len(self.decode_S)

    @property
    def n_accesses(self) -> int:
        return len(self.ids_A)

    @property
    def is_decode_S(self) -> NDArray[np.bool_]:
        """Steps whose accesses the hit rate counts: those that generate."""
        return self.decode_S > 0


def workload_of(
    trace: RoutingTrace, *, batch: int = 1, chunk: int | None = None, phase: str = "auto"
) -> Workload:
    """Requests in their order, `batch` at a time, the next one as soon as one ends.

    phase: `auto` runs prompts as prefill and generated tokens one per step; a trace without generated tokens is run
    token by token as if they were (teacher-forced), which `decode` asks of every trace. `prefill` runs prompts only.
    A prompt is one step of its own, or `chunk` tokens at a time beside the tokens that others generate.
    """
    if batch < 1 or (chunk is not None and chunk < 1):
        raise ConfigError(f"batch={batch}, chunk={chunk}: must be at least 1")
    if phase not in PHASE_CHOICES:
        raise ConfigError(f"phase={phase!r}: must be one of {', '.join(PHASE_CHOICES)}")
    rows = np.flatnonzero(trace.executed_T)
    is_prompt = trace.phase_T[rows] == PREFILL
    is_forced = phase == "decode" or (phase == "auto" and not (~is_prompt).any())
    if is_forced:
        is_prompt = np.zeros(len(rows), np.bool_)
    elif phase == "prefill":
        rows, is_prompt = rows[is_prompt], is_prompt[is_prompt]
    request_R = trace.request_T[rows]
    new = np.flatnonzero(np.diff(request_R, prepend=request_R[:1] - 1)) if len(rows) else rows
    first_Q = np.append(new, len(rows)).astype(np.int64)
    lanes = max(1, min(batch, len(new)))  # more would stay empty
    order_R, start_S = _schedule(first_Q, is_prompt, lanes, min(chunk or 0, max(1, len(rows))))
    return _gather(trace, rows[order_R], is_prompt[order_R], start_S, is_forced)


def _gather(
    trace: RoutingTrace,
    rows_R: NDArray[np.int64],
    is_prompt_R: NDArray[np.bool_],
    start_S: NDArray[np.int64],
    is_forced: bool,
) -> Workload:
    card, n_steps = trace.card, len(start_S) - 1
    ids_A, tokens_A, start_V = _events(
        trace.ids_TLK, rows_R, start_S, no_expert(card.n_experts), card.n_experts
    )
    request_R = trace.request_T[rows_R]
    step_R = np.repeat(np.arange(n_steps), np.diff(start_S))
    prefill_S = np.bincount(step_R, is_prompt_R, n_steps).astype(np.int32)
    starts = start_S[:-1]
    turn_R = step_R * 2**32 + request_R
    last = np.flatnonzero(np.diff(turn_R, append=turn_R[-1:] + 1))  # row of a request in a step
    read_R = trace.position_T[rows_R].astype(np.int64) + 1
    lowest = np.minimum.reduceat(request_R, starts) if n_steps else request_R[:0]
    highest = np.maximum.reduceat(request_R, starts) if n_steps else request_R[:0]
    return Workload(
        card=card,
        ids_A=ids_A,
        tokens_A=tokens_A,
        start_V=start_V,
        rows_R=rows_R,
        row_start_S=start_S,
        decode_S=(np.diff(start_S) - prefill_S).astype(np.int32),
        prefill_S=prefill_S,
        context_S=np.bincount(step_R[last], read_R[last], n_steps).astype(np.int64),
        pairs_S=np.bincount(step_R, read_R, n_steps).astype(np.int64),
        request_S=np.where(lowest == highest, lowest, MIXED).astype(np.int32),
        is_teacher_forced=is_forced,
    )


@njit(cache=True)
def _schedule(first_Q, is_prompt_R, batch, chunk):  # type: ignore[no-untyped-def]
    """Continuous batching, first come first served: which rows every step runs."""
    n_rows, n_requests = len(is_prompt_R), len(first_Q) - 1
    order_R, start_S = np.empty(n_rows, np.int64), np.zeros(n_rows + 1, np.int64)
    at_B, end_B = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    waiting, done, step = 0, 0, 0
    while done < n_rows:
        for lane in range(batch):
            if at_B[lane] == end_B[lane] and waiting < n_requests:
                at_B[lane], end_B[lane] = first_Q[waiting], first_Q[waiting + 1]
                waiting += 1
        whole = (
            _in_prompt(at_B, end_B, is_prompt_R) if chunk == 0 else -1
        )  # runs in a step of its own
        budget = chunk
        for lane in range(batch):
            if at_B[lane] == end_B[lane] or (whole >= 0 and lane != whole):
                continue
            if not is_prompt_R[at_B[lane]]:
                order_R[done] = at_B[lane]
                at_B[lane] += 1
                done += 1
                continue
            while (
                at_B[lane] < end_B[lane] and is_prompt_R[at_B[lane]] and (chunk == 0 or budget > 0)
            ):
                order_R[done] = at_B[lane]
                at_B[lane] += 1
                done += 1
                budget -= 1
        step += 1
        start_S[step] = done
    return order_R, start_S[: step + 1]


@njit(cache=True)
def _in_prompt(at_B, end_B, is_prompt_R):  # type: ignore[no-untyped-def]
    """The first lane whose next row is of a prompt, or -1."""
    for lane in range(len(at_B)):
        if at_B[lane] < end_B[lane] and is_prompt_R[at_B[lane]]:
            return lane
    return -1


@njit(cache=True)
def _events(ids_TLK, rows_R, start_S, nobody, n_experts):  # type: ignore[no-untyped-def]
    """The distinct experts of every step and layer, backwards, so that the last choice of each is the one kept."""
    n_layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    n_steps = len(start_S) - 1
    start_V = np.zeros(n_steps * n_layers + 1, np.int64)
    seen_E, place_E = np.full(n_experts, -1, np.int64), np.zeros(n_experts, np.int64)
    ids_A = np.empty(len(rows_R) * n_layers * top_k, np.uint16)
    tokens_A = np.empty(len(ids_A), np.int32)
    at = 0
    for step in range(n_steps):
        for layer in range(n_layers):
            event = step * n_layers + layer
            first = at
            for r in range(start_S[step + 1] - 1, start_S[step] - 1, -1):
                for k in range(top_k - 1, -1, -1):
                    expert = np.int64(ids_TLK[rows_R[r], layer, k])
                    if expert == nobody:
                        continue
                    if seen_E[expert] != event:
                        seen_E[expert], place_E[expert] = event, at
                        ids_A[at], tokens_A[at] = expert, 0
                        at += 1
                    tokens_A[place_E[expert]] += 1
            for i in range((at - first) // 2):
                a, b = first + i, at - 1 - i
                ids_A[a], ids_A[b] = ids_A[b], ids_A[a]
                tokens_A[a], tokens_A[b] = tokens_A[b], tokens_A[a]
            start_V[event + 1] = at
    return ids_A[:at].copy(), tokens_A[:at].copy(), start_V


@njit(cache=True, nogil=True)
def counts_of(outcome_A, wanted, edges):  # type: ignore[no-untyped-def]
    """How many accesses from each edge to the next came to this."""
    counts = np.zeros(len(edges) - 1, np.int64)
    for i in range(len(counts)):
        for a in range(edges[i], edges[i + 1]):
            counts[i] += outcome_A[a] == wanted
    return counts


def next_uses(work: Workload) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[A] the access that next needs the same expert of the same layer, and [L, E] the first that needs each."""
    first_LE = np.full((work.card.n_layers, work.card.n_experts), NEVER, np.int64)
    return _next_uses(work.ids_A, work.start_V, first_LE), first_LE


@njit(cache=True)
def _next_uses(ids_A, start_V, coming_LE):  # type: ignore[no-untyped-def]
    next_A, n_layers = np.empty(len(ids_A), np.int64), len(coming_LE)
    for event in range(len(start_V) - 2, -1, -1):
        layer = event % n_layers
        for a in range(start_V[event + 1] - 1, start_V[event] - 1, -1):
            next_A[a] = coming_LE[layer, ids_A[a]]
            coming_LE[layer, ids_A[a]] = a
    return next_A
