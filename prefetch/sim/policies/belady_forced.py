"""Belady's choice of who leaves, where everyone who is loaded is also kept, as in a cache without a way around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.sim.policies.belady import on_fill, on_use
from prefetch.sim.policy import KeyRules, Rules


@dataclass(frozen=True)
class BeladyForced:
    needs: ClassVar[tuple[str, ...]] = ("future",)
    after_use: ClassVar[bool] = False
    rules: ClassVar[Rules] = KeyRules(on_fill, on_use)
