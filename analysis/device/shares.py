"""How much of the time is MoE, by three denominators that must not be mixed up.

Kernel time adds the kernels' durations (kernels that overlap count twice), busy time is when the device did anything,
elapsed time runs from its first activity to its last, waiting included. It knows no operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.device.attribution import Work
from analysis.device.profile_trace import ProfileTrace

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
    unit: str = "GPU kernels"

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
    is_moe = work.is_moe_W
    every, moe = (work.start_W, work.took_W, work.device_W), is_moe
    activities = trace.activities
    if work.is_cpu:
        busy = elapsed = int(work.took_W.sum())
        moe_busy = int(work.took_W[is_moe].sum())
        elapsed = _elapsed(*every)
    else:
        busy = _union(activities.start, activities.took, activities.device)
        elapsed = _elapsed(activities.start, activities.took, activities.device)
        moe_busy = _union(*(column[moe] for column in every))
    return Times(
        kernel_ns=int(work.took_W.sum()),
        moe_kernel_ns=int(work.took_W[is_moe].sum()),
        busy_ns=busy,
        moe_busy_ns=moe_busy,
        elapsed_ns=elapsed,
        n_kernels=len(work.took_W),
        n_moe_kernels=int(is_moe.sum()),
        beside_ns=int(work.took_W[work.is_beside_W].sum()),
        unit="CPU operations (their own time)" if work.is_cpu else "GPU kernels",
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
