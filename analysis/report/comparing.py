"""How runs differ: settings that differ as columns, the rest once; runs that differ only in the seed as one group.

It knows no page and no file. A setting that a run does not have (another version of the project) is no difference.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from analysis.report.runs import FINISHED, Run

GROUPS = ("source", "predictor", "policy", "hardware", "cluster", "experiment")
NO_EFFECT = ("tracker", "store", "makers", "clocks", "artifacts", "report", "hydra", "cluster")
TOLD_ELSEWHERE = "stage."  # every run says its stage
NO_EFFECT_LEAVES = ("figures", "workers")
SEED = "seed"
LEVEL = 0.95  # of every interval
NOT_SET = "not set"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class Compared:
    columns: tuple[str, ...]  # settings that differ, in the order of the configuration
    common: tuple[tuple[str, Any], ...]  # settings that are the same wherever they exist
    without_effect: tuple[str, ...]  # settings that differ and leave every number as it is


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; the interval is Student's, None where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but the seed; places in the list of runs."""

    runs: tuple[int, ...]
    seeds: tuple[int, ...]  # of those that finished
    metrics: Mapping[str, Estimate]


def compare(runs: Sequence[Run]) -> Compared:
    """What differs between these runs."""
    columns, common, without = list[str](), list[tuple[str, Any]](), list[str]()
    for group in GROUPS:
        if any(group in run.choices for run in runs):
            names = [name for run in runs if (name := chosen(run, group)) is not None]
            _sort_in(group, names, columns, common, without)
    for name in _ordered(runs):
        if not (_is_seed_of(name, runs) or name.startswith(TOLD_ELSEWHERE)):
            _sort_in(name, _values(name, runs), columns, common, without)
    if len({seed_of(run) for run in runs}) > 1 and SEED not in columns:
        columns.append(SEED)
    return Compared(tuple(columns), tuple(common), tuple(without))


def setting(run: Run, column: str) -> Any:
    """What a run has in a column; None = nothing, or not known."""
    if column in GROUPS:
        return chosen(run, column)
    if column == SEED:
        return seed_of(run)
    value = run.settings.get(column)
    group = column.partition(".")[0]
    return NOT_SET if value is None and column in run.settings and group not in GROUPS else value


def chosen(run: Run, group: str) -> str | None:
    """None = not known: only what Hydra kept says that nothing was chosen; a tracker's file does not."""
    is_complete = bool(run.choices) and run.overrides is not None
    return run.choices.get(group, NOT_SET if is_complete else None)


def seed_of(run: Run) -> int | None:
    value = run.settings.get(SEED)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def release(run: Run) -> str:
    return run.version.partition(" ")[0]


def traces(run: Run) -> tuple[str, ...]:
    """Keys of what lay at `trace=PATH`: the path may be the same and the trace another one."""
    if not run.settings.get("trace"):
        return ()
    return tuple(sorted(key for key in run.lineage if key.startswith("trace/")))


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """Every run stands in one group; a group of one is a run that nobody repeated."""
    by: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        by[_identity(run, i)].append(i)
    return [_group(tuple(places), runs) for places in by.values()]


def estimate(values: Mapping[Any, float]) -> Estimate:
    """Of one value per seed."""
    found = np.array(list(values.values()), float)
    n, mean = len(found), float(found.mean())
    if n < 2:
        return Estimate(mean, None, None, n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * found.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def has_effect(name: str) -> bool:
    """Can this setting change a number?"""
    top, leaf = name.partition(".")[0], name.rpartition(".")[2]
    return top not in (*NO_EFFECT, "stage") and leaf not in NO_EFFECT_LEAVES


def _sort_in(
    name: str,
    values: Iterable[Any],
    columns: list[str],
    common: list[tuple[str, Any]],
    without: list[str],
) -> None:
    classes = _classes(values)
    if len(classes) > 1:
        (columns if has_effect(name) else without).append(name)
    elif classes and has_effect(name):
        common.append((name, next(iter(classes.values()))))


def _classes(values: Iterable[Any]) -> dict[str, Any]:
    return {repr(value): value for value in values}


def _ordered(runs: Sequence[Run]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(run.settings)
    return list(names)


def _values(name: str, runs: Sequence[Run]) -> list[Any]:
    """What to compare: inside a group only runs that made the same choice; 'differs' if any of those do."""
    group = name.partition(".")[0]
    has = [run for run in runs if name in run.settings]
    if group not in GROUPS:
        return _alike(name, has)
    by: dict[str | None, list[Any]] = defaultdict(list)
    for run, value in zip(has, _alike(name, has), strict=True):
        by[run.choices.get(group)].append(value)
    apart = [values for values in by.values() if len(_classes(values)) > 1]
    if apart:
        return apart[0]
    return next(iter(by.values())) if len(by) == 1 else []


def _alike(name: str, runs: Sequence[Run]) -> list[Any]:
    """A folder keeps ${train.horizons}, a tracker what it stood for: where both occur, what it stood for counts."""
    values = [run.settings[name] for run in runs]
    found = [REFERENCE.fullmatch(value) if isinstance(value, str) else None for value in values]
    if all(found):
        return values
    return [
        run.settings.get(told.group(1), value) if told else value
        for run, value, told in zip(runs, values, found, strict=True)
    ]


def _is_seed_of(name: str, runs: Sequence[Run]) -> bool:
    """The root's seed handed on is the same setting; so is the class behind a choice that has a name."""
    if name == SEED or name.endswith("._target_"):
        return name.partition(".")[0] in GROUPS or name == SEED
    if not name.endswith(f".{SEED}"):
        return False
    values = [(run.settings.get(name), seed_of(run)) for run in runs if name in run.settings]
    return all(value in ("${seed}", seed) for value, seed in values)


def _identity(run: Run, place: int) -> tuple[Any, ...]:
    """Equal for runs that differ only in the seed, or in nothing; a run without settings is alone."""
    if not run.settings or seed_of(run) is None:
        return (place,)
    alike = {
        name: repr(value)
        for name, value in run.settings.items()
        if has_effect(name) and not _is_seed_of(name, (run,))
    }
    choices = {group: run.choices.get(group) for group in GROUPS if has_effect(group)}
    told = tuple(sorted(alike.items())), tuple(sorted(choices.items()))
    return run.stage, release(run), traces(run), *told


def _group(places: tuple[int, ...], runs: Sequence[Run]) -> SeedGroup:
    """Of runs with the same seed the newest counts."""
    done = [runs[i] for i in places if runs[i].state == FINISHED]
    names: dict[str, None] = {}
    for run in done:
        names |= dict.fromkeys(run.metrics)
    metrics = {}
    for name in names:
        metrics[name] = estimate({seed_of(r): r.metrics[name] for r in done if name in r.metrics})
    seeds = sorted({seed for run in done if (seed := seed_of(run)) is not None})
    return SeedGroup(places, tuple(seeds), metrics)
