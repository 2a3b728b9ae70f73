"""Keeps whoever is needed soonest (Belady 1966), and passes by whoever is needed latest of all: no cache loads less.

It reads the answer: a bound, not a policy that an engine could have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policy import KeyRules, Rules, Seen
from prefetch.sim.workload import NEVER

LATEST = int(NEVER)


def on_fill(seen: Seen) -> int:
    return LATEST - seen.next_use


def on_use(key: int, seen: Seen) -> int:
    return LATEST - seen.next_use


@dataclass(frozen=True)
class Belady:
    needs: ClassVar[tuple[str, ...]] = ("future",)
    after_use: ClassVar[bool] = True
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
