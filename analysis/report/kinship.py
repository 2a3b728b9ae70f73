"""What keeps runs from being one line though no setting tells them apart: version, trace, settings that one lacks.

It knows no table and no chart. Without this, runs of two versions would be averaged as two seeds of one thing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from analysis.report.comparing import GROUPS, SEED, has_effect, release, traces
from analysis.report.runs import Run

STAGE = "stage.name"  # known of every run, from its folder where nothing else is


def strangers(having: Sequence[tuple[int, Run]], told: Collection[str]) -> dict[int, list[str]]:
    """Words for the names of their lines, of every run by its place; `told` are settings that need none."""
    words: dict[int, list[str]] = {i: [] for i, _ in having}
    if len({release(run) for _, run in having}) > 1:
        for i, run in having:
            words[i].append(f"version {release(run) or 'not known'}")
    if len({traces(run) for _, run in having}) > 1:
        for i, run in having:
            words[i] += [f"trace {key.partition('/')[2][:8]}" for key in traces(run)]
    by: dict[str, list[tuple[int, Run]]] = defaultdict(list)
    for i, run in having:
        by[release(run)].append((i, run))
    for alike in by.values():
        for i, lacking in _lacking(alike, told).items():
            words[i] += lacking
    return words


def _lacking(having: Sequence[tuple[int, Run]], told: Collection[str]) -> dict[int, list[str]]:
    """Settings that others of the same version have; who left no settings at all stands for itself."""
    names = {i: _names(run, told) for i, run in having if set(run.settings) - {STAGE}}
    everyone = set().union(*names.values())
    words = {}
    for i, run in having:
        missing = sorted(everyone - names[i]) if i in names else []
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        words[i] = [f"no {missing[0]}{more}"] if missing else [] if i in names else [run.name]
    return words


def _names(run: Run, told: Collection[str]) -> set[str]:
    return {
        name
        for name in run.settings
        if has_effect(name)
        and name not in told
        and name.partition(".")[0] not in GROUPS
        and name.rpartition(".")[2] != SEED
    }
