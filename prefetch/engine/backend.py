"""What the engine asks of a device: two streams, copies, launches, and events between them. It decides nothing.

What stands on a stream runs in its order; between streams only what was said with `after` holds.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from prefetch.errors import PrefetchError
from prefetch.sim.engines.reference import Entry

COPY, COMPUTE = "copy", "compute"
Done = Any  # a moment on a stream, as the backend writes it


class EngineError(PrefetchError):
    """The engine, or the device under it, did what it must not do."""


class Backend(Protocol):
    """Calls return at once, but for the two that wait."""

    @property
    def waited_ns(self) -> Mapping[str, int]:
        """By the compute stream, for each reason that was given."""
        ...

    n_copies: int  # given so far

    @property
    def link_ns(self) -> int:
        """That copies have taken."""
        ...

    def now_ns(self) -> int: ...
    def spend(self, ns: int) -> None:
        """The host is busy for so long."""
        ...

    def before(self, step: int, layer: int) -> None:
        """On the compute stream: everything up to the layer's routing."""
        ...

    def copy(self, entry: Entry, slot: int) -> None:
        """On the copy stream: an expert's block, from the host into a slot."""
        ...

    def publish(self, layer: int, slots: Mapping[int, int]) -> None:
        """On the compute stream: the slot table that the next launch reads, for these experts."""
        ...

    def launch(self, layer: int, tokens: Mapping[int, int]) -> None:
        """On the compute stream: these experts, each for so many tokens of the event."""
        ...

    def combine(self, layer: int) -> None:
        """On the compute stream: what the event's experts gave becomes the layer's output."""
        ...

    def record(self, stream: str) -> Done:
        """What stands on the stream so far."""
        ...

    def after(self, stream: str, done: Done, reason: str = "") -> None:
        """Whatever comes next on the stream begins after that."""
        ...

    def is_done(self, done: Done) -> bool: ...
    def wait(self, any_of: Sequence[Done]) -> None:
        """The host, until one of them is done."""
        ...

    def close(self) -> None: ...


class Body(Protocol):
    """What a backend of a real device computes, on the stream that is current."""

    def before(self, step: int, layer: int) -> None: ...
    def launch(self, layer: int, tokens: Mapping[int, int], slots: Mapping[int, int]) -> None:
        """`slots`: where these experts lie in the pool."""
        ...

    def combine(self, layer: int) -> None: ...


class Launches:
    """The half of a backend that hands launches to a body, with the slots that were published last."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.table: dict[int, Mapping[int, int]] = {}

    def spend(self, ns: int) -> None:
        until = time.monotonic_ns() + ns
        while time.monotonic_ns() < until:
            pass

    def before(self, step: int, layer: int) -> None:
        self.body.before(step, layer)

    def publish(self, layer: int, slots: Mapping[int, int]) -> None:
        self.table[layer] = slots

    def launch(self, layer: int, tokens: Mapping[int, int]) -> None:
        self.body.launch(layer, tokens, self.table[layer])

    def combine(self, layer: int) -> None:
        self.body.combine(layer)


def names(entries: Collection[Entry]) -> str:
    return ", ".join(f"layer {layer} expert {expert}" for layer, expert in sorted(entries))
