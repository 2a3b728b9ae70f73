"""How long a read from the disk takes that holds the store: one small read, and many bytes in a row.

It knows no artifact. The file is written, made sure of, and taken out of the system's page cache before it is read.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from prefetch.engine.profiling.timing import NS_PER_S, times_of

FILE_BYTES, PIECE, SMALL = 2**26, 2**20, 4096
READS = 32


@dataclass(frozen=True)
class Disk:
    latency_ns: int
    bytes_per_s: int
    is_cold: bool  # False: the system keeps its page cache, so that memory was read


def disk_of(folder: Path) -> Disk:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        piece = os.urandom(PIECE)
        for _ in range(FILE_BYTES // PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        is_cold = _forget(file.fileno())
        begin = time.perf_counter_ns()
        for at in range(0, FILE_BYTES, PIECE):
            os.pread(file.fileno(), PIECE, at)
        rate = FILE_BYTES * NS_PER_S // max(1, time.perf_counter_ns() - begin)
        _forget(file.fileno())
        whole_ns = times_of([_small_ns(file.fileno(), at) for at in _places()]).median_ns
    return Disk(max(0, whole_ns - SMALL * NS_PER_S // rate), max(1, rate), is_cold)


def _places() -> list[int]:
    """Far apart, and in no order that a disk could foresee."""
    places = [i * (FILE_BYTES // READS) for i in range(READS)]
    random.Random(0).shuffle(places)
    return places


def _small_ns(file: int, at: int) -> int:
    begin = time.perf_counter_ns()
    os.pread(file, SMALL, at)
    return time.perf_counter_ns() - begin


def _forget(file: int) -> bool:
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # nor read ahead
    return True
