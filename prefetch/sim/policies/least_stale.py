"""Evicts whoever was touched (used, or copied ahead for) in the oldest step; of those, whoever was touched first in it.

Least-Stale of SpecMD (2602.03921), as moe-cache-eval (2608.07911) has it: whoever the current step did not touch goes
first. Without copies ahead this is LRU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policy import KeyRules, Rules, Seen

STAMP_BITS = 36  # below the step: 2^36 uses and loads, 2^26 steps


def on_fill(seen: Seen) -> int:
    return (seen.step << STAMP_BITS) | seen.now


def on_use(key: int, seen: Seen) -> int:
    return (seen.step << STAMP_BITS) | seen.now


@dataclass(frozen=True)
class LeastStale:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
