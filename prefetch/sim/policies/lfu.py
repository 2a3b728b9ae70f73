"""Evicts whoever was used least often since it was loaded; of those, whoever was used longest ago."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policy import KeyRules, Rules, Seen

STAMP_BITS = 40  # below the count; a trace of 10^12 uses


def on_fill(seen: Seen) -> int:
    return seen.now


def on_use(key: int, seen: Seen) -> int:
    return (((key >> STAMP_BITS) + 1) << STAMP_BITS) | seen.now


@dataclass(frozen=True)
class Lfu:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
