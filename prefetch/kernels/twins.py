"""Which of the two twins runs: Triton for a tensor on a GPU or under its interpreter, torch's definition otherwise.

It knows no operation. The interpreter does arithmetic on bf16's bits as if they were integers
(github.com/triton-lang/triton/issues/11584): operands must be made float32 before anything is done with them.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from prefetch.errors import ConfigError


def interpreted() -> bool:
    """Triton was asked to run its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: Tensor) -> bool:
    wanted = tensor.is_cuda or interpreted()
    if wanted and not _has_triton():
        raise ConfigError(
            "tensors on a GPU, and TRITON_INTERPRET=1, need triton, which is not installed: "
            "pip install triton; or call the definition, whose name ends in _torch"
        )
    return wanted


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_together(*tensors: Tensor | None) -> None:
    """All on one device: a kernel reads addresses, whoever's they are."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ConfigError(f"all tensors must lie on one device; found {found}")


def upcast(dtype: torch.dtype, wanted: bool | None = None) -> bool:
    """Whether a kernel makes its operands float32 first: always for bf16 under the interpreter."""
    needed = interpreted() and dtype == torch.bfloat16
    if needed and wanted is False:
        raise ConfigError(
            "under TRITON_INTERPRET=1 products of bf16 are silently wrong: leave `upcast` unset or set it to True"
        )
    return needed if wanted is None else wanted
