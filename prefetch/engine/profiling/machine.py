"""This machine as a hardware file: every number measured here and now, or saying where else it is from.

It simulates nothing and times no grid. What was measured is sealed as an artifact whose key is a hash of the numbers: a
new measurement is a new artifact, and `hardware=measured` takes the one that was made last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prefetch.artifacts import Outside, Recipe, Store
from prefetch.config import Config
from prefetch.engine.profiling import device, whose
from prefetch.engine.profiling.copies import (
    IN_MEMORY,
    PAGEABLE,
    PINNED,
    CopyFit,
    copies_of,
    fits_of,
)
from prefetch.engine.profiling.device import Place, place_of
from prefetch.engine.profiling.disk import Disk, disk_of
from prefetch.engine.profiling.roofs import (
    flops_per_s,
    narrow_flops_per_s,
    read_bytes_per_s,
    roofs_of,
)
from prefetch.engine.profiling.timing import NS_PER_S, Clock
from prefetch.engine.profiling.work import Roofs
from prefetch.kernels.experts import moe
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.routing import route
from prefetch.manifest import read_manifest
from prefetch.sim.hardware import HARDWARE_FILE, KIND, MEASURED, hardware

log = logging.getLogger(__name__)
RECIPE = 1  # raise it when the same numbers are written differently
REPEATS = 15
ROOF_TYPES = ("fp32", "bf16")
LEAST_CHUNK, MOST_CHUNK = 2**18, 2**23  # bytes
REACHED = 0.9  # of the best rate, by one chunk
MOST_RESERVE = 2**30  # bytes
SMALL = 64  # hidden and inner size of experts whose computing takes no time
Fields = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    fields: Fields  # of a hardware file
    machine: Mapping[str, Any]
    copies: pd.DataFrame
    fits: dict[str, CopyFit]
    roofs: Roofs

    @property
    def key_kind(self) -> str:
        """The memory that an engine would copy from."""
        return PINNED if PINNED in self.fits else IN_MEMORY

    @property
    def key_fit(self) -> CopyFit:
        return self.fits[self.key_kind]

    @property
    def noise(self) -> str:
        return whose.noise(whose.spread_of(self.copies), self.machine)

    @property
    def warning(self) -> str:
        """Empty on a machine that was quiet."""
        spread = whose.spread_of(self.copies)
        if spread is None or spread <= whose.NOISY:
            return ""
        return f". **Not quiet** (from {whose.NOISY:.0%} on): run it again when nothing else does"

    def copies_with_fit(self) -> pd.DataFrame:
        pairs = zip(self.copies.kind, self.copies.bytes, strict=True)
        return self.copies.assign(fitted_ns=[round(self.fits[kind].ns(n)) for kind, n in pairs])


def measured_machine(clock: Clock, store_root: Path, dtypes: tuple[str, ...] = ()) -> Measured:
    """Takes seconds. `dtypes` are further number types whose rate a table needs."""
    place = clock.place
    log.info("measuring %s: memory, products, copies, disk", place.name)
    about = {**device.facts(place), "load": whose.load()}
    roofs = roofs_of(clock, tuple(dict.fromkeys([*ROOF_TYPES, *dtypes])))
    copies, disk = copies_of(clock, REPEATS), disk_of(store_root)
    fits = fits_of(copies)
    fields: Fields = {
        "name": place.name,
        "link": _link(copies, fits),
        "device": {
            "memory_bytes": place.total_bytes,
            "bytes_per_s": roofs.read_bytes_per_s,
            "operations_per_s": _operations(clock, roofs),
            "fixed_ns_per_layer": fixed_ns_per_layer(clock),
        },
        "host": _host(place, roofs),
        "storage": {
            "latency_ns": disk.latency_ns,
            "bytes_per_s": disk.bytes_per_s,
            "chunk_bytes": chunk_bytes(disk.latency_ns, disk.bytes_per_s),
        },
        "reserve_bytes": reserve_bytes(place),
        "measured_error": None,
    }
    fields["sources"] = _sources(fields, fits, disk, place)
    hardware(**fields)  # says at once what is wrong
    if place.is_gpu:
        torch.cuda.empty_cache()  # buffers of the measurement are no longer in anybody's way
    return Measured(fields, about, copies, fits, roofs)


def reserve_bytes(place: Place) -> int:
    """What a run cannot have because it runs: a GPU's context. What others hold now is no property of a machine."""
    return min(MOST_RESERVE, place.total_bytes - place.free_bytes) if place.is_gpu else 0


