"""Which cells a table has: the grid that was asked for, what stands beside it at every capacity, the curve of sizes.

It runs nothing. A cell that cannot be made has its place too, and says why.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY
from prefetch.sim.engines.streaming import BUFFERS
from prefetch.sim.memory import Budget, OfMemory
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.sim.tables.asked import SEMANTICS
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import CHEATS, REFUSALS, Cell, Refused
from prefetch.trace.predictions import PredictionsReader

log = logging.getLogger(__name__)
# shares of all experts, at which savings are looked for
CURVE = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375)
CHOSEN, ALONE, OPTIMUM, ORACLE = "chosen", "no prefetch", "optimum", "oracle prefetch"
SPLIT = "static split by layer"
TODAY = {  # policy, and what is done about a miss
    SPLIT: ("static", "host"),
    "host compute": ("static", "host"),
    "host compute and uploads": ("lru", "both"),
}


def cells(bench: Bench) -> Iterator[Cell | Refused]:
    first = bench.horizons[0]
    for policy, name, capacity, horizon in itertools.product(
        bench.policies, bench.predictors, bench.capacities, bench.horizons
    ):
        if name != "none" or horizon == first:
            yield of_grid(bench, CHOSEN, policy, name, capacity, horizon)
    for capacity in bench.capacities:
        for policy in bench.policies:
            if "none" not in bench.predictors:
                yield of_grid(bench, ALONE, policy, "none", capacity, first)
        yield of_grid(bench, "lru", "lru", "none", capacity, first)
        yield of_grid(bench, OPTIMUM, "belady", "none", capacity, first)
        if bench.simulator.requests == "test":  # guesses, even true ones, are about these
            yield of_grid(bench, ORACLE, bench.policies[0], "oracle", capacity, first)
        yield from (of_today(bench, way, capacity) for way in TODAY)
        yield from _streaming(bench, capacity)
    yield from _curve(bench)


def alone(bench: Bench, policy: str, capacity: str) -> Cell:
    """The cell of this policy without guesses, at a capacity as a table names it."""
    named = {str(one): one for one in bench.capacities}
    return cell_of(bench, ALONE, policy, "none", named[capacity], bench.horizons[0])


def sized(bench: Bench, policy: str, each: int) -> Cell:
    """The cell of this policy without guesses, with room for so many experts per layer."""
    return cell_of(bench, "curve", policy, "none", each, bench.horizons[0], is_curve=True)


def of_grid(
    bench: Bench, way: str, policy: str, name: str, capacity: Any, horizon: int
) -> Cell | Refused:
    names = names_of(bench, way, policy, capacity, predictor=name, horizon=horizon)
    return tried(names, lambda: cell_of(bench, way, policy, name, capacity, horizon))


def tried(names: dict[str, Any], make: Callable[[], Cell]) -> Cell | Refused:
    try:
        return make()
    except REFUSALS as reason:
        return Refused(names, reason)


def names_of(
    bench: Bench,
    way: str,
    policy: str,
    capacity: Any,
    *,
    predictor: str = "none",
    horizon: int = 0,
    misses: str | None = None,
    is_cheat: bool = False,
) -> dict[str, Any]:
    return {
        "way": way,
        "policy": policy,
        "predictor": predictor,
        "evicts_by": "",
        "mark": CHEATS if is_cheat else "",
        "capacity": str(capacity),
        "horizon": 0 if predictor == "none" else horizon,
        "misses": misses or bench.simulator.misses,
    }


def cell_of(
    bench: Bench,
    way: str,
    policy: str,
    name: str,
    capacity: Any,
    horizon: int,
    *,
    is_curve: bool = False,
) -> Cell:
    """`name` copies ahead, and whoever the policy evicts by guesses as well; both are paid for, time and memory."""
    size_of = bench.share if is_curve else bench.budget
    made, landing = bench.policy(policy), 0 if name == "none" else bench.landing
    size_of(capacity, 0, landing)  # refused before anybody guesses for it
    told_by, guesses, reader = bench.foretells(made, name), None, None
    if told_by != "none":
        guesses, reader = bench.guesses(told_by, horizon)
    names = names_of(bench, way, policy, capacity, predictor=name, horizon=horizon)
    if reader is not None and "guesses" in made.needs:
        names["evicts_by"] = f"{told_by}, {horizon} ahead"
    names["mark"] = CHEATS if _cheats(bench, made, reader) else ""
    budget = size_of(capacity, reader.card.parameter_bytes if reader else 0, landing)
    event_us = reader.card.event_us if reader else None
    machine = bench.machine(bench.simulator.misses, event_us or 0.0)
    pinned = bench.prior.pinned(made, budget if is_curve else None)
    _need_passage(bench, budget, made, pinned)
    return Cell(
        names=names,
        policy=made,
        budget=budget,
        machine=machine._replace(landing=landing),
        guesses=guesses if name != "none" or guesses is None else nobody(guesses),
        semantics=SEMANTICS[bench.simulator.semantics],
        told=bench.prior.told(made, len(budget.room_G), reader, horizon),
        warm=bench.prior.warm(made),
        pinned=pinned,
    )


def _need_passage(bench: Bench, budget: Budget, policy: Policy, pinned: NDArray[np.int64]) -> None:
    """Where no expert leaves a cache, those that miss it go through staging."""
    n_layers, n_experts = bench.card.n_layers, bench.card.n_experts
    if bench.simulator.misses != "wait" or bench.simulator.staging:
        return
    layers = pinned // n_experts * (len(budget.slots_G) > 1)
    pinned_G = np.bincount(layers, minlength=len(budget.slots_G))
    are_full = (pinned_G >= budget.slots_G).any() or "counts" in policy.needs
    if are_full and budget.experts < n_layers * n_experts:
        raise ConfigError(
            "simulator.staging=0: no expert ever leaves a cache here (policy=static, or simulator.pinned fills it), so "
            "that one that is missing has no place; give simulator.staging=1 or more"
        )


def _cheats(bench: Bench, policy: Policy, reader: PredictionsReader | None) -> bool:
    has_seen = reader is not None and reader.card.causality == CHEATS
    return has_seen or "future" in policy.needs or bench.prior.has_seen(policy)


def nobody(guesses: Guesses) -> Guesses:
    """Made and paid for, and no copy follows."""
    shape = len(guesses.ids_VW), 1
    return Guesses(np.full(shape, EMPTY, np.int32), np.zeros(shape, np.int64), guesses.ahead)


def main_of(bench: Bench) -> tuple[str, str, int]:
    """Policy, predictor and horizon of the cell chosen at the root; of a grid without it, its first."""
    root, ahead = bench.root, bench.simulator.horizon
    return (
        root["policy"] if root["policy"] in bench.policies else bench.policies[0],
        root["predictor"] if root["predictor"] in bench.predictors else bench.predictors[0],
        ahead if ahead in bench.horizons else bench.horizons[0],
    )


def _curve(bench: Bench) -> Iterator[Cell]:
    """The main cell at all sizes that it can have, each size once."""
    seen, (policy, name, horizon) = set[tuple[int, ...]](), main_of(bench)
    refused: dict[str, list[str]] = {}
    for share in CURVE:
        try:
            cell = cell_of(bench, "curve", policy, name, share, horizon, is_curve=True)
        except REFUSALS as reason:
            refused.setdefault(str(reason), []).append(str(share))
            continue
        if cell.budget.room_G not in seen:
            seen.add(cell.budget.room_G)
            yield cell
    if seen:  # else the main cell is refused too, which is an error
        for why, shares in refused.items():
            log.info("no cell of %s of all experts: %s", ", ".join(shares), why)


def guessing_bytes(bench: Bench) -> int:
    """What the main cell's guesses take of the GPU: their predictor, and places beside the cache."""
    policy, name, horizon = main_of(bench)
    told_by = bench.foretells(bench.policy(policy), name)
    if told_by == "none":
        return 0
    landing = 0 if name == "none" else bench.landing * max(bench.card.expert_bytes_L or ())
    return landing + bench.guesses(told_by, horizon)[1].card.parameter_bytes


