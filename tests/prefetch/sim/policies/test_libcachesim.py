"""Access by access, what libcachesim 0.3.5 (Yang et al.) decides, where its rules and ours have the same name.

It knows no events, so accesses are replayed one by one. Its S3-FIFO aborts or never hits below 20 slots. Its ARC keeps
the target as a float, so that a tie may pass unnoticed: both are compared with the paper's rules, written down here,
once in floats and once in exact fractions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from sticky_workloads import sticky

from prefetch.sim.engines.pool import SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.arc import Arc
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policy import Policy

lcs = pytest.importorskip(
    "libcachesim",
    reason="libcachesim 0.3.5 is the oracle of this file; its wheel wants the system's libglib-2.0",
    exc_type=ImportError,
)

PAIRS = (
    (Lru(), "LRU"), (Fifo(), "FIFO"), (Lfu(), "LFU"), (Sieve(), "Sieve"), (S3Fifo(), "S3FIFO"),
    (BeladyForced(), "Belady"),
)  # fmt: skip
NEVER = np.iinfo(np.int64).max
each_pair = pytest.mark.parametrize(("policy", "name"), PAIRS, ids=[name for _, name in PAIRS])


def theirs(name: str, ids: np.ndarray[Any, Any], capacity: int) -> np.ndarray[Any, Any]:
    """1 where an access hits."""
    cache = getattr(lcs, name)(capacity, hashpower=10)
    due, last = np.full(len(ids), NEVER), {}
    for at in range(len(ids) - 1, -1, -1):
        due[at] = last.get(ids[at], NEVER)
        last[ids[at]] = at
    request, hits = lcs.Request(), np.zeros(len(ids), np.uint8)
    request.obj_size, request.valid, request.op = 1, True, lcs.ReqOp.OP_GET
    for at, entry in enumerate(ids.tolist()):
        request.clock_time, request.obj_id, request.next_access_vtime = at, entry + 1, int(due[at])
        hits[at] = cache._cache.get(request)
    return hits


@each_pair
@pytest.mark.parametrize("capacity", [6, 8, 16, 19, 20, 24, 32, 45, 63, 64])
def test_one_cache_per_layer(policy: Policy, name: str, capacity: int) -> None:
    if name == "S3FIFO" and capacity < 20:
        pytest.skip("libcachesim's S3-FIFO aborts or never hits below 20 slots")
    work = sticky(1, n_tokens=1500, n_layers=3)
    ours = replay(work, policy, [capacity] * 3, [1] * 3, SEQUENTIAL).reshape(-1, 3, 6)
    for layer in range(3):
        ids = work.ids_A.reshape(-1, 3, 6)[:, layer].ravel()
        np.testing.assert_array_equal(ours[:, layer].ravel(), theirs(name, ids, capacity))


@each_pair
@pytest.mark.parametrize("capacity", [100, 216, 864, 1500])
def test_one_cache_for_all_layers(policy: Policy, name: str, capacity: int) -> None:
    work = sticky(2, n_tokens=400, n_layers=27)
    ids = work.ids_A.reshape(-1, 27, 6) + np.arange(27)[:, None] * 64
    ours = replay(work, policy, [capacity], [1] * 27, SEQUENTIAL)
    np.testing.assert_array_equal(ours, theirs(name, ids.ravel(), capacity))


def paper_arc(
    ids: np.ndarray[Any, Any], capacity: int, number: Callable[[int, int], Any]
) -> list[int]:
    """ARC(c) as in figure 4 of Megiddo and Modha (2003), least recent first; `number` divides."""
    t1, t2, b1, b2 = (OrderedDict[int, None]() for _ in range(4))
    target, hits = number(0, 1), []

    def replace(is_in_b2: bool) -> None:
        from_t1 = len(t1) > target or (is_in_b2 and len(t1) == target)
        source, ghosts = (t1, b1) if t1 and (from_t1 or not t2) else (t2, b2)
        ghosts[source.popitem(last=False)[0]] = None

    for x in ids.tolist():
        hits.append(int(x in t1 or x in t2))
        if hits[-1]:
            t1.pop(x, None)
            t2.pop(x, None)
            t2[x] = None
            continue
        if x in b1:
            target = min(number(capacity, 1), target + max(number(len(b2), len(b1)), 1))
            replace(False)
            del b1[x]
            t2[x] = None
            continue
        if x in b2:
            target = max(number(0, 1), target - max(number(len(b1), len(b2)), 1))
            replace(True)
            del b2[x]
            t2[x] = None
            continue
        if len(t1) + len(b1) == capacity:
            if len(t1) < capacity:
                b1.popitem(last=False)
                replace(False)
            else:
                t1.popitem(last=False)
        elif len(t1) + len(t2) + len(b1) + len(b2) >= capacity:
            if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                b2.popitem(last=False)
            replace(False)
        t1[x] = None
    return hits


@pytest.mark.parametrize("capacity", [1, 2, 6, 8, 16, 19, 24, 30, 45, 63, 64])
def test_arc_is_that_of_the_paper(capacity: int) -> None:
    work = sticky(1, n_tokens=1500, n_layers=3)
    ours = replay(work, Arc(), [capacity] * 3, [1] * 3, SEQUENTIAL).reshape(-1, 3, 6)
    for layer in range(3):
        ids = work.ids_A.reshape(-1, 3, 6)[:, layer].ravel()
        np.testing.assert_array_equal(ours[:, layer].ravel(), paper_arc(ids, capacity, Fraction))
        in_floats = paper_arc(ids, capacity, lambda many, few: many / few)
        if capacity > 2:
            np.testing.assert_array_equal(in_floats, theirs("ARC", ids, capacity))


@pytest.mark.parametrize("capacity", [100, 216, 864])
def test_arc_is_theirs_for_all_layers(capacity: int) -> None:
    work = sticky(2, n_tokens=400, n_layers=27)
    ids = (work.ids_A.reshape(-1, 27, 6) + np.arange(27)[:, None] * 64).ravel()
    ours = replay(work, Arc(), [capacity], [1] * 27, SEQUENTIAL)
    np.testing.assert_array_equal(ours, theirs("ARC", ids, capacity))
