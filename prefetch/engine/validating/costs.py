"""What single things cost on a device, each timed alone: a copy, an expert, what stands before the routing, the host.

Nothing here is fitted on the time of a token. It knows no table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from prefetch.engine.backend import COMPUTE, COPY, Backend
from prefetch.engine.clock import DeviceClock
from prefetch.engine.engine import Engine
from prefetch.engine.replay import drive, n_slots, told_of
from prefetch.sim.cell import Cell
from prefetch.sim.machine import Machine
from prefetch.sim.workload import Workload

ROUNDS = 5  # medians are over so many
AT_ONCE = 8  # copies, and launches, that are timed together


class Silent:
    """A device that has always done everything: what is left is the host's own time."""

    waited_ns: Mapping[str, int] = {}
    link_ns = 0

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def before(self, step: int, layer: int) -> None: ...
    def copy(self, entry: Any, slot: int) -> None: ...
    def publish(self, layer: int, slots: Any) -> None: ...
    def launch(self, layer: int, tokens: Any) -> None: ...
    def combine(self, layer: int) -> None: ...
    def record(self, stream: str) -> int:
        return 0

    def after(self, stream: str, done: Any, reason: str = "") -> None: ...
    def is_done(self, done: Any) -> bool:
        return True

    def wait(self, any_of: Any) -> None: ...
    def close(self) -> None: ...


class Costs:
    """Of one device and model, whatever the cell. Measured once."""

    def __init__(self, clock: DeviceClock, work: Workload) -> None:
        self.work = work
        n_experts = work.card.n_experts
        self.backend: Backend = clock.backend(work)(n_experts)  # a pool of one layer's experts
        with torch.no_grad():
            self.copy_ns, self.issue_ns = self._copies(n_experts)
            self.launch_ns, self.weight_ns, self.token_ns = self._experts()
            rows_S = np.diff(work.row_start_S)
            first = {int(n): int(np.flatnonzero(rows_S == n)[0]) for n in np.unique(rows_S)}
            self.before_ns = {n: self._before(step) for n, step in first.items()}
        self.backend.close()

    def machine(self, cell: Cell) -> Machine:
        """The cell's own, with these costs in it. The host decides before anything of an event can run."""
        machine, n_layers = cell.machine, self.work.card.n_layers
        rows_S, host_ns = np.diff(self.work.row_start_S), host_ns_per_event(cell, self.work)
        whole_L = np.full(n_layers, self.copy_ns, np.int64)
        fixed_ns = host_ns + self.launch_ns
        return machine._replace(
            before_S=np.array([self.before_ns[int(n)] + fixed_ns for n in rows_S], np.int64),
            weight_ns_L=np.full(n_layers, self.weight_ns, np.int64),
            token_ns_L=np.full(n_layers, self.token_ns, np.int64),
            chunk_ns_LX=whole_L[:, None],
            n_chunks_L=np.ones(n_layers, np.int64),
            whole_ns_L=whole_L,
            chunk_bytes=int(machine.bytes_L.max()),
            issue_ns=self.issue_ns,
            predict_ns=0,
        )

    def _copies(self, n_experts: int) -> tuple[int, int]:
        """Nanoseconds of one copy behind another, and of the host to give one."""
        whole, issue = list[float](), list[float]()
        for _ in range(ROUNDS):
            began = time.monotonic_ns()
            for i in range(AT_ONCE):
                self.backend.copy((0, i % n_experts), i % n_experts)
            issue.append((time.monotonic_ns() - began) / AT_ONCE)
            self.backend.wait([self.backend.record(COPY)])
            whole.append((time.monotonic_ns() - began) / AT_ONCE)
        return int(median(whole)), int(median(issue))

    def _experts(self) -> tuple[int, int, int]:
        """What a launch costs whatever it runs, and each expert more: of one token, and per token of many."""
        together = min(AT_ONCE, self.work.card.n_experts)
        most = max(2, int(self.work.tokens_A.max(initial=1)))
        one, several = self._launch(1, 1), self._launch(together, 1)
        weight = max(0.0, several - one) / max(1, together - 1)
        fixed = max(0.0, one - weight)
        each = max(0.0, self._launch(together, most) - fixed) / together
        return int(fixed), int(weight), int(each / most)

    def _launch(self, n_experts: int, n_tokens: int) -> float:
        """Nanoseconds of one launch of so many experts, each for so many tokens of its own."""
        body: Any = self.backend.body  # type: ignore[attr-defined]
        experts = torch.arange(n_experts, dtype=torch.int32)
        x_TD = body.states_TD[:1].expand(n_tokens * n_experts, -1).contiguous()
        ids_TK = experts.repeat(n_tokens)[:, None].to(x_TD.device)
        even_TK = torch.ones_like(ids_TK, dtype=torch.float32)
        slots = {expert: expert for expert in range(n_experts)}

        def launch() -> None:
            body.take(x_TD, ids_TK, even_TK, n_experts)
            self.backend.publish(0, slots)
            self.backend.launch(0, dict.fromkeys(slots, n_tokens))
            self.backend.combine(0)

        return self._timed(launch)

    def _before(self, step: int) -> int:
        return int(self._timed(lambda: self.backend.before(step, 0)))

    def _timed(self, work: Callable[[], None]) -> float:
        """Nanoseconds, the device's end included."""
        took = list[int]()
        for _ in range(ROUNDS + 1):
            began = time.monotonic_ns()
            work()
            self.backend.wait([self.backend.record(COMPUTE)])
            took.append(time.monotonic_ns() - began)
        return median(took[1:])  # the first warms up


def host_ns_per_event(cell: Cell, work: Workload) -> int:
    """Of the decisions: the engine with a device that takes no time."""
    told, start = told_of(cell, work)
    engine = Engine(Silent(), n_slots(cell, work.card.n_experts), *told, **start)
    took_S: Sequence[int] = drive(engine, work).timed.time_S.tolist()
    return int(median(took_S) / work.card.n_layers)
