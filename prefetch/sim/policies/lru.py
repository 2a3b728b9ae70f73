"""Evicts whoever was used longest ago."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policy import KeyRules, Rules, Seen


def on_fill(seen: Seen) -> int:
    return seen.now


def on_use(key: int, seen: Seen) -> int:
    return seen.now


@dataclass(frozen=True)
class Lru:
    needs: ClassVar[tuple[str, ...]] = ()
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
