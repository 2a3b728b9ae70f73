"""Readers of what a store holds, which somebody else may have put there: manifests, kept rows, fitted models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.readers import Files, Reader
from fuzzing.trace_seeds import made
from prefetch import stock
from prefetch.artifacts import Recipe, Store
from prefetch.engine.profiling import whose
from prefetch.sim.tables.sweep import Kept


def store_seeds() -> list[Files]:
    def write(folder: Path) -> None:
        store = Store(folder)
        below = Recipe("model", 1, {"a": 1}, lambda to, _: (to / "m.json").write_text("{}"))
        store.make(Recipe("trace", 1, {"source": "x", "b": [1, 2.5, None]}, lambda to,
        _: (to / "t.bin").write_bytes(b"12345"),
                          upstream={"model": below}))  # fmt: skip
        (folder / "runs").mkdir()
        entry = {"stage": "train", "folder": str(folder), "failed": False, "used": ["trace/abc"]}
        (folder / "runs" / "0.json").write_text(json.dumps(entry))

    return [{name: data for name, data in made(write).items() if not name.endswith(".lock")}]


def read_store(folder: Path, _: Path) -> None:
    store = Store(folder)
    held = stock.entries(store)
    stock.used_names(store, held)
    for kind in ("trace", "model"):
        for sealed in store.sealed(kind):
            store._found(sealed)
            whose.about(sealed)


@cache
def _row() -> dict[str, Any]:
    return {"hit_rate": 0.5, "loads": 3, "way": "chosen", "none": None}


def kept_seeds() -> list[Files]:
    def write(folder: Path) -> None:
        Kept(folder).keep("a" * 24, _row())

    return [made(write)]


def read_kept(folder: Path, _: Path) -> None:
    Kept(folder).find("a" * 24)


def machine_seeds() -> list[Files]:
    copies = "bytes,median_ns,p25_ns,p75_ns\n" + "".join(
        f"{2**n},{n},{n},{n + 1}\n" for n in range(14, 22)
    )
    told = {"device": "cpu", "host": "x", "device_bytes": 5, "load": 0.5}
    return [{"machine.json": json.dumps(told).encode(), "copies.csv": copies.encode()}]


def read_machine(folder: Path, _: Path) -> None:
    whose._tell.cache_clear()
    whose.tell(folder, {"device": "cpu", "host": "y"})
    whose.is_of(folder, {"device": "cpu"})


READERS = [
    Reader("store", store_seeds, read_store),
    Reader("kept rows", kept_seeds, read_kept),
    Reader("machine beside a measurement", machine_seeds, read_machine),
]
