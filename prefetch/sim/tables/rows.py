"""What a cell comes to: the numbers of its row, from what was run.

It runs nothing and knows no table. S steps, A accesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.sim.engines.machine import WAIT
from prefetch.sim.engines.overshoot import held_beyond
from prefetch.sim.engines.pool import HIT, LATE, OVERSHOOT
from prefetch.sim.engines.run import Timed
from prefetch.sim.limits.bounds import Bound
from prefetch.sim.tables.cell import NS_PER_MS, Cell
from prefetch.sim.tables.intervals import Units, interval
from prefetch.sim.workload import MIXED, Workload, counts_of


@dataclass(frozen=True, eq=False)
class Beside:
    """What the rows of a table share, and the bound of this one."""

    full_ns: float  # per generated token, with all experts resident
    units: Units  # that intervals are over
    seed: int
    bound: Bound


def row_of(cell: Cell, work: Workload, timed: Timed, beside: Beside) -> dict[str, Any]:
    return {
        **cell.names,
        **_hits(work, timed, beside),
        **_times(work, timed, beside),
        **_memory(cell, work, timed),
        **_traffic(work, timed),
        **_tails(work, timed),
        **_counts(work, timed),
        **_rounds(work, timed),
    }


def _hits(work: Workload, timed: Timed, beside: Beside) -> dict[str, Any]:
    is_counted_S, first_S = counted_S(work), work.start_V[:: work.card.n_layers]
    accesses_S = np.diff(first_S) * is_counted_S
    hits_S, late_S = (
        counts_of(timed.outcome_A, outcome, first_S) * is_counted_S for outcome in (HIT, LATE)
    )
    accesses = max(1, int(accesses_S.sum()))
    low, high = interval(beside.units, hits_S, accesses_S, beside.seed)
    return {
        "hit_rate": hits_S.sum() / accesses,
        "hit_rate_low": low,
        "hit_rate_high": high,
        "hit_rate_bound": beside.bound.hit_rate,
        "late_hit_rate": late_S.sum() / accesses,
    }


def _times(work: Workload, timed: Timed, beside: Beside) -> dict[str, Any]:
    is_decode_S, tokens_S, full_ns = work.is_decode_S, work.decode_S, beside.full_ns
    tokens, time_ns = int(tokens_S.sum()), timed.time_S[is_decode_S]
    per_token_ns = float(time_ns.sum() / (tokens or np.nan))
    low, high = interval(beside.units, timed.time_S * is_decode_S, tokens_S, beside.seed)
    per_s = float(np.mean(tokens_S[is_decode_S])) / float(np.mean(time_ns)) if tokens else np.nan
    return {
        "tpot_ms": per_token_ns / NS_PER_MS,
        "tpot_ms_low": low / NS_PER_MS,
        "tpot_ms_high": high / NS_PER_MS,
        "interval_over": beside.units.name,
        "tokens_per_s": 1e9 * per_s,
        "tpot_bound_ms": beside.bound.tpot_ns / NS_PER_MS,
        "bound": beside.bound.name,
        "slowdown": per_token_ns / full_ns if full_ns else np.nan,
    }


def _rounds(work: Workload, timed: Timed) -> dict[str, Any]:
    """Of a device: how far its runs of the cell were apart."""
    if timed.rounds_RS is None:
        return {}
    tokens = int(work.decode_S.sum()) or np.nan
    ms_R = timed.rounds_RS[:, work.is_decode_S].sum(axis=1) / tokens / NS_PER_MS
    return {
        "tpot_ms_least_run": float(ms_R.min()),
        "tpot_ms_most_run": float(ms_R.max()),
        "runs": len(ms_R),
    }


def _memory(cell: Cell, work: Workload, timed: Timed) -> dict[str, Any]:
    budget, n_experts = cell.budget, work.card.n_experts
    over_bytes = overshoot_bytes(cell, work, timed)
    layers = np.array(cell.started(n_experts), np.int64) // n_experts
    return {
        "memory_savings": budget.savings(over_bytes),
        "whole_model_bytes": budget.whole_model_bytes + over_bytes,
        "overshoot_bytes": over_bytes,
        "fits": budget.fits(over_bytes),
        "capacity_experts": budget.experts,
        "capacity_token_cycles": budget.token_cycles,
        "start_bytes": int(cell.machine.bytes_L[layers].sum()),
        "start_ms": int(cell.machine.whole_ns_L[layers].sum()) / NS_PER_MS,
    }


def overshoot_bytes(cell: Cell, work: Workload, timed: Timed) -> int:
    """The most that is held beyond caches and staging at once; only where room is made after use."""
    machine, budget, n_experts = cell.machine, cell.budget, work.card.n_experts
    if cell.semantics != OVERSHOOT or machine.miss_way != WAIT:
        return 0
    begun_G = np.array(budget.room_G, np.int64)  # guesses may have filled all
    if cell.guesses is None:
        begun_G[:] = 0
        for entry in cell.started(n_experts):
            layer = entry // n_experts
            begun_G[layer if len(begun_G) > 1 else 0] += budget.size_L[layer]
    is_run_S = work.prefill_S == 0 if cell.streams else np.ones(work.n_steps, np.bool_)
    beyond = held_beyond(work, timed.outcome_A, budget.room_G, budget.size_L, begun_G, is_run_S)
    largest = int(machine.bytes_L.max())
    unit = largest if set(budget.size_L) == {1} else 1
    return max(0, beyond * unit - machine.staging * largest)


def _traffic(work: Workload, timed: Timed) -> dict[str, Any]:
    """Of the whole run, prompts included."""
    counts, per_token = timed.counts, int(work.decode_S.sum()) or np.nan
    waited = sum(counts[name] for name in counts if name.endswith("stall_ns"))
    took = max(1, counts["now_ns"])
    return {
        "stall_fraction": waited / took,
        "link_utilisation": counts["link_ns"] / took,
        "disk_utilisation": counts["disk_ns"] / took,
        "bytes_per_token": counts["moved_bytes"] / per_token,
        "disk_bytes_per_token": counts["disk_bytes"] / per_token,
        "wasted_prefetch_bytes_per_token": counts["wasted_bytes"] / per_token,
    }


def _tails(work: Workload, timed: Timed) -> dict[str, Any]:
    """Percentiles over generated tokens, so that their mean is tpot_ms; the mean time to the first token."""
    tokens_N = work.decode_S[work.is_decode_S]
    token_ns = np.repeat(timed.time_S[work.is_decode_S] / np.maximum(tokens_N, 1), tokens_N)
    row = {
        f"tpot_ms_p{share}": float(np.percentile(token_ns, share)) / NS_PER_MS
        if len(token_ns)
        else np.nan
        for share in (50, 95, 99)
    }
    prompts_S = work.prefill_S > 0
    n_prompts = len(np.unique(work.request_S[prompts_S]))
    # whose prompt a step of several was, is not known
    is_shared = bool((work.request_S[prompts_S] == MIXED).any())
    whole_ms = timed.time_S[prompts_S].sum() / NS_PER_MS
    row["ttft_ms"] = whole_ms / n_prompts if n_prompts and not is_shared else np.nan
    return row


def _counts(work: Workload, timed: Timed) -> dict[str, Any]:
    counts, per_token = timed.counts, int(work.decode_S.sum()) or np.nan
    ends = ("loads", "used", "unused", "dropped")
    row: dict[str, Any] = {name: counts[name] for name in counts if name.endswith(ends)}
    for name in ("stall_ns", "late_stall_ns", "host_stall_ns", "disk_stall_ns", "compute_ns"):
        row[name.replace("_ns", "_ms_per_token")] = counts[name] / per_token / NS_PER_MS
    return row


def counted_S(work: Workload) -> NDArray[np.bool_]:
    """Steps whose accesses count: those that generate; all, where none does."""
    return work.is_decode_S if work.is_decode_S.any() else np.ones(work.n_steps, np.bool_)
