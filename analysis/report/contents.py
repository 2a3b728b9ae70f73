"""What a report is about: its runs, how they compare, its charts, and which columns say something.

It writes no file and no markup.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import NoneType
from typing import Any

from analysis.report import labels
from analysis.report.charts import charts
from analysis.report.comparing import (
    GROUPS,
    SEED,
    Compared,
    SeedGroup,
    compare,
    seed_groups,
    setting,
)
from analysis.report.found import Found
from analysis.report.runs import STATES, Run
from analysis.report.series import Chart

FIRST = (  # metrics that are shown to begin with, whatever stage they come from
    "hit_rate", "tpot_ms", "slowdown", "memory_savings", "break_even_recall", "tokens_per_s", "recall_at_k",
    "recall_at_k_h4", "miss_recall_h4", "gain_over_markov_h4", "markov_recall_at_k", "moe_share", "tokens",
)  # fmt: skip
FEW = 3  # metrics that are shown of a stage that has none of these


@dataclass(frozen=True)
class Column:
    name: str
    kind: str  # setting | metric
    note: str = ""  # simulated, measured
    shown: bool = True  # to begin with


@dataclass
class Contents:
    found: Found
    title: str = "Runs compared"
    columns: list[Column] = field(default_factory=list)
    left_out: int = 0  # runs that found no room

    def newest(self, n: int) -> Contents:
        """The same of the last runs only."""
        before = len(self.runs) - n
        made = contents(replace(self.found, runs=self.runs[before:]), self.title)
        made.left_out = self.left_out + before
        return made

    @cached_property
    def runs(self) -> list[Run]:
        return self.found.runs

    @cached_property
    def compared(self) -> Compared:
        return compare(self.runs)

    @cached_property
    def groups(self) -> list[SeedGroup]:
        return seed_groups(self.runs)

    @cached_property
    def charts(self) -> list[Chart]:
        return charts(self.runs)

    @cached_property
    def ids(self) -> list[str]:
        """Addresses that can be read, each once."""
        taken: Counter[str] = Counter()
        found = []
        for run in self.runs:
            name = re.sub(r"[^a-z0-9]+", "-", f"{run.stage}-{run.name}".lower()).strip("-")[:80]
            taken[name] += 1
            found.append(name if taken[name] == 1 else f"{name}--{taken[name]}")
        return found

    @cached_property
    def marks(self) -> list[str]:
        return [labels.mark(run) for run in self.runs]

    def summary(self) -> str:
        """One sentence or two."""
        states = Counter(run.state for run in self.runs)
        told = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        stages = ", ".join(sorted({run.stage for run in self.runs}))
        text = f"{plural(len(self.runs), 'run')} of {stages}: {told}." if self.runs else "No runs."
        if self.found.unreadable:
            text += f" {plural(len(self.found.unreadable), 'place')} could not be read."
        if self.left_out:
            text += f" {plural(self.left_out, 'older run')} found no room here; runs.csv has them."
        return text

    def notes(self) -> list[str]:
        """What else happened on the way."""
        found = self.found
        commits = sum(
            len({self.runs[at].version for at in group.runs}) > 1 for group in self.groups
        )
        told = {
            f"{plural(commits, 'mean')} over seeds are of runs of several commits": commits,
            f"{plural(self.left_out, 'run')} (the oldest) are not on the page, which was full; runs.csv and report.md "
            "have them": self.left_out,
            f"{plural(found.twice, 'run')} found more than once, shown once": found.twice,
            f"{plural(found.gone, 'entry')} of the store's index led to folders that are gone": found.gone,
        }
        return [text for text, holds in told.items() if holds]


def contents(found: Found, title: str | None = None) -> Contents:
    made = Contents(found, title or "Runs compared")
    made.columns += [*_settings(made), *_metrics(made.runs)]
    return made


def plural(n: int, word: str) -> str:
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
    return f"{n:,} {word if n == 1 else many}"


def _settings(of: Contents) -> Iterable[Column]:
    """Shown to begin with: choices, and what somebody typed; what differs as a consequence can be asked for."""
    for name in of.compared.columns:
        yield Column(name, "setting", shown=_is_asked(name, of.runs))


def _is_asked(name: str, runs: Sequence[Run]) -> bool:
    """Did anybody type it? Where that is not known, it may have been."""
    if name in GROUPS or name == SEED:
        return True
    typed = {name, *_above(name)}
    for told in (run.overrides for run in runs if name in run.settings):
        if told is None or any(word.lstrip("+~").partition("=")[0] in typed for word in told):
            return True
    return False


def _above(name: str) -> Iterable[str]:
    """a.b of a.b.c; a alone is a choice, and told by its own column."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(2, len(parts)))


def _metrics(runs: Sequence[Run]) -> Iterable[Column]:
    having: dict[str, list[Run]] = {}
    for run in runs:
        for name in run.metrics:
            having.setdefault(name, []).append(run)
    shown = _shown(runs)
    for name in [*(n for n in FIRST if n in having), *(n for n in having if n not in FIRST)]:
        clocks = {labels.clock_of(run, name) for run in having[name]} - {None}
        yield Column(name, "metric", " or ".join(sorted(map(str, clocks))), name in shown)


def _shown(runs: Sequence[Run]) -> set[str]:
    """The first few of every stage that has none of those which everybody asks for."""
    shown = set(FIRST)
    for stage in {run.stage for run in runs}:
        names = list(
            dict.fromkeys(name for run in runs if run.stage == stage for name in run.metrics)
        )
        if not shown & set(names):
            shown |= set(names[:FEW])
    return shown


def shown_setting(run: Run, name: str) -> Any:
    value = setting(run, name)
    is_odd = isinstance(value, float) and not math.isfinite(value)  # JSON has no such number
    return value if isinstance(value, (int, float, str, NoneType)) and not is_odd else str(value)
