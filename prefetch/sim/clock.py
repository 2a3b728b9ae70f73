"""Which clock times a cell: the simulated one, or a device's, which is handed in by name. It knows no device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from prefetch import leaves
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.sim.engines.run import Timed
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.resumed import Resumed
from prefetch.sim.workload import Workload

if TYPE_CHECKING:
    from prefetch.sim.tables.bench import Bench

SIMULATED = "simulated"


class Clock(Protocol):
    """A device that runs cells, one at a time."""

    @property
    def machine(self) -> str: ...
    @property
    def identity(self) -> tuple[str, ...]:
        """Everything of the device and of its code that a measured time depends on."""
        ...

    def timed(self, cell: Cell, work: Workload) -> Timed: ...


def check_clock(cfg: Config) -> None:
    if cfg.simulator.rounds < 1:
        raise ConfigError(f"simulator.rounds={cfg.simulator.rounds}: must be at least 1")
    clocks = [SIMULATED, *cfg.clocks]
    if cfg.simulator.clock not in clocks:
        raise ConfigError(
            f"simulator.clock={cfg.simulator.clock}: expected one of {', '.join(clocks)}"
        )


def need_simulated(cfg: Config, stage: str) -> None:
    if cfg.simulator.clock != SIMULATED:
        raise ConfigError(
            f"simulator.clock={cfg.simulator.clock}: stage={stage} simulates what it compares; "
            "leave it out, or use stage=evaluate"
        )


def clock_of(bench: Bench) -> Resumed | None:
    """None: the simulated one."""
    if bench.simulator.clock == SIMULATED:
        return None
    made: Any = leaves.locate(bench.cfg.clocks[bench.simulator.clock])
    clock: Clock = made(
        bench.card,
        bench.trace.ids_TLK,
        device=bench.simulator.device,
        lookup_bytes=bench.beside.lookup_bytes,
        seed=bench.cfg.seed,
        rounds=bench.simulator.rounds,
    )
    return Resumed(clock, bench.store.root)
