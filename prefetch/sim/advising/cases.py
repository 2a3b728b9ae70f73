"""Cases of an experiment: two settings of a machine, as somebody compared them, and how much faster the second is.

It knows what was set, never what was measured after. A machine's host memory may be fitted to the first setting.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.sim.hardware import Hardware
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.grid import CHOSEN, cell_of
from prefetch.sim.tables.names import name_of

log = logging.getLogger(__name__)
FIELDS = ("name", "settings", "before", "after")
STEPS, SPAN = 40, (1e-3, 1e3)  # of the bisection, and of the factor that it looks for


@dataclasses.dataclass(frozen=True)
class Case:
    """`settings` are of both sides, as they would be typed."""

    name: str
    settings: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    before_tokens_per_s: float | None = None  # measured: the host's bandwidth is fitted to it


def cases_of(told: Any) -> list[Case]:
    """What `advise.cases` says: a list of mappings."""
    known = {part.name for part in dataclasses.fields(Case)}
    found = list[Case]()
    if isinstance(told, str) or not isinstance(told, Sequence) or not told:
        raise ConfigError(
            f"advise.cases={told}: expected a list of cases, each with {', '.join(FIELDS)}"
        )
    for i, one in enumerate(told):
        where = f"advise.cases[{i}]"
        if not isinstance(one, Mapping):
            raise ConfigError(
                f"{where}: expected a mapping with {', '.join(FIELDS)}, found {one!r}"
            )
        if missing := [name for name in FIELDS if name not in one]:
            raise ConfigError(
                f"{where}: {missing[0]} is missing; a case has {', '.join(sorted(known))}"
            )
        if unknown := sorted(set(one) - known):
            raise ConfigError(f"{where}: no {unknown[0]}; a case has {', '.join(sorted(known))}")
        lists = {name: _words(one[name], f"{where}.{name}") for name in FIELDS[1:]}
        rate = one.get("before_tokens_per_s")
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ConfigError(
                f"{where}.before_tokens_per_s: expected a number over 0, got {rate!r}"
            )
        found.append(Case(str(one["name"]), **lists, before_tokens_per_s=rate))
    return found


def _words(told: Any, where: str) -> tuple[str, ...]:
    if isinstance(told, str) or not isinstance(told, Sequence):
        raise ConfigError(f"{where}: expected a list of settings as they are typed, got {told!r}")
    return tuple(map(str, told))


def predicted(cfg: Config, store: Store, cases: Iterable[Case]) -> pd.DataFrame:
    """A row per case; what cannot run is an error, since a case that is left out would flatter the others."""
    return pd.DataFrame([_predicted(cfg, store, case) for case in cases])


def _predicted(cfg: Config, store: Store, case: Case) -> dict[str, Any]:
    log.info("case %s", case.name)
    try:
        before, after = (
            _bench(typed(cfg, (*case.settings, *side)), store) for side in (case.before, case.after)
        )
        factor = 1.0
        if case.before_tokens_per_s is not None:
            factor = fitted_factor(before, case.before_tokens_per_s)
            before, after = (one.on(host_at(one.hardware, factor)) for one in (before, after))
        rows = [_row(one) for one in (before, after)]
    except ConfigError as error:
        raise ConfigError(f"case {case.name}: {error}") from None
    first, second = rows
    speed = before.hardware.host.bytes_per_s
    return {
        "case": case.name,
        "before_tokens_per_s": first["tokens_per_s"],
        "after_tokens_per_s": second["tokens_per_s"],
        "change_of_tokens_per_s": second["tokens_per_s"] / first["tokens_per_s"] - 1,
        "change_of_tpot": second["tpot_ms"] / first["tpot_ms"] - 1,
        "hit_rate_before": first["hit_rate"],
        "hit_rate_after": second["hit_rate"],
        "link_utilisation_after": second["link_utilisation"],
        "host_gb_s": speed / 1e9,
        "host_was_fitted": case.before_tokens_per_s is not None,
        "steps": before.work.n_steps,
    }


def typed(cfg: Config, words: Iterable[str]) -> Config:
    """As if these had been typed: choices of groups first, then what changes them."""
    words = list(words)
    groups = {path.name for path in config.CONFIGS.iterdir() if path.is_dir()}
    for word in words:
        name, _, value = word.partition("=")
        if name in groups:
            cfg = leaves.with_choice(cfg, name, value)
    others = [word for word in words if word.partition("=")[0] not in groups]
    told = OmegaConf.from_dotlist(others)
    cfg = cast(Config, OmegaConf.merge(cast(DictConfig, cfg), told))
    config.check_values(cfg)
    return cfg


def _bench(cfg: Config, store: Store) -> Bench:
    return Bench(cfg, store).beginning(cfg.advise.steps)


def _row(bench: Bench) -> dict[str, Any]:
    """Of the cell that is chosen at the root."""
    policy, predictor = name_of(bench.cfg, "policy"), name_of(bench.cfg, "predictor")
    capacity, horizon = bench.capacities[0], bench.horizons[0]
    return bench.row(cell_of(bench, CHOSEN, policy, predictor, capacity, horizon))


def fitted_factor(bench: Bench, tokens_per_s: float) -> float:
    """Of the host's bandwidth, with which the first setting is as fast as it was measured."""

    def is_fast_enough(factor: float) -> bool:
        row = _row(bench.on(host_at(bench.hardware, factor)))
        return bool(row["tokens_per_s"] >= tokens_per_s)

    low, high = SPAN
    if not is_fast_enough(high) or is_fast_enough(low):
        raise ConfigError(
            f"no bandwidth of the host from {low:g} to {high:g} times that of {bench.hardware.name} gives "
            f"{tokens_per_s:g} tokens/s before the change"
        )
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_fast_enough(middle) else (middle, high)
    return high


def host_at(hardware: Hardware, factor: float) -> Hardware:
    host = hardware.host
    rate = max(1, round(host.bytes_per_s * factor))
    return dataclasses.replace(hardware, host=dataclasses.replace(host, bytes_per_s=rate))
