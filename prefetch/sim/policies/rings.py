"""Queues in an array of numbers: rings of nodes, oldest to newest, in which any node can be put and taken at once.

It knows no cache. A node is a place in the array: two numbers, who is older and who is newer. A ring is such a node,
older than the oldest and newer than the newest; alone it points at itself.
"""

from __future__ import annotations

from numba import njit

OLDER, NEWER = 0, 1


@njit(cache=True)
def put(state, ring, node):  # type: ignore[no-untyped-def]
    """Behind the newest."""
    newest = state[ring + OLDER]
    state[node + OLDER], state[node + NEWER] = newest, ring
    state[newest + NEWER], state[ring + OLDER] = node, node


@njit(cache=True)
def take(state, node):  # type: ignore[no-untyped-def]
    older, newer = state[node + OLDER], state[node + NEWER]
    state[older + NEWER], state[newer + OLDER] = newer, older
