"""A device that is the host's own memory: a thread copies, the thread that calls computes. Real copies, honest order.

It knows no weights: a pool and the blocks that are copied into it are rows of tensors. The compute stream is the
caller: what stands on it is done when the call returns, and a wait of it is a wait of the caller.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from torch import Tensor

from prefetch.engine.backend import COMPUTE, COPY, Body, EngineError, Launches, names
from prefetch.sim.engines.reference import Entry

Block = Callable[[Entry], Tensor]  # the host's bytes of an expert
DONE = 0  # of the compute stream: at once


class CpuBackend(Launches):
    """A moment on the copy stream is the number of copies that were given until then."""

    def __init__(self, pool_SN: Tensor, block: Block, body: Body) -> None:
        super().__init__(body)
        self.pool_SN, self.copies = pool_SN, Copies(pool_SN, block)
        self.waited_ns: Counter[str] = Counter()
        self.n_copies = 0
        self.stop = self.copies.stop

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def copy(self, entry: Entry, slot: int) -> None:
        self.n_copies += 1
        self.copies.jobs.put((entry, slot))

    @property
    def link_ns(self) -> int:
        return self.copies.took_ns

    def record(self, stream: str) -> int:
        return self.n_copies if stream == COPY else DONE

    def after(self, stream: str, done: int, reason: str = "") -> None:
        if stream == COMPUTE and not self.is_done(done):
            began = time.monotonic_ns()
            self.wait([done])
            self.waited_ns[reason] += (time.monotonic_ns() - began) if reason else 0

    def is_done(self, done: int) -> bool:
        return self.copies.has(done)

    def wait(self, any_of: Sequence[int]) -> None:
        self.copies.wait(min(any_of))

    def close(self) -> None:
        self.stop()


class Copies:
    """A thread and what it copies. It holds no body: whoever forgets a backend must be able to end it."""

    def __init__(self, pool_SN: Tensor, block: Block) -> None:
        self.pool_SN, self.block = pool_SN, block
        self.done = self.took_ns = 0
        self.failed: Exception | None = None
        self.jobs: SimpleQueue[tuple[Entry, int] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._copy_all, name="copies", daemon=True)
        self._thread.start()

    def has(self, n: int) -> bool:
        with self._changed:
            self._raise()
            return self.done >= n

    def wait(self, n: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failed or self.done >= n)
            self._raise()

    def stop(self) -> None:
        self.jobs.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self.failed is not None:
            raise EngineError(f"a copy failed: {self.failed}") from self.failed

    def _copy_all(self) -> None:
        while (job := self.jobs.get()) is not None:
            (entry, slot), began = job, time.monotonic_ns()
            try:
                self.pool_SN[slot].copy_(self.block(entry))
            except Exception as error:  # whatever it is, whoever waits must hear of it
                with self._changed:
                    self.failed = RuntimeError(f"{names([entry])} into slot {slot}: {error}")
                    self._changed.notify_all()
                return
            with self._changed:
                self.done += 1
                self.took_ns += time.monotonic_ns() - began
                self._changed.notify_all()
