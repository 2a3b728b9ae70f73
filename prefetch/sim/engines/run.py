"""Runs a workload through a cache: the one door to the compiled engines for whoever has a policy and a workload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.sim.engines.compiled import engine
from prefetch.sim.engines.machine import COUNTS, Guesses, Machine, Running, no_guesses, running_of
from prefetch.sim.engines.pool import (
    AFTER_USE,
    ATOMIC,
    NOTHING_TOLD,
    OVERSHOOT,
    SEQUENTIAL,
    Events,
    Pool,
    Told,
    pool_of,
)
from prefetch.sim.engines.start import NOBODY, fill
from prefetch.sim.policy import ROWS, Policy
from prefetch.sim.workload import Workload, next_uses

NONE_A = np.empty(0, np.int64)


def replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    semantics: int = ATOMIC,
    *,
    told: Told = NOTHING_TOLD,
    warm: NDArray[np.int64] = NOBODY,
    pinned: NDArray[np.int64] = NOBODY,
) -> NDArray[np.uint8]:
    """HIT or MISS of every access: no clock, no guesses. Sizes and rooms (one per layer, or one) are in units.

    `told`: rows that the policy asks for. `warm`, `pinned`: entries (layer * E + expert) that are there from the
    start, the most used first; those that are pinned stay.
    """
    pool, semantics = prepared(work, policy, room_G, size_L, semantics)
    events, first_LE = events_and_first_uses(work, policy, told)
    fill(pool, policy, first_LE, warm=warm, pinned=pinned)
    outcome_A = np.zeros(work.n_accesses, np.uint8)
    engine(policy.rules).replay(events, pool, semantics, outcome_A)
    return outcome_A


def replay_parts(
    works: Iterable[Workload],
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    semantics: int = ATOMIC,
) -> Iterator[NDArray[np.uint8]]:
    """Of a workload that comes in parts of whole steps: as if it were one, in the memory of a part."""
    pool: Pool | None = None
    for work in works:
        if pool is None:
            _need_nothing_told(policy)
            pool, semantics = prepared(work, policy, room_G, size_L, semantics)
            fill(pool, policy, first_uses_of(work, policy))
        outcome_A = np.zeros(work.n_accesses, np.uint8)
        engine(policy.rules).replay(events_of(work, policy), pool, semantics, outcome_A)
        yield outcome_A


def _need_nothing_told(policy: Policy) -> None:
    """Whoever knows the future, or rows beside the choices, must have the whole workload."""
    if needs := [need for need in policy.needs if need == "future" or need in ROWS]:
        raise ConfigError(
            f"{type(policy).__name__} needs {needs[0]} of the whole workload: replay it in one part"
        )


def prepared(
    work: Workload, policy: Policy, room_G: Sequence[int], size_L: Sequence[int], semantics: int
) -> tuple[Pool, int]:
    """Empty caches, and the semantics that this policy runs under: one that decides after use does so."""
    if policy.after_use and semantics == ATOMIC:
        semantics = AFTER_USE
    if semantics == OVERSHOOT and "counts" in policy.needs:
        raise ConfigError(
            f"{type(policy).__name__} never evicts, and semantics=overshoot makes room by it: use semantics=atomic"
        )
    overshoots = semantics in (
        AFTER_USE,
        OVERSHOOT,
    )  # by one event, and what is left of the one before
    spare = 2 * work.card.n_experts if overshoots else 0
    rooms, sizes = np.array(room_G, np.int64), np.array(size_L, np.int64)
    return pool_of(policy, rooms, sizes, work.card.n_experts, spare=spare), semantics


def events_of(work: Workload, policy: Policy, told: Told = NOTHING_TOLD) -> Events:
    return events_and_first_uses(work, policy, told)[0]


def first_uses_of(work: Workload, policy: Policy) -> NDArray[np.int64]:
    """[L, E] the access that first needs each, for a policy that knows the future; else 0."""
    if "future" in policy.needs:
        return next_uses(work)[1]
    return np.zeros((work.card.n_layers, work.card.n_experts), np.int64)


def events_and_first_uses(
    work: Workload, policy: Policy, told: Told = NOTHING_TOLD
) -> tuple[Events, NDArray[np.int64]]:
    """Both, of one look ahead."""
    rows = [need for need in policy.needs if need in ROWS]
    if rows and len(told.kind_V) != len(work.start_V) - 1:
        raise MissingData(
            f"{type(policy).__name__} needs {rows[0]}: a row for each of {len(work.start_V) - 1} events, "
            f"found {len(told.kind_V)}; make them with prefetch.sim.told.told_of"
        )
    told, score_A = told if rows else NOTHING_TOLD, NONE_A
    if rows:
        event_A = np.repeat(np.arange(len(told.kind_V)), np.diff(work.start_V))
        score_A = told.row_VE[event_A, work.ids_A].astype(np.int64)
    next_A, first_LE = NONE_A, np.zeros((work.card.n_layers, work.card.n_experts), np.int64)
    if "future" in policy.needs:
        next_A, first_LE = next_uses(work)
    events = Events(work.ids_A, work.tokens_A, work.start_V, next_A, score_A, told)
    return events, first_LE


@dataclass(frozen=True, eq=False)
class Timed:
    """What a timed run was: nanoseconds of every step, HIT, LATE or MISS of every access, and sums."""

    time_S: NDArray[np.int64]
    outcome_A: NDArray[np.uint8]
    counts: dict[str, int]
    resident: int  # experts in the caches when the run was over
    rounds_RS: NDArray[np.int64] | None = None  # of a device: every run's steps; simulated, none


def timed_replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    machine: Machine,
    guesses: Guesses | None = None,
    semantics: int = ATOMIC,
    *,
    told: Told = NOTHING_TOLD,
    warm: NDArray[np.int64] = NOBODY,
    pinned: NDArray[np.int64] = NOBODY,
) -> Timed:
    """The same with a clock, a link and guesses that are copied ahead."""
    if semantics == SEQUENTIAL:
        raise ConfigError(
            "semantics=sequential has no clock: the experts of an event are needed at once"
        )
    guesses = guesses or no_guesses()
    pool, semantics = prepared(work, policy, room_G, size_L, semantics)
    events, first_LE = events_and_first_uses(work, policy, told)
    fill(pool, policy, first_LE, warm=warm, pinned=pinned)
    run = running_of(pool, first_LE, machine, guesses)
    return _timed(work, events, policy, pool, semantics, machine, guesses, run)


def timed_parts(
    parts: Iterable[tuple[Workload, Machine]],
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    semantics: int = ATOMIC,
) -> Iterator[Timed]:
    """`replay_parts` with a clock, each part with its costs; without guesses. Counts are of all parts until then."""
    pool: Pool | None = None
    run: Running | None = None
    for work, machine in parts:
        if pool is None or run is None:
            _need_nothing_told(policy)
            pool, semantics = prepared(work, policy, room_G, size_L, semantics)
            first_LE = first_uses_of(work, policy)
            fill(pool, policy, first_LE)
            run = running_of(pool, first_LE, machine, no_guesses())
        events = events_of(work, policy)
        yield _timed(work, events, policy, pool, semantics, machine, no_guesses(), run)


def _timed(
    work: Workload,
    events: Events,
    policy: Policy,
    pool: Pool,
    semantics: int,
    machine: Machine,
    guesses: Guesses,
    run: Running,
) -> Timed:
    time_S, outcome_A = np.zeros(work.n_steps, np.int64), np.zeros(work.n_accesses, np.uint8)
    engine(policy.rules, "timed").timed(
        events, pool, semantics, machine, guesses, run, time_S, outcome_A
    )
    counts = dict(zip(COUNTS, run.counts.tolist(), strict=True))
    return Timed(time_S, outcome_A, counts, int((pool.slot_LE >= 0).sum()))
