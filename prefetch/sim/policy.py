"""What decides who leaves a cache: the contract of eviction policies. It knows no trace, no clock and no compiler.

A policy is plain functions over whole numbers; the engines call the same ones, compiled or not. Most policies are a
key: whoever has the lowest leaves. The others keep a state of their own, as an array of numbers per cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

State = NDArray[np.int64]
BUSY = np.int64(2**63 - 1)  # of a slot that nobody may be evicted from: in use, in flight, or empty
# For compiled functions that allocate nothing: arrays are not counted as used. numba hides this option from its hints.
UNCOUNTED: dict[str, Any] = {"_nrt": False}
ROWS = ("scores", "weights", "tokens", "guesses")  # what the rows that a policy is told may hold
STAYS = -1  # instead of a victim: whoever was loaded is used and not kept
FEW, BLOCK = (
    128,
    64,
)  # slots that are looked through one by one; slots that share a bound where there are more


class Seen(NamedTuple):
    """What is known of an expert in the moment in which it is used or loaded. All whole numbers."""

    now: int  # rises with every use and every load; no two are equal
    step: int  # the engine's step; for an expert loaded ahead, the one that it is meant for
    entry: int  # which expert of which layer: layer * E + expert
    uses: int  # of this expert so far, evicted in between or not, this one counted
    next_use: int  # the access that needs it next; only where `needs` says "future"
    score: (
        int  # what the row that the policy is told of says of it; of a copy made ahead, its guess
    )


def ignore(
    state: State, n_slots: int, step: int, layer: int, row_E: NDArray[np.int32], is_first: bool
) -> None:
    """`told` of a policy that is told nothing but uses."""


@dataclass(frozen=True)
class KeyRules:
    """Whoever has the lowest key leaves, of equal keys the lowest slot. Keys are not negative."""

    on_fill: Callable[[Seen], int]
    on_use: Callable[[int, Seen], int]  # the key so far


@dataclass(frozen=True)
class StateRules:
    """The policy keeps its own order. `busy_N` is BUSY in slots that must stay as they are, else 0."""

    state_size: Callable[[int, int], int]  # (slots, experts that may be cached in them) -> numbers
    start: Callable[..., None]  # (state, slots of this cache, *settings of the policy)
    filled: Callable[[State, int, int, Seen], None]  # (state, slots, slot, seen)
    used: Callable[[State, int, int, bool, Seen], None]  # ... and whether it was loaded just now
    victim: Callable[[State, int, NDArray[np.int64], Seen], int]  # seen: who comes in
    # (state, slots, step, layer, row over the layer's experts, whether a new sequence begins), see `told`
    told: Callable[[State, int, int, int, NDArray[np.int32], bool], None] = ignore


Rules = KeyRules | StateRules


class Policy(Protocol):
    """Settings of a policy, and its rules. What is missing of its needs is an error.

    needs: "future", the next use of everybody; "counts", uses in other requests; or one of `ROWS` (see `told`).
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    after_use: ClassVar[bool]  # decides when all of an event are used: it may keep any of them
    rules: ClassVar[Rules]


def settings_of(policy: Any) -> tuple[float, ...]:
    """Numbers that `start` is handed after the capacity: a seed."""
    return tuple(getattr(policy, "settings", ()))
