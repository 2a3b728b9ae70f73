"""Pinned memory without a GPU: the driver is a stub that keeps what was registered, and may refuse."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefetch.engine import arena
from prefetch.engine.arena import Arena, PinError
from prefetch.engine.offloaded import _ended

CUDA = torch.device("cuda")


class Driver:
    def __init__(self, refuses_after: int = 99, refuses_back: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.left, self.refuses_back = refuses_after, refuses_back

    def cudaHostRegister(self, begin: int, n_bytes: int, flags: int) -> int:
        if not self.left:
            return 2
        assert begin % mmap.PAGESIZE == 0 and flags == 1
        overlaps = [
            at for at, held in self.pinned.items() if at < begin + n_bytes and begin < at + held
        ]
        assert not overlaps
        self.left -= 1
        self.pinned[begin] = n_bytes
        return 0

    def cudaHostUnregister(self, begin: int) -> int:
        self.pinned.pop(begin)
        return self.refuses_back

    def cudaError(self, code: int) -> int:
        return code

    def cudaGetErrorString(self, code: int) -> str:
        return {2: "out of memory", 1: "invalid argument"}[code]


@pytest.fixture
def driver(monkeypatch):
    def stubbed(**how: int) -> Driver:
        found = Driver(**how)
        stub = SimpleNamespace(cudart=lambda: found, device=lambda _device: nullcontext())
        monkeypatch.setattr(arena.torch, "cuda", stub)
        return found

    return stubbed


@pytest.mark.parametrize("shape", [(3, 5), (1, 4096), (7, 1000003 // 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_block_is_pinned_to_the_page(driver, shape, dtype):
    """torch's allocator would take the next power of two of it."""
    of, block = driver(), torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    held = (pinned := Arena(CUDA)).hold(block)
    assert torch.equal(held, block) and held.dtype == dtype and held.data_ptr() in of.pinned
    assert 0 <= of.pinned[held.data_ptr()] - block.nbytes < mmap.PAGESIZE
    assert pinned.pinned_bytes == sum(of.pinned.values())


def test_all_is_given_back_once_and_can_still_be_read(driver):
    of, pinned = driver(), Arena(CUDA)
    blocks = [torch.full((n, 1000), float(n)) for n in (1, 2, 3)]
    held = [pinned.hold(block) for block in blocks]
    assert len(of.pinned) == 3
    pinned.close()
    pinned.close()
    assert not of.pinned and pinned.pinned_bytes == 0
    assert all(torch.equal(a, b) for a, b in zip(held, blocks, strict=True))


def test_a_refusal_says_why_and_leaves_nothing_pinned(driver):
    of, pinned = driver(refuses_after=2), Arena(CUDA)
    for _ in range(2):
        pinned.hold(torch.zeros(2**20, dtype=torch.uint8))
    said = r"pinned no 3.00 MiB of host memory \(CUDA error 2: out of memory\), after 2.00 MiB that are given back"
    with pytest.raises(PinError, match=said):
        pinned.hold(torch.zeros(3 * 2**20, dtype=torch.uint8))
    assert not of.pinned


def test_memory_that_is_not_taken_back_is_said(driver, caplog):
    driver(refuses_back=1)
    pinned = Arena(CUDA)
    pinned.hold(torch.zeros(8))
    pinned.close()
    assert "stay pinned until the process ends: CUDA error 1: invalid argument" in caplog.text


def test_copies_end_before_their_memory_is_given_back(driver):
    of, pinned, seen = driver(), Arena(CUDA), list[Any]()
    pinned.hold(torch.zeros(8))
    _ended(lambda: seen.append(len(of.pinned)), pinned)
    assert seen == [1] and not of.pinned


def test_a_cpu_needs_no_pinned_memory():
    block = torch.zeros(4)
    pinned = Arena(torch.device("cpu"))
    assert pinned.hold(block) is block and pinned.pinned_bytes == 0
    pinned.close()
