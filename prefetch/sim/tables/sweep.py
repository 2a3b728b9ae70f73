"""Runs the cells of a table, several at a time, and keeps every row at once: an interrupted run goes on where it was.

It knows no stage and no policy. A row is kept under a digest of everything that it depends on, array by array, in a
folder of this version of the simulator's code; whatever else is found there is made anew. Compiled engines let go of
the interpreter while they run, so that threads are enough.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from prefetch.artifacts import UNFINISHED
from prefetch.cluster.mapping import Cluster
from prefetch.cluster.worker import n_threads
from prefetch.errors import ConfigError
from prefetch.progress import Progress
from prefetch.sim.code import CODE_KEY, own_code
from prefetch.written import write_whole

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Apart:
    """A row made in another process: `row(value)`, with a value that jobs of the same key share."""

    row: Callable[[Any], Mapping[str, Any]]
    shared: tuple[Any, Callable[[], Any]]  # key, and what makes the value
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One row: how it is made, and everything that it depends on."""

    run: Callable[[], Mapping[str, Any]]
    depends: Any
    apart: Apart | None = None  # the same in another process; None = `run` is as good there


class Kept:
    """Finished rows in a store, a file each. What is damaged or another's is told and made anew."""

    def __init__(self, root: Path) -> None:
        # the name of what an interrupted build leaves: `artifacts.remove=unused` clears it away
        self.folder = root / "cells" / f".{CODE_KEY}{UNFINISHED}"
        self._digests: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        self._is_writable = True

    def key(self, job: Job) -> str:
        digest = hashlib.sha256()
        self._feed(digest, job.depends)
        return digest.hexdigest()[:24]

    def find(self, key: str) -> Row | None:
        path = self.folder / f"{key}.json"
        try:
            told = json.loads(path.read_text())
            row: Row = told["row"]
            if told["key"] != key or told["sum"] != _sum(row):
                raise ValueError("it is of another cell, or was changed")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning("%s: cannot be used (%s); the cell is run again", path, error)
            return None
        return row

    def keep(self, key: str, row: Row) -> None:
        if not self._is_writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = {"key": key, "sum": _sum(row), "row": row}
            write_whole(self.folder / f"{key}.json", json.dumps(text) + "\n", lasting=False)
        except OSError as error:
            self._is_writable = False
            log.warning("%s: rows cannot be kept (%s); the run goes on", self.folder, error)

    def _feed(self, digest: Any, value: Any) -> None:
        """Everything that tells two values apart, and nothing that differs from run to run."""
        if isinstance(value, np.ndarray):
            digest.update(self._of_array(value))
        elif value is None or isinstance(value, (bool, int, float, str, np.generic)):
            digest.update(f"{type(value).__name__}:{value!r};".encode())
        elif isinstance(value, Mapping):
            self._feed(digest, [(str(name), value[name]) for name in value])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{type(value).__name__}[{len(value)}".encode())
            for part in value:
                self._feed(digest, part)
        else:
            kind = type(value)
            digest.update(
                f"{kind.__module__}.{kind.__qualname__}{own_code(kind.__module__)}".encode()
            )
            self._feed(digest, _parts(value))

    def _of_array(self, array: np.ndarray[Any, Any]) -> bytes:
        """Cells share their largest arrays: those are read once."""
        known = self._digests.get(id(array))
        if known is None or known[0]() is not array:
            content = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
            content.update(np.ascontiguousarray(array).data)
            known = self._digests[id(array)] = (weakref.ref(array), content.digest())
        return known[1]


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, partial):
        return {"function": value.func, "words": value.args, "named": value.keywords}
    if isinstance(value, FunctionType):
        return _named(value)
    if dataclasses.is_dataclass(value):
        return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if not hasattr(value, "__dict__"):
        raise TypeError(f"{type(value).__name__}: cannot be told from another of its kind")
    return vars(value)


def _named(function: FunctionType) -> dict[str, Any]:
    """A function of a module, by its name there and the module's code; others have nothing that tells them apart."""
    name, module = function.__qualname__, function.__module__
    if "<" in name:
        raise ConfigError(
            f"{module}.{name}: a setting of a policy that cannot be told from another, so that no row of it can be "
            "kept; give it a function of a module, by its name"
        )
    return {"name": f"{module}.{name}", "code": own_code(module)}


def _sum(row: Row) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]


def run_all(
    jobs: Sequence[Job],
    kept: Kept,
    *,
    workers: int | None = None,
    title: str = "evaluating",
    cluster: Cluster | None = None,
) -> list[Row]:
    """The rows in the order of their jobs, whoever was finished first."""
    keys = [kept.key(job) for job in jobs]
    rows = [kept.find(key) for key in keys]
    todo = [i for i, row in enumerate(rows) if row is None]
    if len(todo) < len(jobs):
        log.info("%s: %d of %d cells were run before", title, len(jobs) - len(todo), len(jobs))

    if cluster is not None and todo:
        for i, row in _rows_from(cluster, jobs, todo, title):
            kept.keep(keys[i], row)
            rows[i] = row
        return [row for row in rows if row is not None]

    def made(i: int) -> Row:
        row = {name: _plain(value) for name, value in jobs[i].run().items()}
        kept.keep(keys[i], row)
        return row

    pool = ThreadPoolExecutor(workers or n_threads(), thread_name_prefix="cell")
    try:
        with Progress(title, len(todo), "cells") as progress:
            place: dict[Future[Row], int] = {pool.submit(made, i): i for i in todo}
            for done in as_completed(place):
                rows[place[done]] = done.result()
                progress.advance(1)
    finally:  # interrupted: cells that have begun are finished and kept, no other begins
        pool.shutdown(wait=True, cancel_futures=True)
    return [row for row in rows if row is not None]


def _rows_from(
    cluster: Cluster, jobs: Sequence[Job], todo: list[int], title: str
) -> Iterator[tuple[int, Row]]:
    """A cell is a shard; before them, what several share is. A pickle holds every array of theirs once."""
    aparts = [apart for i in todo if (apart := jobs[i].apart) is not None]
    makers = dict(apart.shared for apart in reversed(aparts))
    names = [
        f"{title}: what {n} of {len(makers)} groups of cells share" for n in range(len(makers))
    ]
    values = cluster.map(_made, range(len(makers)), [*makers.values()], title="bounds", names=names)
    known = dict(zip(makers, (value for _, value in values), strict=True)) if makers else {}
    runs = [
        jobs[i].run if (one := jobs[i].apart) is None else partial(one.row, known[one.shared[0]])
        for i in todo
    ]
    names = [one.name if (one := jobs[i].apart) else f"cell {i + 1} of {len(jobs)}" for i in todo]
    told: dict[str, Any] = {"title": title, "names": names, "unit": "cells"}
    for place, row in cluster.map(_made, range(len(todo)), runs, in_order=False, **told):
        yield todo[place], {name: _plain(value) for name, value in row.items()}


def _made(runs: Sequence[Callable[[], Any]], place: int) -> Any:
    return runs[place]()


def _plain(value: Any) -> Any:
    """As it comes back from a file, so that a row that is found equals one that is made."""
    return value.item() if isinstance(value, np.generic) else value
