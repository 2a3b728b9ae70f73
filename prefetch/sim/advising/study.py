"""What is run for an advice: every way at the memory that was named, and the best of each kind at other memories.

It says nothing in words. A row is that of `evaluate`, with the kind of way, its memory and the host's beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.models.cards import load_architecture
from prefetch.sim.advising.cases import host_at
from prefetch.sim.advising.pays import Pays, pays
from prefetch.sim.advising.ways import AHEAD, KINDS, Way, ahead, alone, cell_of, host_bytes, rungs
from prefetch.sim.chosen import hardware_of
from prefetch.sim.engines.compiled import engine
from prefetch.sim.hardware import Hardware
from prefetch.sim.memory import Budget, OfMemory, budget_of, bytes_of
from prefetch.sim.settings.placement import ALL, CACHE
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import CANNOT_RUN, CHEATS, Cell, Refused, refused_row
from prefetch.sim.tables.needed import with_link
from prefetch.sim.tables.sweep import Kept, run_all
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader

GIB = 2**30
MORE_GIB = (1, 2, 4)
HOST_RESERVE_BYTES = (
    4 * GIB
)  # assumed: what the system and other programs hold of the host's memory
FIRST_BASELINE = "markov"


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    bench: Bench
    memory: OfMemory
    table: pd.DataFrame  # a row per way and memory, those that were refused among them
    error: tuple[float, float]  # by how much a time may be shorter on this machine, and longer
    pays: Pays | None  # None: nobody copies ahead, or all experts are there
    lacks_host: bool  # the host's memory cannot hold all experts
    swings: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    # on a machine that differs so: the fastest kind of way, and its milliseconds

    @property
    def here(self) -> pd.DataFrame:
        """What can be done at this memory, the fastest first: a way may leave memory unused."""
        rows = self.within(bytes_of(self.memory.amount))
        return rows.drop_duplicates(["way", "policy", "predictor", "horizon"])

    def within(self, n_bytes: int) -> pd.DataFrame:
        ran = self.table[~self.table["mark"].str.startswith(CANNOT_RUN)]
        ran = ran[(ran["mark"] != CHEATS) & (ran.memory_bytes <= n_bytes) & ran.tpot_ms.notna()]
        ran = ran.assign(place=ran.way.map(KINDS.index))  # of equals the simplest is first
        return ran.sort_values(["tpot_ms", "place", "memory_bytes"], kind="stable").drop(
            columns="place"
        )

    @property
    def best(self) -> pd.Series:
        return self.here.iloc[0]

    @property
    def budget(self) -> Budget:
        """Of the best way: what its guesses take stands beside its cache."""
        best = self.best
        cell = cell_of(self.bench, way_of(best), OfMemory(int(best.memory_bytes)))
        assert isinstance(cell, Cell)
        return cell.budget


def study(cfg: Config, store: Store) -> Study:
    hardware: Hardware = hardware_of(cfg, store)
    card = _card(cfg, store)
    all_bytes = card.n_experts * sum(card.expert_bytes_L or ())
    if cfg.memory is not None:  # too little says what is missing, before anything is made
        _least(cfg, card, hardware)
    lacks_host = all_bytes > hardware.host.memory_bytes - HOST_RESERVE_BYTES
    # as experts that stay are there from the first token on, caches begin with the most used
    told: dict[str, Any] = {"evaluate": _grid(cfg), "simulator": {"start": "warm"}}
    if lacks_host and cfg.simulator.host_cache is None:
        room = max(hardware.host.memory_bytes - HOST_RESERVE_BYTES, hardware.host.memory_bytes // 2)
        told["simulator"]["host_cache"] = f"{room}B"
    cfg = cast(Config, OmegaConf.merge(cast(DictConfig, cfg), told))
    whole, kept = Bench(cfg, store), Kept(store.root)
    memory = _memory(whole)
    bench = whole.beginning(cfg.advise.steps).at(memory)
    return _studied(bench, memory, kept, lacks_host=lacks_host)


def _least(cfg: Config, card: ModelCard, hardware: Hardware) -> None:
    told = cfg.simulator
    budget_of(
        card,
        hardware,
        memory=cfg.memory,
        scope=told.scope,
        context=told.context,
        batch=told.batch,
        staging=told.staging,
    )


def _grid(cfg: Config) -> dict[str, list[Any]]:
    """What a bench is to know of: whoever does not exist is refused before anything is made."""
    return {
        "policies": list(cfg.advise.policies),
        "predictors": list(cfg.advise.predictors or [FIRST_BASELINE]),
        "horizons": list(cfg.advise.horizons or cfg.train.horizons),
    }


def _card(cfg: Config, store: Store) -> ModelCard:
    """Sizes, before a bench is made."""
    told = cfg.simulator
    if told.model_card is not None:
        return load_architecture(told.model_card).card(told.precision, told.matrix_precision)
    made = store.make(leaves.locate(cfg.makers["trace"])(cfg))
    return TraceReader(made.folder).card


def _memory(bench: Bench) -> OfMemory:
    """What was named; else what the cache that was named takes with everything beside it."""
    if bench.cfg.memory is not None:
        return OfMemory(bench.cfg.memory)
    return OfMemory(bench.budget(bench.simulator.cache).whole_model_bytes)


def _studied(bench: Bench, memory: OfMemory, kept: Kept, *, lacks_host: bool) -> Study:
    """One kind of way after the other: which guesses are tried depends on what won without, and so on."""
    found = _without_guesses(bench, memory, kept, lacks_host=lacks_host)
    caches = found.here[found.here.way == CACHE]
    has_all = (found.here.way == ALL).any()
    if len(caches) and not has_all:
        names, horizons = predictors_of(bench, bench.horizons), bench.horizons
        guessing = ahead(str(caches.iloc[0].policy), names, horizons)
        rows = _rows(bench, list(guessing), [memory], kept, "ways with guesses")
        found = _with_rows(found, rows)
    best = [way_of(row) for _, row in found.here.drop_duplicates("way").iterrows()]
    found = _at_other_memories(found, best, kept)
    chosen = next((way for way in best if way.kind == AHEAD), None)
    won = None if chosen is None else pays(bench, chosen, memory, kept)
    return dataclasses.replace(found, pays=won, swings=_swings(found, best, kept))


def _without_guesses(bench: Bench, memory: OfMemory, kept: Kept, *, lacks_host: bool) -> Study:
    told, error = bench.cfg.advise, bench.hardware.measured_error
    by_datasheet = told.datasheet_error[0], told.datasheet_error[1]
    rows = _rows(bench, list(alone(told.policies)), [memory], kept, "ways without guesses")
    found = Study(
        bench=bench,
        memory=memory,
        table=pd.DataFrame(rows),
        error=by_datasheet if error is None else (error, error),
        pays=None,
        lacks_host=lacks_host,
    )
    if not len(found.here):
        raise ConfigError(
            f"simulator.phase={bench.simulator.phase}: no step of the replayed requests makes a token, so that no way "
            "has a time per token; leave simulator.phase out, or choose a trace with generated tokens"
        )
    return found


def _at_other_memories(found: Study, best: Sequence[Way], kept: Kept) -> Study:
    """The best of each kind, with less and with more."""
    bench, memory = found.bench, found.memory
    others = {bytes_of(one.amount): one for one in (*rungs(bench), *more_of(memory))}
    others.pop(bytes_of(memory.amount), None)
    most = max([bench.hardware.device.memory_bytes, *others])
    larger = bench.on(_with_memory(bench.hardware, most))
    rows = _rows(larger, _with_all(best), list(others.values()), kept, "other memories")
    found = _with_rows(found, rows)
    table = found.table.drop_duplicates(["way", "policy", "predictor", "horizon", "memory_bytes"])
    return dataclasses.replace(found, table=table.reset_index(drop=True))


def _with_rows(found: Study, rows: Sequence[dict[str, Any]]) -> Study:
    table = pd.DataFrame([*found.table.to_dict("records"), *rows])
    return dataclasses.replace(found, table=table)


def _swings(study: Study, ways: Sequence[Way], kept: Kept) -> dict[str, tuple[str, float]]:
    """Who is the fastest where one of the machine's numbers is another, either way."""
    bench, found = study.bench, dict[str, tuple[str, float]]()
    swing = bench.cfg.advise.swing
    if swing == 0 or len(ways) < 2:
        return found
    for name, change in CHANGES.items():
        for factor in (1 - swing, 1 + swing):
            other = bench.on(change(bench.hardware, factor))
            rows = pd.DataFrame(_rows(other, ways, [study.memory], kept, f"{name} x{factor:.2g}"))
            first = rows.sort_values("tpot_ms", kind="stable").iloc[0]
            found[f"{name} x {factor:.2g}"] = str(first.way), float(first.tpot_ms)
    return found


