"""The most memory that a call has at once, beside what was there before it.

On a GPU the allocator says it. On a CPU there is no such counter: tensors that torch's operations return are counted
while they are alive, so that scratch inside one operation is not seen. It knows no layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefetch.engine.profiling.device import Place

ALLOCATOR, COUNTED = "measured: the GPU's allocator", "measured: tensors alive at once"


def peak_bytes(call: Callable[[], Any], place: Place) -> tuple[int, Any]:
    """... and what the call returned."""
    if not place.is_gpu:
        with Alive() as alive:
            out = call()
        return alive.peak_bytes, out
    torch.cuda.synchronize(place.device)
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    out = call()
    torch.cuda.synchronize(place.device)
    return torch.cuda.max_memory_allocated(place.device) - before, out


def source_of(place: Place) -> str:
    return ALLOCATOR if place.is_gpu else COUNTED


class Alive(TorchDispatchMode):
    """Counts the storages that operations made; views and results written in place are nobody's new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._given: set[int] = set()  # storages that were there before
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given.add(storage._cdata)
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self._made.items() if storage.expired()]:
            del self._made[key]
        for storage in _storages(out):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(n for _, n in self._made.values()))
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
