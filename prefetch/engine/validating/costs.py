"""What single things cost on a device, each timed alone: a copy, an expert, what stands before the routing, the host.

Nothing here is fitted on the time of a token. It knows no table.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from prefetch.engine.backend import COMPUTE, COPY, Backend
from prefetch.engine.clock import DeviceClock
from prefetch.engine.engine import Engine
from prefetch.engine.replay import drive, n_slots, told_of
from prefetch.engine.validating.launches import extra_ns_S
from prefetch.sim.engines.machine import Machine
from prefetch.sim.tables.cell import Cell
from prefetch.sim.workload import Workload

ROUNDS = 5  # medians are over so many
AT_ONCE = 8  # copies, and launches, that are timed together
SETS = 3  # of a layer's experts, in turn: no cache of a device holds them all
EVENTS = 10  # of the workload that launches are timed on


class Silent:
    """A device that has always done everything: what is left is the host's own time."""

    waited_ns: Mapping[str, int] = {}
    link_ns = n_copies = 0

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def spend(self, ns: int) -> None: ...
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
        self.backend: Backend = clock.backend(work)(SETS * n_experts)
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

    def with_launches(self, cell: Cell) -> Machine:
        """The cell's machine, and before every step's layers what its launches of single experts come to.

        Which they are is the simulator's own word, from a run without them.
        """
        machine, n_layers = cell.machine, self.work.card.n_layers
        outcome_A = cell.run(self.work).outcome_A
        more_S = extra_ns_S(outcome_A, self.work, machine, self.launch_ns) // n_layers
        return machine._replace(before_S=machine.before_S + more_S)

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
        """What an event's launch costs whatever it runs, each expert more, and each token of one (least squares).

        Events of the workload itself, so that the kernels are those that run; all their experts in one launch.
        """
        took, terms, most = list[float](), list[tuple[float, float, float]](), 1
        for step, layer in self._some_events():
            event = step * self.work.card.n_layers + layer
            accesses = slice(self.work.start_V[event], self.work.start_V[event + 1])
            ids, tokens = self.work.ids_A[accesses].tolist(), self.work.tokens_A[accesses].tolist()
            if ids:
                took.append(self._launch(step, layer, dict(zip(ids, tokens, strict=True))))
                terms.append((1.0, len(ids), sum(tokens) - len(ids)))
                most = max(most, *tokens)
        fixed, weight, more = nnls(np.array(terms), np.array(took))[0]
        return int(fixed), int(weight), int((weight + more * (most - 1)) / most)

    def _some_events(self) -> list[tuple[int, int]]:
        """Spread over the workload, and those with the fewest and the most experts."""
        n_layers, size_V = self.work.card.n_layers, np.diff(self.work.start_V)
        spread = np.linspace(0, len(size_V) - 1, EVENTS).astype(int)
        chosen = {*spread.tolist(), int(size_V.argmin()), int(size_V.argmax())}
        return [divmod(event, n_layers) for event in sorted(chosen)]

    def _launch(self, step: int, layer: int, tokens: dict[int, int]) -> float:
        """Nanoseconds of one launch behind another: rows and their sum, from slots that change."""
        body: Any = self.backend.body  # type: ignore[attr-defined]
        n_experts, n_sets = self.work.card.n_experts, SETS
        fuses, body.fuses = body.fuses, False
        body.before(step, layer)
        turn = itertools.count()

        def launch() -> None:
            for _ in range(AT_ONCE):
                first = next(turn) % n_sets * n_experts
                self.backend.publish(0, {expert: first + expert for expert in tokens})
                self.backend.launch(0, tokens)
                self.backend.combine(0)

        took = self._timed(launch) / AT_ONCE
        body.fuses = fuses
        return took

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
