"""How much of the time is MoE, by three denominators that must not be mixed up.

Kernel time adds the kernels' durations (kernels that overlap count twice), busy time is when the device did anything,
elapsed time runs from its first activity to its last, waiting included. On a CPU an operation's duration is its own
time, without those that it calls. It knows no operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.device.attribution import Work
from analysis.device.enclosing import own_time
from analysis.device.profile_trace import OPERATION, ProfileTrace

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Times:
    """Nanoseconds, over all devices; a device that did nothing is not counted."""

    kernel_ns: int
    moe_kernel_ns: int
    busy_ns: int  # copies and fills included
    moe_busy_ns: int
    elapsed_ns: int
    n_kernels: int
    n_moe_kernels: int
    beside_ns: int  # kernels in a MoE module, outside the operation that is the layer
    is_cpu: bool = False

    @property
    def unit(self) -> str:
        return "CPU operations" if self.is_cpu else "GPU kernels"

    @property
    def sum_of(self) -> str:
        """What the sum of all their durations is called."""
        return "the operations' time" if self.is_cpu else "kernel time"

    @property
    def of_kernel_time(self) -> float:
        return _ratio(self.moe_kernel_ns, self.kernel_ns)

    @property
    def of_busy_time(self) -> float:
        return _ratio(self.moe_busy_ns, self.busy_ns)

    @property
    def of_elapsed_time(self) -> float:
        return _ratio(self.moe_busy_ns, self.elapsed_ns)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def times_of(trace: ProfileTrace, work: Work) -> Times:
    busy, moe_busy, elapsed = _of_host(trace, work) if work.is_cpu else _of_devices(trace, work)
    return Times(
        kernel_ns=int(work.took_W.sum()),
        moe_kernel_ns=int(work.took_W[work.is_moe_W].sum()),
        busy_ns=busy,
        moe_busy_ns=moe_busy,
        elapsed_ns=elapsed,
        n_kernels=len(work.took_W),
        n_moe_kernels=int(work.is_moe_W.sum()),
        beside_ns=int(work.took_W[work.is_beside_W].sum()),
        is_cpu=work.is_cpu,
    )


def _of_devices(trace: ProfileTrace, work: Work) -> tuple[int, int, int]:
    every, is_moe_W = trace.activities, work.is_moe_W
    moe = (work.start_W[is_moe_W], work.took_W[is_moe_W], work.device_W[is_moe_W])
    return (
        _union(every.start, every.took, every.device),
        _union(*moe),
        _elapsed(every.start, every.took, every.device),
    )


def _of_host(trace: ProfileTrace, work: Work) -> tuple[int, int, int]:
    """Threads at once count once. W pieces of work are the operations among the spans, in their order."""
    spans, own = trace.spans, own_time(trace)
    is_operation_S, is_moe_S = spans.kind == OPERATION, np.zeros(len(spans), bool)
    is_moe_S[is_operation_S] = work.is_moe_W
    start, took, mine_G = (
        spans.start[is_operation_S],
        spans.took[is_operation_S],
        is_moe_S[own.owner_G],
    )
    here, moe = np.zeros(len(start), np.int64), np.zeros(int(mine_G.sum()), np.int64)
    return (
        _union(start, took, here),
        _union(own.start_G[mine_G], own.took_G[mine_G], moe),
        _elapsed(start, took, here),
    )


def _elapsed(start: Ints, took: Ints, device: Ints) -> int:
    here = [device == d for d in np.unique(device)]
    return sum(int((start[m] + took[m]).max() - start[m].min()) for m in here)


def _union(start: Ints, took: Ints, device: Ints) -> int:
    """Time in which anything ran, device by device."""
    total = 0
    for d in np.unique(device):
        mine = np.flatnonzero(device == d)
        mine = mine[np.argsort(start[mine], kind="stable")]
        ends = np.maximum.accumulate(start[mine] + took[mine])
        begun = np.maximum(start[mine], np.concatenate([start[mine][:1], ends[:-1]]))
        total += int(np.maximum(0, ends - begun).sum())
    return total
