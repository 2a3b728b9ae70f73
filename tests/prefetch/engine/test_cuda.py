"""The CUDA backend without a GPU: its streams and events are the fake device's, which finds what nobody waited for."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefetch.engine import cuda
from prefetch.engine.backend import COMPUTE, COPY, EngineError
from prefetch.engine.cuda import CudaBackend
from prefetch.engine.engine import Engine
from prefetch.engine.fake import FakeBackend
from prefetch.engine.replay import drive
from prefetch.sim.engines.pool import ATOMIC
from prefetch.sim.policies.lru import Lru
from tests.prefetch.engine.test_engine import WHOLE, ran
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of

MS = 1e6


class Device:
    """What `torch.cuda` is to the backend, on a virtual clock."""

    def __init__(self, fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake, self.current = fake, Stream(self, COMPUTE)
        self.main = self.current
        stub = SimpleNamespace(
            Stream=lambda _device: Stream(self, COPY),
            Event=lambda enable_timing=False: Event(self),
            current_stream=lambda _device=None: self.current,
            stream=self.stream,
            synchronize=lambda _device=None: [
                fake.wait([fake.record(name)]) for name in (COPY, COMPUTE)
            ],
        )
        monkeypatch.setattr(cuda.torch, "cuda", stub)

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def wait_event(self, event: Event) -> None:
        self.device.fake.after(self.name, event.moment)

    def wait_stream(self, other: Stream) -> None:
        self.device.fake.after(self.name, self.device.fake.record(other.name))


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: Stream | None = None) -> None:
        self.moment = self.device.fake.record((stream or self.device.current).name)

    def query(self) -> bool:
        return self.device.fake.is_done(self.moment)

    def synchronize(self) -> None:
        self.device.fake.wait([self.moment])

    def elapsed_time(self, end: Event) -> float:
        return (end.moment.at_ns - self.moment.at_ns) / MS


class Pool:
    """Rows that are copied to on the stream that is current."""

    device = None

    def __init__(self, device: Device) -> None:
        self.on = device

    def __getitem__(self, slot: int) -> Any:
        def copy_(block: Any, *, non_blocking: bool) -> None:
            assert non_blocking and self.on.current.name == COPY
            self.on.fake.copy(block.entry, slot)

        return SimpleNamespace(copy_=copy_)


class Body:
    def __init__(self, device: Device) -> None:
        self.on = device

    def before(self, step: int, layer: int) -> None:
        self.on.fake.before(step, layer)

    def launch(self, layer: int, tokens: Any, slots: Any) -> None:
        assert self.on.current.name == COMPUTE
        self.on.fake.publish(layer, {expert: slots[expert] for expert in tokens})
        self.on.fake.launch(layer, tokens)

    def combine(self, layer: int) -> None: ...


def through_cuda(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[CudaBackend] = CudaBackend,
    *,
    is_pinned: bool = True,
) -> tuple[Any, Any]:
    """The same workload through the CUDA backend on that clock, and through the fake one."""
    work = drawn(4, n_tokens=50, batch=2)
    machine = machine_of(work, 4, cancels=True, predict_ns=0, **WHOLE)
    guesses, rooms = guesses_of(work, 4, 2, 3, 0.6), [4, 4, 4]
    expected, _ = ran(work, Lru(), rooms, machine, guesses)
    fake = FakeBackend(machine)
    device = Device(fake, monkeypatch)

    def block(entry: Any) -> Any:
        return SimpleNamespace(entry=entry, is_pinned=lambda: is_pinned)

    backend = kind(Pool(device), block, Body(device))  # type: ignore[arg-type]
    backend.now_ns = fake.now_ns  # type: ignore[method-assign]
    # a host that spins sees no virtual clock move
    backend.wait = lambda any_of: fake.wait([done.moment for done in any_of])  # type: ignore
    told = (work, Lru(), rooms, [1, 1, 1], machine, guesses, ATOMIC)
    found = drive(Engine(backend, 12 + machine.staging, *told), work)
    backend.close()
    return found, expected


def test_streams_and_events_say_what_the_fake_device_was_told(monkeypatch):
    found, expected = through_cuda(monkeypatch)
    assert found.timed.outcome_A.tolist() == expected.timed.outcome_A.tolist()
    assert found.timed.time_S.tolist() == expected.timed.time_S.tolist()
    assert found.copied_bytes == expected.copied_bytes and found.record == expected.record
    more = found.timed.counts["link_ns"] - expected.timed.counts["link_ns"]
    assert 0 <= more <= 3 * found.copied_bytes / 700  # of each copy the 3 ns in which it is given


class NeverWaits(CudaBackend):
    def after(self, stream: str, done: Any, reason: str = "") -> None: ...


class OnOneStream(CudaBackend):
    def after(self, stream: str, done: Any, reason: str = "") -> None:
        if stream == COMPUTE:
            super().after(stream, done, reason)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NeverWaits, "race: .* may still be on its way"),
        (OnOneStream, "race: slot .* is overwritten"),
    ],
)
def test_a_wait_that_is_left_out_is_found(monkeypatch, kind, said):
    with pytest.raises(EngineError, match=said):
        through_cuda(monkeypatch, kind)


def test_blocks_that_are_not_pinned_are_refused(monkeypatch):
    with pytest.raises(EngineError, match="is not in pinned memory"):
        through_cuda(monkeypatch, is_pinned=False)


def test_a_stream_that_changes_follows_the_one_before(monkeypatch):
    """Whoever computes on another stream than before waits for what stood there."""
    work = drawn(1, n_tokens=10, batch=1)
    fake = FakeBackend(machine_of(work, 1, **WHOLE))
    device = Device(fake, monkeypatch)
    backend = CudaBackend(Pool(device), lambda entry: SimpleNamespace(entry=entry), Body(device))  # type: ignore
    seen = list[str]()
    other = Stream(device, COMPUTE)
    monkeypatch.setattr(other, "wait_stream", lambda old: seen.append(old.name))
    backend.record(COMPUTE)
    device.current = other
    backend.record(COMPUTE)
    backend.record(COMPUTE)
    assert seen == [COMPUTE]


def test_slot_rows_come_round_only_after_an_event():
    from prefetch.engine.kernel_body import ABSENT, SlotRows

    rows = SlotRows(130, torch.device("cpu"))
    first = rows.of({3: 5})
    assert first[3] == 5 and (first != ABSENT).sum() == 1
    for expert in range(130):  # as many launches as an event may have
        rows.of({expert: expert})
    assert first[3] == 5
    whole = rows.of({expert: expert + 1 for expert in range(130)})
    assert np.array_equal(whole.numpy(), np.arange(1, 131))
    assert rows.of({expert: expert + 1 for expert in range(130)}) is whole
