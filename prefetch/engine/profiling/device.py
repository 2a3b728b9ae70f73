"""Where things are timed: the device that was asked for, what it is called, and how much memory it has.

It times nothing. Nothing here is a name of the network or of a user: two equal machines say the same of themselves.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from prefetch import __version__
from prefetch.artifacts import library_version
from prefetch.errors import ConfigError

CACHE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CPU_CACHE_BYTES = 32 * 2**20  # where the system does not say
GPU_FLUSH_BYTES = 256 * 2**20  # more than any GPU's cache, as Triton's own benchmark does
KIB = 1024


@dataclass(frozen=True)
class Place:
    device: torch.device
    name: str
    total_bytes: int
    free_bytes: int  # when the run began
    flush_bytes: int  # what is written between two calls, so that each finds cold caches

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def place_of(asked: str) -> Place:
    """`auto` is a GPU where there is one. A device that is not there is an error, never another one."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        asked = "cuda" if n_gpus else "cpu"
    kind, _, number = asked.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"profile.device={asked}: expected auto, cpu, cuda or cuda:1")
    if kind == "cpu":
        return host()
    index = int(number or 0)
    if index >= n_gpus:
        build = f"PyTorch {torch.__version__}"
        raise ConfigError(
            f"profile.device={asked}: {build} sees {n_gpus} CUDA device{'' if n_gpus == 1 else 's'} here; "
            "pass profile.device=cpu, or leave it out"
        )
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return Place(device, name, total_bytes, free_bytes, GPU_FLUSH_BYTES)


def host() -> Place:
    """The processor as a device."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{_processor()}, {cores} core{'' if cores == 1 else 's'}"
    return Place(torch.device("cpu"), name, total_bytes, _free(total_bytes), 2 * _cache_bytes())


@contextmanager
def using(threads: int | None) -> Iterator[int]:
    """So many threads for torch on the CPU; None = as many as there are cores that nobody else keeps busy. A product
    whose threads wait for a core takes a hundred times as long, which says nothing about the product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or free_threads(before, os.getloadavg()[0], os.cpu_count() or 1))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def free_threads(usual: int, load: float, cores: int) -> int:
    """`load`: how many processes ran or waited for a core, over the last minute."""
    return max(1, min(usual, cores - round(load)))


def facts(place: Place) -> dict[str, str | int]:
    """What a reader must know of the machine to believe a time: its parts and the versions of what ran on it."""
    return {
        "device": place.name,
        "device_kind": "gpu" if place.is_gpu else "cpu",
        "host": host().name,
        "threads": torch.get_num_threads(),
        "device_bytes": place.total_bytes,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": library_version("triton"),
        "prefetch": __version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _free(total_bytes: int) -> int:
    """Linux counts what it can take back from its page cache; elsewhere half is taken to be free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total_bytes // 2
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * KIB if found else total_bytes // 2


def _cache_bytes() -> int:
    try:
        told = CACHE_FILE.read_text().strip()
    except OSError:
        return CPU_CACHE_BYTES
    return int(told[:-1]) * KIB if told.endswith("K") else CPU_CACHE_BYTES
