"""What a device has measured of an unfinished table, kept cell by cell: an interrupted table goes on where it was.

It knows no device. A table that is finished is measured anew when it is asked for again: whoever asks twice wants to
know whether it comes to the same.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.run import Timed
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.sweep import Job, Kept, Row
from prefetch.sim.workload import Workload

if TYPE_CHECKING:
    from prefetch.sim.clock import Clock

log = logging.getLogger(__name__)


class Resumed:
    """A clock that measures only what was not measured before the interruption, on the same device by the same code."""

    def __init__(self, clock: Clock, root: Path) -> None:
        self.clock, self.kept = clock, Kept(root)
        self.keys = dict[str, str]()  # and when each was measured
        self._said = False

    @property
    def machine(self) -> str:
        return self.clock.machine

    @property
    def identity(self) -> tuple[str, ...]:
        return self.clock.identity

    def timed(self, cell: Cell, work: Workload) -> Timed:
        depends = ("device", *self.identity, dataclasses.replace(cell, names={}), work)
        key = self.kept.key(Job(dict, depends))
        if (row := self.kept.find(key)) is not None:
            self._say(row["when"])
            self.keys[key] = row["when"]
            return timed_of(row)
        timed = self.clock.timed(cell, work)
        self.keys[key] = datetime.now(UTC).isoformat(timespec="seconds")
        self.kept.keep(key, {"when": self.keys[key], **row_of(timed)})
        return timed

    def finished(self) -> None:
        """The table stands: nothing of it is found again."""
        for key in self.keys:
            (self.kept.folder / f"{key}.json").unlink(missing_ok=True)

    def _say(self, when: str) -> None:
        if not self._said:
            log.warning(
                "this table was interrupted: cells that were measured before (from %s on) are taken as they are; what "
                "the machine does beside may have changed",
                when,
            )
        self._said = True


def row_of(timed: Timed) -> Row:
    rounds_RS = timed.rounds_RS
    return {
        "time_S": _packed(timed.time_S),
        "outcome_A": _packed(timed.outcome_A),
        "rounds_RS": None if rounds_RS is None else [_packed(time_S) for time_S in rounds_RS],
        "counts": timed.counts,
        "resident": timed.resident,
    }


def timed_of(row: Row) -> Timed:
    rounds = row["rounds_RS"]
    return Timed(
        _unpacked(row["time_S"], np.int64),
        _unpacked(row["outcome_A"], np.uint8),
        row["counts"],
        row["resident"],
        None if rounds is None else np.stack([_unpacked(each, np.int64) for each in rounds]),
    )


def _packed(array_N: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array_N).tobytes())).decode()


def _unpacked(text: str, dtype: type[np.generic]) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).copy()
