"""Queues in an array of numbers: rings of nodes, oldest to newest, in which any node can be put and taken at once.

A node is a place in the array: two numbers, who is older and who is newer. A ring is such a node, older than the oldest
and newer than the newest; alone it points at itself. Policies of several queues have a ring and its length for each, a
node for every expert, cached or not, that also says which queue it is in and which slot it had, and at the end the node
of every slot. Their first two queues hold whoever is in the cache.
"""

from __future__ import annotations

from numba import njit

OLDER, NEWER = 0, 1
LENGTH, QUEUE_WIDE = 2, 3  # behind a ring's neighbours; numbers per queue
QUEUE, SLOT = 2, 3  # behind a node's neighbours
NOWHERE = -1  # instead of a queue


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


@njit(cache=True)
def empty(state, n_queues, nodes, wide):  # type: ignore[no-untyped-def]
    """No queue has anybody; nodes begin at `nodes`, each `wide` numbers. Slots have numbers below any node."""
    for ring in range(0, n_queues * QUEUE_WIDE, QUEUE_WIDE):
        state[ring + OLDER], state[ring + NEWER] = ring, ring
    state[nodes + QUEUE :: wide] = NOWHERE


@njit(cache=True)
def node_of(state, n_slots, entry, nodes, wide):  # type: ignore[no-untyped-def]
    n_entries = (len(state) - n_slots - nodes) // wide
    return nodes + wide * (entry % n_entries)


@njit(cache=True)
def is_here(state, node):  # type: ignore[no-untyped-def]
    return 0 <= state[node + QUEUE] < 2 * QUEUE_WIDE


@njit(cache=True)
def join(state, ring, node):  # type: ignore[no-untyped-def]
    put(state, ring, node)
    state[node + QUEUE] = ring
    state[ring + LENGTH] += 1


@njit(cache=True)
def drop(state, node):  # type: ignore[no-untyped-def]
    take(state, node)
    state[state[node + QUEUE] + LENGTH] -= 1
    state[node + QUEUE] = NOWHERE


@njit(cache=True)
def settle(state, n_slots, slot, node, nodes):  # type: ignore[no-untyped-def]
    """The node has this slot, which somebody else may have emptied without a word; it is in no queue of the cache."""
    before = state[len(state) - n_slots + slot]
    if before >= nodes and state[before + SLOT] == slot and is_here(state, before):
        drop(state, before)
    if is_here(state, node):
        drop(state, node)
    state[node + SLOT], state[len(state) - n_slots + slot] = slot, node
