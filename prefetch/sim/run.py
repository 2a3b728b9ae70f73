"""Runs a workload through a cache: the one door to the compiled engines for whoever has a policy and a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.sim.compiled import engine
from prefetch.sim.machine import COUNTS, Guesses, Machine, no_guesses, running_of
from prefetch.sim.policy import Policy
from prefetch.sim.pool import AFTER_USE, ATOMIC, OVERSHOOT, SEQUENTIAL, Events, Pool, pool_of
from prefetch.sim.workload import Workload, next_uses

NONE_A = np.empty(0, np.int64)


def replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    semantics: int = ATOMIC,
    *,
    score_A: NDArray[np.int64] = NONE_A,
) -> NDArray[np.uint8]:
    """HIT or MISS of every access: no clock, no guesses. Sizes and rooms (one per layer, or one) are in units."""
    pool, semantics = prepared(work, policy, room_G, size_L, semantics)
    outcome_A = np.zeros(work.n_accesses, np.uint8)
    engine(policy.rules).replay(events_of(work, policy, score_A), pool, semantics, outcome_A)
    return outcome_A


def prepared(
    work: Workload, policy: Policy, room_G: Sequence[int], size_L: Sequence[int], semantics: int
) -> tuple[Pool, int]:
    """Empty caches, and the semantics that this policy runs under: one that decides after use does so."""
    if policy.after_use and semantics == ATOMIC:
        semantics = AFTER_USE
    overshoots = semantics in (
        AFTER_USE,
        OVERSHOOT,
    )  # by one event, and what is left of the one before
    spare = 2 * work.card.n_experts if overshoots else 0
    rooms, sizes = np.array(room_G, np.int64), np.array(size_L, np.int64)
    return pool_of(policy, rooms, sizes, work.card.n_experts, spare=spare), semantics


def events_of(work: Workload, policy: Policy, score_A: NDArray[np.int64] = NONE_A) -> Events:
    if "scores" in policy.needs and not len(score_A):
        raise MissingData(f"{type(policy).__name__} needs scores of the experts that are used")
    next_A = next_uses(work)[0] if "future" in policy.needs else NONE_A
    return Events(work.ids_A, work.tokens_A, work.start_V, next_A, score_A)


@dataclass(frozen=True, eq=False)
class Timed:
    """What a timed run was: nanoseconds of every step, HIT, LATE or MISS of every access, and sums."""

    time_S: NDArray[np.int64]
    outcome_A: NDArray[np.uint8]
    counts: dict[str, int]
    resident: int  # experts in the caches when the run was over


def timed_replay(
    work: Workload,
    policy: Policy,
    room_G: Sequence[int],
    size_L: Sequence[int],
    machine: Machine,
    guesses: Guesses | None = None,
    semantics: int = ATOMIC,
    *,
    score_A: NDArray[np.int64] = NONE_A,
    warm: NDArray[np.int64] = NONE_A,
) -> Timed:
    """The same with a clock, a link and guesses that are copied ahead.

    `warm`: entries (layer * E + expert) that are there from the start, for a cache whose misses the host computes.
    """
    if semantics == SEQUENTIAL:
        raise ConfigError(
            "semantics=sequential has no clock: the experts of an event are needed at once"
        )
    guesses = guesses or no_guesses()
    pool, semantics = prepared(work, policy, room_G, size_L, semantics)
    _warm(pool, warm)
    events, first_LE = events_of(work, policy, score_A), np.zeros_like(pool.uses_LE)
    if "future" in policy.needs:
        first_LE = next_uses(work)[1]
    waiting = (guesses.ahead + 1) * guesses.ids_VW.shape[1] + machine.uploads
    run = running_of(pool, first_LE, waiting=waiting)
    time_S, outcome_A = np.zeros(work.n_steps, np.int64), np.zeros(work.n_accesses, np.uint8)
    engine(policy.rules, "timed").timed(
        events, pool, semantics, machine, guesses, run, time_S, outcome_A
    )
    counts = dict(zip(COUNTS, run.counts.tolist(), strict=True))
    return Timed(time_S, outcome_A, counts, int((pool.slot_LE >= 0).sum()))


def _warm(pool: Pool, entries: NDArray[np.int64]) -> None:
    """Puts them in, in their order, as far as there is room."""
    n_experts = pool.slot_LE.shape[1]
    for entry in entries.tolist():
        layer, expert = divmod(entry, n_experts)
        group = int(pool.group_L[layer])
        if pool.left_G[group] < pool.size_L[layer]:
            continue
        pool.n_free_G[group] -= 1
        slot = int(pool.free_GN[group, pool.n_free_G[group]])
        pool.slot_LE[layer, expert], pool.entry_GN[group, slot] = slot, entry
        pool.busy_GN[group, slot] = 0
        pool.left_G[group] -= pool.size_L[layer]