def _link(copies: pd.DataFrame, fits: dict[str, CopyFit]) -> Fields:
    """On a CPU one kind of memory stands for both, and a thread of its own makes the copies."""
    pinned, pageable = (fits.get(kind) or fits[IN_MEMORY] for kind in (PINNED, PAGEABLE))
    calls = copies[copies.kind == PINNED]
    beside = max(0, pageable.latency_ns - pinned.latency_ns)
    return {
        "latency_ns": pinned.latency_ns,
        "chunk_bytes": chunk_bytes(pinned.latency_ns, pinned.bytes_per_s[-1][1]),
        "pinned": _lane(int(calls.host_ns.median()) if len(calls) else 0, pinned),
        "pageable": _lane(beside, pageable),
    }


def _host(place: Place, roofs: Roofs) -> Fields:
    if not place.is_gpu:
        rates = roofs.read_bytes_per_s, roofs.flops_per_s["fp32"]
        total_bytes = place.total_bytes
    else:
        clock = Clock(device.host())
        rates = read_bytes_per_s(clock), flops_per_s(clock, "fp32")
        total_bytes = clock.place.total_bytes
    return {"memory_bytes": total_bytes, "bytes_per_s": rates[0], "operations_per_s": rates[1]}


def chunk_bytes(latency_ns: int, bytes_per_s: int) -> int:
    """The smallest power of two whose copy reaches nine tenths of the rate: shorter ones are mostly latency."""
    wanted = latency_ns * bytes_per_s * REACHED / (1 - REACHED) / NS_PER_S
    chunk = LEAST_CHUNK
    while chunk < min(wanted, MOST_CHUNK):
        chunk *= 2
    return chunk


def fixed_ns_per_layer(clock: Clock) -> int:
    """A layer of one token and experts that cost nothing: launches, and the host that waits for the routing."""
    place = clock.place
    layout = ExpertLayout(SMALL, SMALL, torch.float32)
    pool_SN = layout.random(8, 0, place.device)
    x_TD, logits_TE = (torch.randn(1, n, device=place.device) for n in (SMALL, 8))
    slot_E = torch.arange(8, dtype=torch.int32, device=place.device)

    def layer() -> None:
        ids_TK, weights_TK = route(logits_TE, 2)
        ids_TK.cpu()
        moe(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E)

    return clock.times(layer, REPEATS).median_ns


def _lane(host_ns: int, fit: CopyFit) -> Fields:
    return {"host_ns_per_copy": host_ns, "bytes_per_s": [list(pair) for pair in fit.bytes_per_s]}


def _operations(clock: Clock, roofs: Roofs) -> Fields:
    """What torch has no product for here is said not to be there."""
    found: Fields = {name: roofs.flops_per_s[name] for name in ROOF_TYPES}
    return found | narrow_flops_per_s(clock) | {"fp4": None}