def _device_at(hardware: Hardware, factor: float) -> Hardware:
    device = hardware.device
    rate, fixed = (
        max(1, round(device.bytes_per_s * factor)),
        round(device.fixed_ns_per_layer / factor),
    )
    changed = dataclasses.replace(device, bytes_per_s=rate, fixed_ns_per_layer=fixed)
    return dataclasses.replace(hardware, device=changed)


CHANGES: dict[str, Callable[[Hardware, float], Hardware]] = {
    "link": with_link,
    "host bandwidth": host_at,
    "GPU": _device_at,
}


def _with_all(ways: Sequence[Way]) -> list[Way]:
    """At a larger memory everything may be there."""
    return [*(way for way in ways if way.kind != ALL), Way(ALL)]


def predictors_of(bench: Bench, horizons: Sequence[int]) -> list[str]:
    """Those that were named; else one that counts, and whose guesses about these requests are in the store."""
    if bench.cfg.advise.predictors is not None:
        return list(bench.cfg.advise.predictors)
    there = [
        name
        for name in config.choices("predictor")
        if name not in (FIRST_BASELINE, "none")
        and all(bench.has_guesses(name, horizon) for horizon in horizons)
        and not bench.cheats(name, horizons[0])
    ]
    return [FIRST_BASELINE, *there]


