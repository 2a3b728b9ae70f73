"""Host memory that a GPU copies from: exactly as large as what lies in it, pinned where it lies, given back at the end.

torch's own pinned allocator rounds a block up to the next power of two, so that 1.1 GiB of a layer's experts take 2.
Here each block is a map of its own, less than a page larger than what it holds, and registered with the driver as it
stands. It knows no experts.
"""

from __future__ import annotations

import logging
import mmap
from typing import Any

import torch
from torch import Tensor

from prefetch.errors import PrefetchError
from prefetch.sim.memory import spoken

log = logging.getLogger(__name__)
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process
DONE, UNLOADING = (
    0,
    4,
)  # cudaSuccess, cudaErrorCudartUnloading: the process ends, and its memory with it


class PinError(PrefetchError):
    """The driver pinned no memory, or did not give it back."""


class Arena:
    """Of a CPU it holds what it is given, as it is: its copies need no pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: dict[int, mmap.mmap] = {}  # where each begins

    @property
    def pinned_bytes(self) -> int:
        return sum(len(held) for held in self._pinned.values())

    def hold(self, block: Tensor) -> Tensor:
        """The same numbers in pinned memory, until `close`."""
        if self.device.type != "cuda" or not block.numel():
            return block
        held = mmap.mmap(-1, pages(block.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        bytes_B = torch.frombuffer(held, dtype=torch.uint8)
        found = bytes_B[: block.nbytes].view(block.dtype).view(block.shape)
        found.copy_(block)  # before it is pinned: pages that are there are pinned sooner
        self._register(bytes_B.data_ptr(), held)
        return found

    def close(self) -> None:
        """Whatever is still copied must have ended. What was held can be read on, and is pinned no more."""
        runtime: Any = torch.cuda.cudart() if self._pinned else None
        while self._pinned:
            begin, held = self._pinned.popitem()
            code = int(runtime.cudaHostUnregister(begin))
            if code not in (DONE, UNLOADING):
                log.warning(
                    "%s stay pinned until the process ends: %s", spoken(len(held)), _said(code)
                )

    def _register(self, begin: int, held: mmap.mmap) -> None:
        with torch.cuda.device(self.device):  # its context is there
            code = int(torch.cuda.cudart().cudaHostRegister(begin, len(held), PORTABLE))
        if code != DONE:
            before = self.pinned_bytes
            self.close()
            raise PinError(
                f"cudaHostRegister pinned no {spoken(len(held))} of host memory ({_said(code)}), after "
                f"{spoken(before)} that are given back now. Pinned memory is not swapped and counts against what the "
                "machine has free, a container's limit and, on some systems, `ulimit -l`: raise them, or take a "
                "smaller model or fewer of its layers"
            )
        self._pinned[begin] = held


def pages(n_bytes: int) -> int:
    """In bytes: what a map takes."""
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _said(code: int) -> str:
    runtime: Any = torch.cuda.cudart()
    try:
        told = runtime.cudaGetErrorString(runtime.cudaError(code))
    except (AttributeError, TypeError, ValueError):  # of a code that this torch has no name for
        return f"CUDA error {code}"
    return f"CUDA error {code}: {told}"
