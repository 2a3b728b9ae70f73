"""How long a call takes: CUDA events on a GPU, the monotonic clock on a CPU. Median and quartiles of several calls.

Every call finds cold caches, as the layers of a model do: a large buffer is written before it. On a GPU that also hides
the host behind the device, so that what is timed is the device's work, as long as launching takes less than writing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefetch.engine.profiling.device import Place

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
FOREVER = 1e18  # seconds
Call = Callable[[], Any]
Sample = Callable[[], int]  # nanoseconds, asked for when the device is done


@dataclass(frozen=True)
class Times:
    median_ns: int
    p25_ns: int
    p75_ns: int
    fastest_ns: int
    calls: int

    @property
    def spread(self) -> float:
        """Between the quartiles, as a share of the median."""
        return (self.p75_ns - self.p25_ns) / self.median_ns if self.median_ns else 0.0


def times_of(ns: list[int]) -> Times:
    """Of at least one call."""
    low, middle, high = np.percentile(ns, [25, 50, 75])
    return Times(max(1, round(middle)), round(low), round(high), max(1, min(ns)), len(ns))


class Clock:
    """One per run: it holds the buffer that clears caches."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._buffer = torch.empty(place.flush_bytes, dtype=torch.uint8, device=place.device)

    def times(self, call: Call, repeats: int, most_s: float = FOREVER) -> Times:
        """At most `repeats` calls after one that warms up; of calls that are long, as many as fit, and at least one."""
        (found,) = self.together([call], repeats, most_s)
        assert found is not None
        return found

    def together(
        self, calls: Sequence[Call], repeats: int, most_s: float = FOREVER, end_s: float = FOREVER
    ) -> list[Times | None]:
        """All of them in turns, so that whatever else the machine does meets each alike. `most_s` is for each; after
        `end_s` on the monotonic clock nothing more begins: None = it had no turn."""
        turns = [max(1, min(repeats, int(most_s / self._warm(call)))) for call in calls]
        samples: list[list[Sample]] = [[] for _ in calls]
        for turn in range(max(turns, default=0)):
            for call, n, taken in zip(calls, turns, samples, strict=True):
                if turn < n and time.monotonic() < end_s:
                    taken.append(self._sample(call))
        self.wait()
        return [times_of([read() for read in taken]) if taken else None for taken in samples]

    def wait(self) -> None:
        if self.place.is_gpu:
            torch.cuda.synchronize(self.place.device)

    def clear(self) -> None:
        self._buffer.zero_()

    def _warm(self, call: Call) -> float:
        """Seconds of a first call."""
        begin = time.perf_counter()
        call()
        self.wait()
        return max(time.perf_counter() - begin, 1e-9)

    def _sample(self, call: Call) -> Sample:
        self.clear()
        if self.place.is_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            return lambda: max(1, round(begin.elapsed_time(end) * NS_PER_MS))
        started = time.perf_counter_ns()
        kept = call()
        ns = time.perf_counter_ns() - started
        del kept  # giving memory back is not the call's work
        return lambda: ns
