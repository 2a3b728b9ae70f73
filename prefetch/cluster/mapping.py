"""Maps over shards on a Dask cluster: processes of this machine, a scheduler's address, or Slurm.

It knows no stage and no trace. Without a cluster nothing is mapped: stages loop in this process, as they always do.
With one, workers read shards themselves, and what shards share from one file in the store; only results travel. Dask
is imported when the first shard is sent.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from filelock import FileLock

from prefetch.artifacts import UNFINISHED, lock_path
from prefetch.cluster import connect
from prefetch.cluster.connect import ClusterError
from prefetch.cluster.worker import CODE, Task, Work, run, versions, write_state
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.leaves import instantiate
from prefetch.progress import Progress

log = logging.getLogger(__name__)
LOOK_S = 2.0  # between two looks at whether any worker is left
AHEAD = 2  # shards per worker that may be under way or wait for an earlier one, where order counts


@dataclass(frozen=True)
class InProcess:
    """No cluster."""


@dataclass(frozen=True)
class Dask:
    """Where workers are, and how a map is cut; configs/cluster/dask.yaml documents each."""

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    retries: int = 3
    shards_per_worker: int = 2
    shard_rows: int = 1 << 16
    timeout_s: float = 10.0
    slurm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        claims = {
            f"address={self.address}: expected tcp://HOST:PORT, the address of a Dask scheduler": self.address
            is None
            or "://" in self.address,
            "address and slurm: one of the two says where workers are": None
            in (self.address, self.slurm),
            "address and workers: the scheduler there has the workers that it has": None
            in (self.address, self.workers),
            f"{', '.join(f'{name}={value}' for name, value in self._counts.items())}: must be at least 1": min(
                self._counts.values()
            )
            >= 1,
            f"retries={self.retries}: must not be negative": self.retries >= 0,
            f"timeout_s={self.timeout_s}: must be more than 0": self.timeout_s > 0,
        }
        for claim, holds in claims.items():
            if not holds:
                raise ConfigError(claim)

    @property
    def _counts(self) -> dict[str, int]:
        names = ("workers", "threads", "shards_per_worker", "shard_rows")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def cluster_of(cfg: Config) -> Cluster | None:
    """The cluster that was chosen at the root; None = this process. It is opened by its first map, and kept."""
    chosen = instantiate(cfg.cluster, "cluster")
    if isinstance(chosen, InProcess):
        return None
    folder = Path(cfg.store).resolve() / "cluster"
    key = json.dumps([str(folder), asdict(chosen)], sort_keys=True)
    if key not in _kept:
        _kept[key] = Cluster(chosen, folder)
    return _kept[key]


_kept: dict[str, Cluster] = {}  # one per settings: stages and jobs of one process share it


@dataclass(eq=False)
class Cluster:
    """`folder`: where every worker looks for what the shards of a map share."""

    settings: Dask
    folder: Path

    def n_shards(self, rows: int) -> int:
        """How many stretches so many rows are cut into. No number may depend on it."""
        told = self.settings
        return max(1, min(-(-rows // told.shard_rows), self._n_workers * told.shards_per_worker))

    def map(
        self,
        work: Work,
        items: Sequence[Any],
        state: Any = None,
        *,
        title: str,
        names: Sequence[str],
        in_order: bool = True,
        unit: str = "shards",
    ) -> Iterator[tuple[int, Any]]:
        """Places and results of `work(state, item)`: in the order of the items, or as they come.

        An error names its shard. Whoever stops listening, or is interrupted, takes back what was not done.
        """
        if not items:
            return
        reach = max(AHEAD * self._n_workers, 0 if in_order else len(items))
        sent = _Sent(self._client)
        with self._written(state) as path, Progress(title, len(items), unit) as progress:
            known = self._versions
            tasks = [Task(work, path, item, self.settings.threads, known) for item in items]
            try:
                for place, future in sent.through(tasks, reach, self._check):
                    progress.advance(1)
                    sent.held[place] = self._result(future, f"{title}, {names[place]}")
                    yield from sent.ready(None if in_order else place)
            finally:
                sent.take_back()

    @property
    def _n_workers(self) -> int:
        """Asked before anything is sent: who is not there any more is connected to again."""
        client = self.__dict__.get("_client")
        if client is not None and client.status != "running":
            self.close()
        if self.settings.slurm is not None:
            return self.settings.workers or 1  # some may still wait for a machine
        try:
            return max(1, len(self._client.nthreads()))  # all may have died, and begin again
        except OSError as error:
            raise ClusterError(f"the scheduler at {self._where} went away; run again") from error

    @property
    def _versions(self) -> dict[str, str]:
        """Processes of this machine have this very code, though files may change while they start."""
        is_here = self.settings.address is None and self.settings.slurm is None
        return {name: value for name, value in versions().items() if name != CODE or not is_here}

    @contextmanager
    def _written(self, state: Any) -> Iterator[Path]:
        """For as long as it is read. Its lock says to whoever tidies the store that it is."""
        name = uuid.uuid4().hex[:12]
        folder = self.folder / f".{name}{UNFINISHED}"
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_path(self.folder / name)
        with FileLock(lock):
            folder.mkdir()
            try:
                write_state(folder / "state", state)
                yield folder / "state"
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _result(self, future: Any, name: str) -> Any:
        if future.status == "finished":
            return future.result()
        if future.status == "cancelled":
            raise ClusterError(f"{name}: the scheduler at {self._where} went away, or lost it")
        error = future.exception()
        raise connect.explained(error, name) from error

    def _check(self) -> None:
        """Called while nothing comes: is anybody there?"""
        until = time.monotonic() + self.settings.timeout_s
        while self._client.status != "running":
            if time.monotonic() > until:
                raise ClusterError(f"the scheduler at {self._where} does not answer any more")
            time.sleep(LOOK_S / 10)
        if self.settings.slurm is not None or self._client.nthreads():
            return
        if self.settings.address is not None:
            connect.wait_for_workers(self._client, self.settings, "has no workers any more")
        else:
            connect.revive(self._client)

    @property
    def _where(self) -> str:
        return str(self.settings.address or self._client.scheduler.address)

    @cached_property
    def _client(self) -> Any:
        client = connect.connected(self.settings)
        atexit.register(self.close)
        log.info("cluster: %s, %d workers", client.scheduler.address, len(client.nthreads()))
        return client

    def close(self) -> None:
        """Ends what was started here; workers of an address stay."""
        atexit.unregister(self.close)
        client = self.__dict__.pop("_client", None)
        if client is not None:
            owned = client.cluster
            client.close()
            if owned is not None:
                owned.close()


class _Sent:
    """Shards under way, those that came back, and results that wait for an earlier one."""

    def __init__(self, client: Any) -> None:
        self._client, self._name = client, uuid.uuid4().hex[:12]
        self._futures: dict[int, Any] = {}
        self._back: SimpleQueue[int] = SimpleQueue()
        self.held: dict[int, Any] = {}
        self._told = 0

    def through(
        self, tasks: Sequence[Task], reach: int, look: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """Each as it comes back; no more than `reach` are sent beyond what was told."""
        begun = 0
        for _ in tasks:
            while begun < min(len(tasks), self._told + reach):
                self._send(begun, tasks[begun])
                begun += 1
            yield self._next(look)

    def ready(self, place: int | None) -> Iterator[tuple[int, Any]]:
        """This result; without a place, those whose turn it is."""
        while self.held and (place is not None or self._told in self.held):
            first = self._told if place is None else place
            self._told += 1
            yield first, self.held.pop(first)

    def _send(self, place: int, task: Task) -> None:
        future = self._client.submit(run, task, key=f"shard-{self._name}-{place}", pure=False)
        self._futures[place] = future
        future.add_done_callback(lambda _: self._back.put(place))

    def _next(self, look: Callable[[], None]) -> tuple[int, Any]:
        while True:
            try:
                place = self._back.get(timeout=LOOK_S)
                return place, self._futures.pop(place)
            except Empty:
                look()

    def take_back(self) -> None:
        if self._futures and self._client.status == "running":
            self._client.cancel(list(self._futures.values()))
