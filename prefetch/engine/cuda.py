"""A CUDA device: one stream computes, one copies; blocks come from pinned memory, and slots are rows of one tensor.

It knows no weights. The pool is allocated once and never moves, so that nothing of it has to be told to the allocator.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefetch.engine.backend import COPY, Body, EngineError, Launches, names
from prefetch.engine.cpu import Block
from prefetch.errors import ConfigError
from prefetch.sim.engines.reference import Entry

NS_PER_MS = 1_000_000
LINK = "link_ns"


def need_device(name: str) -> torch.device:
    """A device that is not there is said at once."""
    name = str(name)
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= n_gpus:
        raise ConfigError(
            f"device={name}: torch finds {n_gpus or 'no'} CUDA device here (its build: "
            f"{torch.__version__}); use device=cpu, or run this where there is one"
        )
    if kind == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    return torch.device(name)


class CudaBackend(Launches):
    """A moment is a CUDA event. Waits that have a reason are timed by events around them."""

    def __init__(self, pool_SN: Tensor, block: Block, body: Body) -> None:
        super().__init__(body)
        self.pool_SN, self.block = pool_SN, block
        self.copies = torch.cuda.Stream(pool_SN.device)
        self.n_copies = 0
        self.stop = partial(torch.cuda.synchronize, pool_SN.device)
        self._computes = torch.cuda.current_stream(pool_SN.device)
        self._spans = Spans()
        torch.cuda.synchronize(pool_SN.device)  # the pool and all weights are there

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def copy(self, entry: Entry, slot: int) -> None:
        self.n_copies += 1
        block = self.block(entry)
        if not block.is_pinned():
            raise EngineError(f"{names([entry])}: its block is not in pinned memory")
        try:
            begin, end = _moments()
            with torch.cuda.stream(self.copies):
                begin.record()
                self.pool_SN[slot].copy_(block, non_blocking=True)
                end.record()
            self._spans.add(LINK, begin, end)
        except RuntimeError as error:
            raise EngineError(
                f"a copy failed: {names([entry])} into slot {slot}: {error}"
            ) from error

    def _of(self, stream: str) -> Any:
        """The caller's own stream computes, whichever that is now; a new one follows the old."""
        if stream == COPY:
            return self.copies
        current = torch.cuda.current_stream(self.pool_SN.device)
        if current != self._computes:
            current.wait_stream(self._computes)
            self._computes = current
        return current

    def record(self, stream: str) -> Any:
        done = torch.cuda.Event()
        done.record(self._of(stream))
        return done

    def after(self, stream: str, done: Any, reason: str = "") -> None:
        if not reason or done.query():
            self._of(stream).wait_event(done)
            return
        begin, end = _moments()
        begin.record(self._of(stream))
        self._of(stream).wait_event(done)
        end.record(self._of(stream))
        self._spans.add(reason, begin, end)

    def is_done(self, done: Any) -> bool:
        return bool(done.query())

    def wait(self, any_of: Sequence[Any]) -> None:
        """Spins: whoever sleeps here wakes too late."""
        if len(any_of) == 1:
            any_of[0].synchronize()
            return
        while not any(done.query() for done in any_of):
            pass

    @property
    def link_ns(self) -> int:
        return self._passed()[LINK]

    @property
    def waited_ns(self) -> Mapping[str, int]:
        return {name: ns for name, ns in self._passed().items() if name != LINK}

    def _passed(self) -> Counter[str]:
        torch.cuda.synchronize(self.pool_SN.device)
        return self._spans.settled()

    def close(self) -> None:
        self.stop()


class Spans:
    """Times between two moments, by name: added up as they pass, so that no more are held than are under way."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self.under_way: dict[bool, deque[tuple[str, Any, Any]]] = {True: deque(), False: deque()}

    def add(self, name: str, begin: Any, end: Any) -> None:
        self.under_way[name == LINK].append((name, begin, end))
        self.settled()

    def settled(self) -> Counter[str]:
        """Each of the two streams passes in its order: nobody is asked behind one that has not passed."""
        for spans in self.under_way.values():
            while spans and spans[0][2].query():
                name, begin, end = spans.popleft()
                self.ns[name] += round(begin.elapsed_time(end) * NS_PER_MS)
        return self.ns


def _moments() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