def more_of(memory: OfMemory) -> list[OfMemory]:
    """The next gibibytes, also of a GPU that is the same but larger."""
    return [OfMemory(bytes_of(memory.amount) + n * GIB) for n in MORE_GIB]


def _with_memory(hardware: Hardware, n_bytes: int) -> Hardware:
    device = dataclasses.replace(hardware.device, memory_bytes=n_bytes)
    return dataclasses.replace(hardware, device=device)


def way_of(row: pd.Series) -> Way:
    return Way(str(row.way), str(row.policy), str(row.predictor), int(row.horizon))


def _rows(
    bench: Bench, ways: Sequence[Way], memories: Sequence[OfMemory], kept: Kept, title: str
) -> list[dict[str, Any]]:
    asked = [(way, memory) for memory in memories for way in ways]
    cells = [cell_of(bench, way, memory) for way, memory in asked]
    able = {i: cell for i, cell in enumerate(cells) if isinstance(cell, Cell)}
    for one in able.values():
        engine(one.policy.rules, "timed")  # made once, before several ask for it at the same time
    workers = bench.cfg.evaluate.workers
    done = run_all([bench.job(cell) for cell in able.values()], kept, workers=workers, title=title)
    found = dict(zip(able, done, strict=True))
    rows = list[dict[str, Any]]()
    for i, ((way, memory), cell) in enumerate(zip(asked, cells, strict=True)):
        row = refused_row(cell.names, cell.reason) if isinstance(cell, Refused) else found[i]
        rows.append(row | _beside(bench, way, memory, cell))
    return rows


def _beside(bench: Bench, way: Way, memory: OfMemory, cell: Cell | Refused) -> dict[str, Any]:
    told: dict[str, Any] = {"memory_bytes": bytes_of(memory.amount), "horizon": way.horizon}
    if isinstance(cell, Refused):
        return told | {"slots": np.nan, "host_bytes": np.nan}
    budget = cell.budget
    return told | {
        "slots": budget.experts,
        "host_bytes": host_bytes(bench, way, budget.cache_bytes),
    }
