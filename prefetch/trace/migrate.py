"""A trace of an older version of the format, written anew in the one that is read: a chain of steps, one per version.

A step takes a folder of version n and writes one of version n + 1; it knows those two and no other. Raise the number in
`parquet.SCHEMA` only together with a step here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefetch.errors import FormatError, reading
from prefetch.manifest import MANIFEST
from prefetch.trace.checks import check_trace
from prefetch.trace.parquet import SCHEMA, TraceReader
from prefetch.trace.rewrite import Written
from prefetch.trace.target import check_apart, new_folder
from prefetch.trace.version import split_schema

ABOUT = "trace.json"
Step = Callable[[Path, Path], None]  # (folder of version n, empty folder that becomes n + 1)
STEPS: Mapping[int, Step] = {}  # version 1 is the first that was published: there is none before it


def migrate(folder: Path | str, to: Path | str, *, steps: Mapping[int, Step] = STEPS) -> Written:
    """Writes the trace into the new folder `to`, in the version of `SCHEMA`, and checks what came out."""
    source = Path(folder)
    check_apart(to, source)
    numbers = _way(source, steps)
    with (
        new_folder(to) as new,
        TemporaryDirectory(dir=new.parent, prefix=f"{new.name}-") as between,
    ):
        here = source
        for number in numbers:
            there = new if number == numbers[-1] else Path(between) / str(number + 1)
            there.mkdir(exist_ok=True)
            with reading(source, f"a trace of version {number}"):
                steps[number](here, there)
            here = there
        told = f"{split_schema(SCHEMA)[0]}/{numbers[0]}"
        with reading(source, f"a trace of version {numbers[0]}"):
            _remember(new, f"migrated from {told}")
            reader = TraceReader(new)
            check_trace(reader)
    return Written(Path(to), reader.n_tokens, reader.n_requests, (f"{told} -> {SCHEMA}",))


def _way(source: Path, steps: Mapping[int, Step]) -> range:
    """The versions from which a step is taken, one after the other."""
    found, (family, latest) = version_of(source), split_schema(SCHEMA)
    assert latest is not None
    if found == latest:
        raise FormatError(f"{source}: is {SCHEMA} already: there is nothing to migrate")
    if found > latest:
        raise FormatError(
            f"{source}: is {family}/{found}, which a newer version of this project wrote; this one reads up to "
            f"{SCHEMA}: update it"
        )
    if missing := [n for n in range(found, latest) if n not in steps]:
        raise FormatError(
            f"{source}: is {family}/{found}, and no step leads from version {missing[0]} to {missing[0] + 1}: that "
            "version was never published; record the trace again"
        )
    return range(found, latest)


def version_of(folder: Path) -> int:
    """The number in a trace's description, whatever version it is."""
    path = folder / ABOUT
    if not path.is_file():
        raise FormatError(f"{path}: not found; expected the folder of a trace")
    with reading(path, "the description of a trace"):
        about = json.loads(path.read_text())
        family, number = split_schema(about.get("schema"))
    if family != split_schema(SCHEMA)[0] or number is None:
        raise FormatError(f"{path}: expected a schema like {SCHEMA}, found {about.get('schema')!r}")
    return number


def step_of_description(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Step:
    """The step of a version that only describes differently: `change` gives the new `trace.json`, the rows stay."""

    def step(old: Path, new: Path) -> None:
        for path in sorted(old.iterdir()):
            if path.is_file() and path.name not in (ABOUT, MANIFEST):
                shutil.copyfile(path, new / path.name)
        about = change(json.loads((old / ABOUT).read_text()))
        (new / ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    return step


def _remember(folder: Path, note: str) -> None:
    path = folder / ABOUT
    about = json.loads(path.read_text())
    about["provenance"]["notes"] = [*about["provenance"].get("notes", []), note]
    path.write_text(json.dumps(about, indent=1) + "\n")
