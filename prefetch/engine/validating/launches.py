"""Launches of single experts: whoever was waited for is launched alone, and each launch costs something of its own.

It measures nothing. A prediction has one launch before every event; here is what they truly add, after what copies hide
of them: while an expert is still copied, the launch of those before costs nobody anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.machine import Machine
from prefetch.sim.engines.pool import HIT, LATE, MISS
from prefetch.sim.workload import Workload


def extra_ns_S(
    outcome_A: NDArray[np.integer], work: Workload, machine: Machine, launch_ns: int
) -> NDArray[np.int64]:
    """Of every step: how much later its events end (earlier, if negative) than with one launch before each of them.

    The link is taken to be free as an event begins; who is on the way then is taken to land at once.
    """
    extra_S, n_layers = np.zeros(work.n_steps, np.int64), work.card.n_layers
    for event in range(len(work.start_V) - 1):
        accesses = slice(int(work.start_V[event]), int(work.start_V[event + 1]))
        step, layer = divmod(event, n_layers)
        outcome, tokens = outcome_A[accesses], work.tokens_A[accesses]
        weight_ns, token_ns = int(machine.weight_ns_L[layer]), int(machine.token_ns_L[layer])
        took = np.maximum(weight_ns, token_ns * tokens.astype(np.int64))
        there_ns, copy_ns = int(took[outcome == HIT].sum()), int(machine.whole_ns_L[layer])
        single = [int(ns) for kind in (LATE, MISS) for ns in took[outcome == kind]]
        n_late = int((outcome == LATE).sum())
        ready = [max(0, i + 1 - n_late) * copy_ns for i in range(len(single))]
        first_ns = launch_ns + there_ns if there_ns else 0  # while copies run
        alone = [launch_ns + ns for ns in single]
        extra_S[step] += _ends(first_ns, ready, alone) - _ends(there_ns, ready, single)
        extra_S[step] -= launch_ns if len(outcome) else 0  # stands before the event
    return extra_S


def _ends(begin: int, ready: list[int], took: list[int]) -> int:
    for at, ns in zip(ready, took, strict=True):
        begin = max(begin, at) + ns
    return begin
