"""Every reader of a file from outside: how it is called, and small sound files of its format.

Adding a reader costs an entry in the table of `READERS` and a function that makes its seeds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]  # relative path -> content: one input


@dataclass(frozen=True)
class Reader:
    name: str
    seeds: Callable[[], list[Files]]
    read: Callable[
        [Path, Path], object
    ]  # (folder of the input, empty folder that may be written to)


def readers() -> dict[str, Reader]:
    """By name; the modules that make their seeds are imported here, since they import much."""
    found: dict[str, Reader] = {}
    for module in (
        "array_seeds",
        "source_seeds",
        "trace_seeds",
        "settings_seeds",
        "profile_seeds",
        "run_seeds",
        "store_seeds",
        "work_seeds",
    ):
        for reader in importlib.import_module(f"fuzzing.{module}").READERS:
            found[reader.name] = reader
    return found
