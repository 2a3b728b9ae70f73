"""One thread: the same sums in the same order on every machine, and no slower on shared cores.

torch is imported when it is asked to, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch. Training the embedded model took 237 CPU seconds with more threads, 43 with one (two shared cores)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
