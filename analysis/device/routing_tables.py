"""What recorded routing says beside a profile: use of experts, gating, hotspots, remedies; by the analyses of routing.

Each table stands or says why it cannot. It computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd

from analysis.device.steps import Steps
from analysis.routing import balance, remedies, statistics
from analysis.routing.batch import accumulate, plan_of
from analysis.routing.router import router_statistics
from analysis.routing.windows import Windows, capacity_curve
from prefetch.errors import PrefetchError
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.blocks import Traceable


@dataclass(frozen=True, eq=False)
class RoutingTables:
    tables: dict[str, pd.DataFrame]
    missing: dict[str, str] = field(default_factory=dict)  # table -> why


def routing_tables(trace: Traceable, steps: Steps) -> RoutingTables:
    """Windows are the profile's steps, so that drops are those of its batches; all else is of the whole trace."""
    plan, of_steps = plan_of(trace), plan_of(steps.rows)
    usage, windows = statistics.Usage(plan), Windows(of_steps, steps.tokens)
    accumulate(trace, plan, [usage])
    accumulate(steps.rows, of_steps, [windows])
    counts_LE, tokens_L, card = usage.counts(), usage.tokens(), plan.card
    parts = usage.counts(part=TRAIN), usage.counts(part=TEST)
    load = balance.load(counts_LE, tokens_L, card.top_k, card)
    makers: dict[str, Callable[[], pd.DataFrame]] = {
        "expert_load": lambda: load,
        "utilisation": lambda: balance.health(counts_LE, tokens_L, card.top_k, card, windows),
        "hotspots": lambda: balance.hotspots(load, windows, card),
        "capacity": lambda: capacity_curve(windows),
        "gating": lambda: router_statistics(trace),
        "remedies": lambda: remedies.remedies(*parts, card, windows),
    }
    found = RoutingTables({})
    for name, make in makers.items():
        try:
            found.tables[name] = make()
        except PrefetchError as error:
            found.missing[name] = str(error)
    return found
