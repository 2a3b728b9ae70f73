"""What caches hold beyond their room, where room is made only after use (`semantics=overshoot`).

It runs nothing: who was missing says it. V events, G caches, A accesses; sizes, rooms and results are in units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.pool import MISS
from prefetch.sim.engines.start import groups_of
from prefetch.sim.workload import Workload


def held_beyond(
    work: Workload,
    outcome_A: NDArray[np.uint8],
    room_G: Sequence[int],
    size_L: Sequence[int],
    begun_G: NDArray[np.int64],
    is_run_S: NDArray[np.bool_],
) -> int:
    """At most at any time, all caches together. An event larger than its cache stays whole until that cache's next one.

    begun_G: what is there from the start. is_run_S: other steps bring nothing into the caches.
    """
    n_layers, sizes_V = work.card.n_layers, np.diff(work.start_V)
    layer_V = np.arange(len(sizes_V)) % n_layers
    unit_V = np.array(size_L, np.int64)[layer_V] * np.repeat(is_run_S, n_layers)
    event_A = np.repeat(np.arange(len(sizes_V)), sizes_V)
    loads_V = np.bincount(event_A[outcome_A == MISS], minlength=len(sizes_V)) * unit_V
    needs_V, group_V = sizes_V * unit_V, groups_of(n_layers, len(room_G))[layer_V]
    own_V, peak_V, change_V = (np.zeros(len(sizes_V), np.int64) for _ in range(3))
    for group, room in enumerate(room_G):
        at = np.flatnonzero((group_V == group) & (needs_V > 0))
        loads, needs = loads_V[at], needs_V[at]
        filled = begun_G[group] + loads.cumsum() - loads
        before = np.maximum(np.minimum(filled, room), np.append(0, needs[:-1])[: len(at)])
        own_V[at] = np.maximum(0, before - room)
        peak_V[at] = np.maximum(0, before + loads - room)
        change_V[at] = np.diff(np.maximum(0, needs - room), prepend=0)
    others_V = change_V.cumsum() - change_V - own_V
    return int((others_V + peak_V).max(initial=0))
