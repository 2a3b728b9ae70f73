"""Whose a measurement is, and how far it may be believed: of this machine or of another, on a quiet one or a busy one.

It measures nothing: it reads what lies beside the numbers (`machine.json`, `copies.csv`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

log = logging.getLogger(__name__)
NOISY = (
    0.10  # quartiles of a copy's times that are further apart, of its median: something else ran
)
SMALL_COPY = 2**16  # bytes; of less the clock's own steps are a part
TOLD = {"device": "device", "host": "processor", "device_bytes": "bytes of the device's memory"}
ANEW = "python scripts/run.py stage=profile"


def about(folder: Path) -> dict[str, Any]:
    """What a sealed measurement says of its machine; nothing where it says nothing that can be read."""
    try:
        told = json.loads((folder / "machine.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(told) if isinstance(told, Mapping) else {}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, what of that machine this one is not."""
    return [
        f"its {what} is {there[name]!r}, here {here[name]!r}"
        for name, what in TOLD.items()
        if name in there and name in here and there[name] != here[name]
    ]


def is_of(folder: Path, here: Mapping[str, Any]) -> bool:
    told = about(folder)
    return "device" in told and not differences(told, here)


def spread_of(copies: pd.DataFrame) -> float | None:
    """How far apart the quartiles of a copy's times are, of its median: the middle one of all sizes."""
    needed = ["p25_ns", "p75_ns", "median_ns", "bytes"]
    if not set(needed) <= set(copies.columns):
        return None
    rows = copies[needed].astype(float)
    rows = rows[rows.bytes >= SMALL_COPY]
    apart = (rows.p75_ns - rows.p25_ns) / rows.median_ns
    return float(apart.median()) if len(apart) else None


def load() -> float:
    """How many processes ran or waited for a core, over the last minute."""
    return round(os.getloadavg()[0], 1)


def noise(spread: float | None, told: Mapping[str, Any]) -> str:
    """How far a measurement may be believed, in words."""
    apart = "of unknown spread" if spread is None else f"quartiles of its copies {spread:.1%} apart"
    return f"{apart}, {told['load']} processes at work as it began" if "load" in told else apart


def tell(folder: Path, here: Mapping[str, Any]) -> None:
    """What whoever simulates on it must know, once in a process."""
    _tell(folder, tuple((name, here[name]) for name in TOLD if name in here))


@cache
def _tell(folder: Path, known: tuple[tuple[str, Any], ...]) -> None:
    here = dict(known)
    told, spread = about(folder), None
    with suppress(
        OSError, ValueError, TypeError, OverflowError
    ):  # of an empty or odd one nothing is known
        spread = spread_of(pd.read_csv(folder / "copies.csv"))
    log.info("hardware=measured: %s", noise(spread, told))
    if spread is not None and spread > NOISY:
        log.warning(
            "hardware=measured was measured on a busy machine: %s, where %.0f %% are quiet; measure anew when nothing "
            "else runs: %s",
            noise(spread, told),
            100 * NOISY,
            ANEW,
        )
    if "device" not in told:
        log.warning(
            "hardware=measured does not say which machine it is of; measure this one: %s", ANEW
        )
    elif apart := differences(told, here):
        log.warning(
            "hardware=measured is of another machine: %s. What follows is about that one. To measure this one: %s; to "
            "mean the other: hardware.path=%s",
            "; ".join(apart),
            ANEW,
            folder / "hardware.json",
        )
