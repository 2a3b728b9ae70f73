"""What a worker of a cluster does with a shard: it checks that it is one of ours, reads what shards share, and works.

It knows no scheduler, no stage and no trace. Nothing here imports Dask: a worker of any kind may run it.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefetch import __version__
from prefetch.artifacts import library_version
from prefetch.errors import ConfigError
from prefetch.manifest import code_digest

THREADS = "PREFETCH_THREADS"  # in the environment of a worker: what its process may use
OF_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
LIBRARIES = ("python", "numpy", "numba", "pyarrow", "pandas")  # that numbers and files depend on
CODE = "code of the project"
CODEC = "lz4"  # counts are mostly zeros, or small

Work = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Task:
    """One shard: `work(state, item)`, where the state is what all shards of a map share."""

    work: Work
    state: Path
    item: Any
    threads: int
    versions: Mapping[str, str]  # of whoever asks


def run(task: Task) -> Any:
    check_versions(task.versions)
    limit_threads(task.threads)
    return task.work(_shared(task.state), task.item)


@lru_cache(maxsize=1)
def _shared(path: Path) -> Any:
    """Read once by each worker; whoever works on it leaves it as it was."""
    need_seen(path)
    return read_state(path)


def need_seen(path: Path) -> None:
    """A worker reads shards itself: under the same path as whoever asks."""
    if not path.exists():
        raise ConfigError(
            f"{path}: not seen from worker {socket.gethostname()}; on a cluster the store (store=DIR) and the trace "
            "must lie in a folder that every machine sees under this path"
        )


def versions() -> dict[str, str]:
    """Of this process, by name."""
    return {
        "prefetch": __version__,
        **{name: library_version(name) for name in LIBRARIES},
        CODE: code_digest(),
    }


def check_versions(expected: Mapping[str, str]) -> None:
    found = versions()
    odd = [
        f"{name} is {found.get(name)} there and {mine} here"
        for name, mine in expected.items()
        if found.get(name) != mine
    ]
    if odd:
        raise ConfigError(
            f"worker {socket.gethostname()} would not count as this process does: {'; '.join(odd)}; give the workers "
            "the same environment"
        )


@lru_cache(maxsize=1)  # tasks of two maps may come in turn
def limit_threads(threads: int) -> None:
    """For the rest of this process: libraries that are loaded, those that are not yet, and our own pools."""
    from threadpoolctl import threadpool_limits

    os.environ |= dict.fromkeys((THREADS, *OF_LIBRARIES), str(threads))
    threadpool_limits(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def n_threads() -> int:
    """What pools of threads in this process may use: all cores, but on a worker what its cluster was given."""
    if given := os.environ.get(THREADS):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packed(value: Any, known: Sequence[Any] = ()) -> bytes:
    """A pickle without the objects that both sides have: they are named by their place in `known`."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, CODEC) as stream:
        _Pickler(stream, known).dump(value)
    return bytes(sink.getvalue())


def unpacked(data: bytes, known: Sequence[Any] = ()) -> Any:
    with pa.CompressedInputStream(pa.BufferReader(data), CODEC) as stream:
        return _Unpickler(io.BytesIO(stream.read()), known).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: Any, known: Sequence[Any]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._place = {id(value): place for place, value in enumerate(known)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._place.get(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, known: Sequence[Any]) -> None:
        super().__init__(stream)
        self._known = known

    def persistent_load(self, pid: Any) -> Any:
        return self._known[pid]


def write_state(path: Path, state: Any) -> None:
    """By value where a function has no module to be found in."""
    import cloudpickle  # comes with Dask

    with pa.CompressedOutputStream(str(path), CODEC) as stream:
        cloudpickle.dump(state, stream)


def read_state(path: Path) -> Any:
    with pa.CompressedInputStream(str(path), CODEC) as stream:
        return pickle.load(stream)  # written by `write_state` of the run that asks
