"""Evicts whoever was used least often in the whole run, evicted in between or not; ties like LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policy import KeyRules, Rules, Seen

STAMP_BITS = 40


def on_fill(seen: Seen) -> int:
    return (seen.uses << STAMP_BITS) | seen.now


def on_use(key: int, seen: Seen) -> int:
    return (seen.uses << STAMP_BITS) | seen.now


@dataclass(frozen=True)
class LfuPersistent:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
