"""Prompts by whole layers: while a layer computes, the next one's experts are copied into the other of two buffers.

It knows no guesses. A step with a prompt needs nearly all experts of a layer, so that copies need not wait for routing:
they begin with the step, of all experts that the cache does not hold. The cache stays as it is. Steps without a prompt
run as in `timed`, one after the other. S steps, L layers, E experts, A accesses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.engines.compiled import engine
from prefetch.sim.engines.machine import COUNTS, WAIT, Machine, no_guesses, running_of
from prefetch.sim.engines.pool import ATOMIC, HIT, MISS
from prefetch.sim.engines.run import Timed, events_and_first_uses, prepared
from prefetch.sim.engines.start import NOBODY, fill
from prefetch.sim.policy import Policy
from prefetch.sim.workload import NEVER, Workload

BUFFERS = 2  # each for the experts of one layer


def pipeline_ns(before_L: Iterable[int], experts_L: Iterable[int], copies_L: Iterable[int]) -> int:
    """Of one step. A layer's copies wait for the link and for a buffer; its experts for them and for its attention."""
    arrived = computed = computed_before = 0
    for before, experts, copies in zip(before_L, experts_L, copies_L, strict=True):
        arrived = max(arrived, computed_before) + copies
        computed_before, computed = computed, max(computed + before, arrived) + experts
    return computed


def streamed_replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    machine: Machine,
    semantics: int = ATOMIC,
    *,
    warm: NDArray[np.int64] = NOBODY,
    pinned: NDArray[np.int64] = NOBODY,
) -> Timed:
    """A whole run: prompts stream, other steps hit and miss."""
    if machine.miss_way != WAIT or machine.disk.room_bytes < NEVER:
        raise ConfigError("layers are streamed with misses=wait, from a host memory that holds all")
    is_prompt_S = work.prefill_S > 0
    rest, (is_rest_A, layer_A) = without(work, is_prompt_S), _accesses(work, ~is_prompt_S)
    pool, semantics = prepared(rest, policy, room_G, size_L, semantics)
    events, first_LE = events_and_first_uses(rest, policy)
    fill(pool, policy, first_LE, warm=warm, pinned=pinned)
    run = running_of(pool, first_LE, machine, no_guesses())
    time_S, outcome_A = np.zeros(work.n_steps, np.int64), np.zeros(work.n_accesses, np.uint8)
    rest_A, done, sums = np.zeros(rest.n_accesses, np.uint8), 0, dict.fromkeys(COUNTS, 0)
    n_layers, step_machine = work.card.n_layers, machine
    for first, last in _blocks(is_prompt_S):
        if is_prompt_S[first]:
            is_there_LE = pool.slot_LE >= 0
            for step in range(first, last):
                a, b = work.start_V[[step * n_layers, (step + 1) * n_layers]]
                is_hit_A = is_there_LE[layer_A[a:b], work.ids_A[a:b]]
                outcome_A[a:b] = np.where(is_hit_A, HIT, MISS)
                time_S[step] = _stream(work, step, machine, layer_A, is_there_LE, sums)
            continue
        step_machine = machine._replace(before_S=machine.before_S[first:last])
        start_V = events.start_V[done * n_layers : (done + last - first) * n_layers + 1]
        engine(policy.rules, "timed").timed(
            events._replace(start_V=start_V), pool, semantics, step_machine, no_guesses(), run,
            time_S[first:last], rest_A,
        )  # fmt: skip
        done += last - first
    outcome_A[is_rest_A] = rest_A
    counts = {name: sums[name] + int(run.counts[i]) for i, name in enumerate(COUNTS)}
    return Timed(time_S, outcome_A, counts, int((pool.slot_LE >= 0).sum()))


def _stream(
    work: Workload,
    step: int,
    machine: Machine,
    layer_A: NDArray[np.uint16],
    is_there_LE: NDArray[np.bool_],
    sums: dict[str, int],
) -> int:
    """Nanoseconds of a step with a prompt; what it moves joins the sums."""
    n_layers, n_experts = is_there_LE.shape
    a, b = work.start_V[[step * n_layers, (step + 1) * n_layers]]
    layer_N, tokens_N = layer_A[a:b], work.tokens_A[a:b].astype(np.int64)
    each_N = np.maximum(machine.weight_ns_L[layer_N], machine.token_ns_L[layer_N] * tokens_N)
    experts_L = np.bincount(layer_N, each_N, n_layers).astype(np.int64)
    runs_L = np.bincount(layer_N, minlength=n_layers) > 0
    loads_L = np.where(runs_L, n_experts - is_there_LE.sum(axis=1), 0)
    before_L = np.where(runs_L, machine.before_S[step], 0)
    # the host asks for a copy while the one before moves
    copies_L = loads_L * np.maximum(machine.whole_ns_L, machine.issue_ns)
    took = pipeline_ns(before_L.tolist(), experts_L.tolist(), copies_L.tolist())
    computing = int(before_L.sum() + experts_L.sum())
    for name, more in (
        ("now_ns", took),
        ("compute_ns", computing),
        ("stall_ns", took - computing),
        ("link_ns", int((loads_L * machine.whole_ns_L).sum())),
        ("demand_loads", int(loads_L.sum())),
        ("moved_bytes", int((loads_L * machine.bytes_L).sum())),
    ):
        sums[name] += more
    return took


def without(work: Workload, is_left_out_S: NDArray[np.bool_]) -> Workload:
    """The other steps, one after the other."""
    kept_S, n_layers = ~is_left_out_S, work.card.n_layers
    is_kept_A, _ = _accesses(work, kept_S)
    sizes_V, rows_S = np.diff(work.start_V), np.diff(work.row_start_S)
    per_step = ("decode_S", "prefill_S", "context_S", "pairs_S", "request_S")
    return dataclasses.replace(
        work,
        ids_A=work.ids_A[is_kept_A],
        tokens_A=work.tokens_A[is_kept_A],
        start_V=np.append(0, sizes_V[np.repeat(kept_S, n_layers)].cumsum()),
        rows_R=work.rows_R[np.repeat(kept_S, rows_S)],
        row_start_S=np.append(0, rows_S[kept_S].cumsum()),
        **{name: getattr(work, name)[kept_S] for name in per_step},
    )


def _accesses(
    work: Workload, is_kept_S: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.uint16]]:
    """Of every access: whether its step is one of these, and its layer."""
    n_layers, sizes_V = work.card.n_layers, np.diff(work.start_V)
    layer_V = (np.arange(len(sizes_V)) % n_layers).astype(np.uint16)
    layer_A: NDArray[np.uint16] = np.repeat(layer_V, sizes_V)
    return np.repeat(np.repeat(is_kept_S, n_layers), sizes_V), layer_A


def _blocks(is_prompt_S: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Runs of steps of one kind: first, and one after the last."""
    ends = [*(np.flatnonzero(np.diff(is_prompt_S)) + 1).tolist(), len(is_prompt_S)]
    yield from zip([0, *ends[:-1]], ends, strict=True)