def _sources(fields: Fields, fits: dict[str, CopyFit], disk: Disk, place: Place) -> dict[str, str]:
    """One per number."""
    best = {
        kind: f"measured: copies of 4 KiB and more, {fit.median_error:.1%} off"
        for kind, fit in fits.items()
    }
    if place.is_gpu:
        pinned, pageable = best[PINNED], best[PAGEABLE]
        host_ns = "measured: the host's time in one asynchronous call, median over sizes"
        beside = "measured: what a small pageable copy takes beyond the link's latency"
    else:
        pinned = pageable = f"{best[IN_MEMORY]}; {IN_MEMORY}, for there is no link"
        host_ns = beside = "0 on a CPU: a thread of its own makes the copies"
    cold = (
        "page cache dropped"
        if disk.is_cold
        else "from the system's page cache, which cannot be dropped here"
    )
    threads = torch.get_num_threads()
    product = "measured: square products by torch, the fastest call"
    on_host = f"{product}, {threads} thread{'' if threads == 1 else 's'}"
    product = product if place.is_gpu else on_host
    sources = {
        "link.latency_ns": pinned,
        "link.chunk_bytes": f"chosen: the smallest power of two whose copy reaches {REACHED:.0%} of that rate",
        "link.pinned.host_ns_per_copy": host_ns,
        "link.pinned.bytes_per_s": pinned,
        "link.pageable.host_ns_per_copy": beside,
        "link.pageable.bytes_per_s": pageable,
        "device.memory_bytes": "measured: what the system reports",
        "device.bytes_per_s": "measured: reading a large buffer, the fastest call",
        "device.operations_per_s.fp32": product,
        "device.operations_per_s.bf16": product,
        "device.fixed_ns_per_layer": "measured: a layer of one token and 64 x 64 experts, its routing sent to the host",
        "host.memory_bytes": "measured: what the system reports",
        "host.bytes_per_s": "measured: reading a large buffer, the fastest call",
        "host.operations_per_s": on_host,
        "storage.latency_ns": f"measured: reads of 4 KiB in the store's folder, {cold}",
        "storage.bytes_per_s": f"measured: reading 64 MiB in the store's folder, {cold}",
        "storage.chunk_bytes": f"chosen: the smallest power of two whose read reaches {REACHED:.0%} of that rate",
        "reserve_bytes": "measured: in use before the run began, 1 GiB at most: what is more is other programs'"
        if place.is_gpu
        else "0 on a CPU: what other programs hold changes",
    }  # fmt: skip
    rates = fields["device"]["operations_per_s"]
    narrow = (name for name in ("fp8", "int8") if rates[name] is not None)
    sources |= {f"device.operations_per_s.{name}": product for name in narrow}
    return sources


def seal(store: Store, found: Measured) -> Path:
    """The artifact's folder."""
    return store.make(sealed(found)).folder


def sealed(found: Measured) -> Recipe:
    """Its key is a hash of what was measured, and of nothing that only the clock knows."""
    copies = found.copies.to_dict("records")

    def build(folder: Path, _: Mapping[str, Path]) -> None:
        content = {"kind": MEASURED, **found.fields}
        (folder / HARDWARE_FILE).write_text(json.dumps(content, indent=1) + "\n")
        (folder / "machine.json").write_text(json.dumps(dict(found.machine), indent=1) + "\n")
        found.copies.to_csv(folder / "copies.csv", index=False)

    identity = {"hardware": found.fields, "machine": dict(found.machine), "copies": copies}
    return Recipe(kind=KIND, version=RECIPE, config=identity, build=build)


def latest(store: Store, here: Mapping[str, Any] | None = None) -> Path | None:
    """The folder that was sealed last, of the machine that is like `here` if there is one; None = there is none."""
    folders = store.sealed(KIND)
    own = [folder for folder in folders if here is not None and whose.is_of(folder, here)]
    made = {
        (read_manifest(folder)["made"], (folder / HARDWARE_FILE).stat().st_mtime_ns): folder
        for folder in own or folders
    }
    return made[max(made)] if made else None


def hardware_recipe(cfg: Config) -> Recipe | Outside:
    """What `hardware=measured` stands on: the store's latest of this machine, or one that is made now.

    A store that knows other machines only gives the latest of those, and says whose it is.
    """
    place = place_of(cfg.profile.device)
    found = latest(store := Store(cfg.store), here := device.facts(place))
    if found is not None:
        whose.tell(found, here)
        return Outside(KIND, found)
    log.info("hardware=measured: this store holds no measurement, so this machine is measured now")
    made = measured_machine(Clock(place), store.root)
    log.info("hardware=measured: %s%s", made.noise, made.warning)
    return sealed(made)
