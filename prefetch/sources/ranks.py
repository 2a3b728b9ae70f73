"""Several processes that record one trace (torchrun): who takes which batches, and where they meet: a folder.

It knows no model and no source. Processes need nothing of each other but a store that all of them see. Each leaves its
share in the folder; the first one puts the shares together. All show that they live; whoever misses one of them gives
up, and what is left behind is named as unfinished.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from prefetch.artifacts import UNFINISHED, lock_path
from prefetch.errors import ArtifactError, ConfigError
from prefetch.trace.parquet import TraceReader, concat
from prefetch.trace.routing import RoutingTrace

BEAT_S = 0.5
SILENCE_S = (
    60.0  # of a process that must be there; a beat is a small file, and file systems are late
)
TOLD = "share.json"


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun, or whoever sets its variables, has started."""

    number: int
    of: int
    on_node: int  # among those of this machine: its GPU
    run: str  # what the processes of one start have in common

    @classmethod
    def of_environment(cls, told: Mapping[str, str] = os.environ) -> Rank | None:
        """None: a process of its own."""
        if int(told.get("WORLD_SIZE", "1")) < 2:
            return None
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "WORLD_SIZE")
        run = hashlib.sha256(json.dumps([told.get(name) for name in names]).encode()).hexdigest()
        number, of = int(told.get("RANK", "-1")), int(told["WORLD_SIZE"])
        if not 0 <= number < of:
            raise ConfigError(f"WORLD_SIZE={of}: expected RANK from 0 to {of - 1}, got {number}")
        return cls(number, of, int(told.get("LOCAL_RANK", number)), run[:8])

    def takes(self, batch: int) -> bool:
        return batch % self.of == self.number


class Meeting:
    """`with Meeting(rank, folder) as meeting:` while a process has to do with the others."""

    def __init__(self, rank: Rank, folder: Path, silence_s: float = SILENCE_S) -> None:
        self.rank, self.silence_s = rank, silence_s
        key = f"{folder.name}-{rank.run}"
        self.folder = folder.with_name(f".{key}{UNFINISHED}")
        self._lock = FileLock(lock_path(folder.with_name(key)))  # says that somebody is at work
        self._me = uuid.uuid4().hex[:12]
        self._is_over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self.rank.number == 0:  # what an earlier start left says nothing about this one
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        self._beats.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._beats.join()
        if error is not None:
            self._write(f"failed-{self.rank.number}", f"{type(error).__name__}: {error}")
        if self.rank.number == 0:
            if error is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _beat(self) -> None:
        count = 0
        while not self._is_over.wait(0 if not count else BEAT_S):
            count += 1
            self._write(self._alive(self.rank.number), f"{self._me} {count}")

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all. Only the first process makes the folder, and removes it."""
        part = self.folder / f"{name}.{self._me}.part"
        try:
            part.write_text(text)
            part.replace(self.folder / name)
        except FileNotFoundError:
            pass  # not made yet, or everything is done
        except OSError as error:
            raise ArtifactError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def _read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except OSError:
            return None

    @staticmethod
    def _alive(number: int) -> str:
        return f"alive-{number}"

    def open(self) -> None:
        """The first process: waits for all, and lets them begin."""
        who: dict[str, str] = {}

        def are_all_here() -> bool:
            for number in range(self.rank.of):
                if text := self._read(self._alive(number)):
                    who[str(number)] = text.split()[0]
            return len(who) == self.rank.of

        self._wait(are_all_here, range(self.rank.of))
        self._write("open", json.dumps(who))

    def wait_for_opening(self, is_made: Callable[[], bool]) -> bool:
        """Any other: has it been let in? False = the trace was made before."""

        def is_let_in() -> bool:
            who = json.loads(self._read("open") or "{}")
            return who.get(str(self.rank.number)) == self._me

        self._wait(lambda: is_let_in() or is_made(), (0,))
        return is_let_in()

    def share(self, number: int | None = None) -> Path:
        return self.folder / f"rank-{self.rank.number if number is None else number}"

    def hand_in(self, told: Mapping[str, Any]) -> None:
        """The share is complete, with what must be known of it beside its rows."""
        part = self.share() / f"{TOLD}.part"
        part.write_text(json.dumps(told))
        part.replace(self.share() / TOLD)

    def shares(self) -> list[dict[str, Any]]:
        """The first process: what all told, once all are done."""
        paths = [self.share(number) / TOLD for number in range(self.rank.of)]
        self._wait(lambda: all(path.exists() for path in paths), range(self.rank.of))
        return [json.loads(path.read_text()) for path in paths]

    def wait_until(self, is_made: Callable[[], bool]) -> None:
        self._wait(is_made, (0,))

    def _wait(self, is_so: Callable[[], bool], needed: Iterable[int]) -> None:
        began = time.monotonic()
        while not is_so():
            for number in needed:
                if number != self.rank.number:
                    self._need(number, began)
            time.sleep(BEAT_S / 5)

    def _need(self, number: int, began: float) -> None:
        """That a process works: it has not failed, and is heard of."""
        if (reason := self._read(f"failed-{number}")) is not None:
            raise ArtifactError(
                f"process {number} of {self.rank.of} failed: {reason}; nothing is kept, run again"
            )
        text, now = self._read(self._alive(number)) or "", time.monotonic()
        if number not in self._heard or self._heard[number][0] != text:
            self._heard[number] = (text, now if text else began)
        if now - max(self._heard[number][1], began) > self.silence_s:
            raise ArtifactError(
                f"process {number} of {self.rank.of} was not heard of for {self.silence_s:g} s in {self.folder}: it "
                "died, or does not see this store; nothing is kept, run again"
            )


def in_order(shares: list[Path], per_batch: int) -> Iterator[RoutingTrace]:
    """The batches of all shares, as one process would have recorded them."""
    found = [path for path in shares if (path / "trace.json").exists()]
    streams = [_batches(TraceReader(path), per_batch) for path in found]
    yield from heapq.merge(*streams, key=lambda block: int(block.request_T[0]))


def _batches(reader: TraceReader, per_batch: int) -> Iterator[RoutingTrace]:
    """Of whole requests, `per_batch` of their numbers each; the last may have fewer."""
    waiting: list[RoutingTrace] = []
    for block in reader.batches(*(name for name in reader.columns if name != "experts")):
        batch_R = block.request_T[block.starts_R] // per_batch
        edges = [0, *(1 + i for i in range(len(batch_R) - 1) if batch_R[i] != batch_R[i + 1])]
        stops = [*(int(block.starts_R[i]) for i in edges[1:]), block.n_tokens]
        for i, stop in zip(edges, stops, strict=True):
            part = block.rows(slice(int(block.starts_R[i]), stop))
            if waiting and waiting[0].request_T[0] // per_batch != batch_R[i]:
                yield concat(waiting)
                waiting = []
            waiting.append(part)
    if waiting:
        yield concat(waiting)