def of_today(bench: Bench, way: str, capacity: Any) -> Cell | Refused:
    """Experts that always stay on the GPU, the others computed on the host; or the host beside a filling cache."""
    by_layer = np.arange(bench.card.n_layers * bench.card.n_experts)
    hottest = bench.popular()  # with requests=all counted on what is replayed, and marked
    policy, misses = TODAY[way]
    is_whole = way == SPLIT
    is_cheat = bench.simulator.requests == "all" and not is_whole
    names = names_of(bench, way, policy, capacity, misses=misses, is_cheat=is_cheat)
    warm = by_layer if is_whole else hottest
    return tried(names, partial(_static, bench, names, capacity, warm, is_whole=is_whole))


def _static(
    bench: Bench, names: dict[str, Any], capacity: Any, warm: NDArray[np.int64], *, is_whole: bool
) -> Cell:
    """Whatever memory the main cell's guesses take, it has as further experts. `is_whole`: the first layers whole."""
    if isinstance(capacity, OfMemory):
        budget = bench.budget(capacity)
    else:
        budget = bench.as_large(capacity, guessing_bytes(bench))
    if is_whole:
        budget = dataclasses.replace(budget, room_G=(sum(budget.room_G),), scope="global")
    machine = bench.machine(names["misses"])
    return Cell(names=names, policy=Lru(), budget=budget, machine=machine, warm=warm)


def _streaming(bench: Bench, capacity: Any) -> Iterator[Cell | Refused]:
    """Prompts by whole layers through two buffers beside an LRU cache, the other steps without guesses."""
    if not (bench.work.prefill_S > 0).any() or bench.simulator.host_cache is not None:
        return
    names = names_of(bench, "layer streaming", "lru", capacity, misses="wait")

    def made() -> Cell:
        return Cell(
            names=names,
            policy=Lru(),
            budget=bench.budget(capacity, 0, BUFFERS * bench.card.n_experts),
            machine=bench.machine("wait"),
            semantics=SEMANTICS[bench.simulator.semantics],
            streams=True,
        )

    yield tried(names, made)
