"""Who is in the caches before the first event: pinned experts, that never leave, and those of a warm start.

It knows no clock and counts no copies. Entries are layer * E + expert, the most used first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.sim.engines.pool import Pool
from prefetch.sim.policy import BLOCK, BUSY, FEW, KeyRules, Policy, Seen

NOBODY = np.empty(0, np.int64)


def fill(
    pool: Pool,
    policy: Policy,
    first_LE: NDArray[np.int64],
    *,
    warm: NDArray[np.int64] = NOBODY,
    pinned: NDArray[np.int64] = NOBODY,
) -> None:
    """Pinned ones, then as many of the others as there is room for. The most used are put in last: as if used last.

    `first_LE`: the access that first needs each, where the policy knows the future.
    """
    if "counts" in policy.needs and not len(warm):
        raise MissingData(
            f"{type(policy).__name__} needs counts: hand in `warm`, experts by their use in other requests"
        )
    n_experts, entries = pool.slot_LE.shape[1], np.concatenate([pinned, warm])
    taken = taken_of(entries, pool.group_L, pool.size_L, pool.room_G, n_experts)
    _check(pool, taken, pinned)
    for entry in reversed(taken):
        pool.clock[0] += 1
        group, slot = _put(pool, entry)
        seen = Seen(int(pool.clock[0]), 0, entry, 0, int(first_LE.flat[entry]), 0)
        _admit(pool, policy, group, slot, seen)
    for entry in pinned.tolist():
        group, slot = int(pool.group_L[entry // pool.slot_LE.shape[1]]), pool.slot_LE.flat[entry]
        pool.busy_GN[group, slot] = pool.idle_GN[group, slot] = BUSY


def taken_of(
    entries: NDArray[np.int64],
    group_L: NDArray[np.int64],
    size_L: Sequence[int] | NDArray[np.int64],
    room_G: Sequence[int] | NDArray[np.int64],
    n_experts: int,
) -> list[int]:
    """As many as there is room for, each once, in their order."""
    left_G, taken = np.array(room_G, np.int64), dict[int, None]()
    for entry in entries.tolist():
        layer = entry // n_experts
        group, size = group_L[layer], size_L[layer]
        if entry not in taken and size <= left_G[group]:
            left_G[group] -= size
            taken[entry] = None
    return list(taken)


def groups_of(n_layers: int, n_caches: int) -> NDArray[np.int64]:
    """The cache that each layer's experts go to."""
    return np.arange(n_layers) if n_caches > 1 else np.zeros(n_layers, np.int64)


def _check(pool: Pool, taken: list[int], pinned: NDArray[np.int64]) -> None:
    homeless = np.setdiff1d(pinned, taken)
    if len(homeless):
        raise ConfigError(
            f"{len(pinned)} experts are pinned, and {len(homeless)} of them have no room in caches of "
            f"{pool.room_G.tolist()[:4]} units (an expert has {pool.size_L.tolist()[:4]}): pin fewer, or give more room"
        )


def _put(pool: Pool, entry: int) -> tuple[int, int]:
    layer = entry // pool.slot_LE.shape[1]
    group = int(pool.group_L[layer])
    pool.n_free_G[group] -= 1
    slot = int(pool.free_GN[group, pool.n_free_G[group]])
    pool.slot_LE.flat[entry], pool.entry_GN[group, slot] = slot, entry
    pool.busy_GN[group, slot] = 0
    pool.left_G[group] -= pool.size_L[layer]
    return group, slot


def _admit(pool: Pool, policy: Policy, group: int, slot: int, seen: Seen) -> None:
    """The policy has a newcomer; where a cache has many slots, their block has a key (see `keyed`)."""
    rules, state_M, n_slots = policy.rules, pool.state_GM[group], pool.busy_GN.shape[1]
    if not isinstance(rules, KeyRules):
        rules.filled(state_M, n_slots, slot, seen)
        return
    state_M[slot] = rules.on_fill(seen)
    if n_slots > FEW:
        block = n_slots + slot // BLOCK
        state_M[block] = min(state_M[block], state_M[slot])
