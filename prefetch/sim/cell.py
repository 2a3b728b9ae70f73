"""One cell of a table: a workload, a cache with a policy, a machine, guesses or none; and what it comes to.

Sums per request first, so that intervals are over requests. S steps, A accesses, Q requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.scoring import bootstrap
from prefetch.sim.machine import Guesses, Machine
from prefetch.sim.memory import Budget
from prefetch.sim.policy import Policy
from prefetch.sim.pool import ATOMIC, HIT, LATE, NOTHING_TOLD, Told
from prefetch.sim.run import Timed, timed_replay
from prefetch.sim.start import NOBODY
from prefetch.sim.streaming import streamed_replay
from prefetch.sim.workload import MIXED, Workload

NS_PER_MS = 1e6


@dataclass(frozen=True, eq=False)
class Cell:
    """What is run, and what its row says of itself."""

    names: dict[str, Any]  # way, policy, predictor, capacity, ...
    policy: Policy
    budget: Budget
    machine: Machine
    guesses: Guesses | None = None
    semantics: int = ATOMIC
    told: Told = NOTHING_TOLD  # rows that the policy asks for
    warm: NDArray[np.int64] = field(default_factory=lambda: NOBODY)  # entries at the start
    pinned: NDArray[np.int64] = field(default_factory=lambda: NOBODY)  # ... that stay
    streams: bool = False  # prompts run by whole layers

    def run(self, work: Workload) -> Timed:
        if self.streams:
            return streamed_replay(
                work,
                self.policy,
                self.budget.room_G,
                self.budget.size_L,
                self.machine,
                self.semantics,
                warm=self.warm,
                pinned=self.pinned,
            )
        return timed_replay(
            work,
            self.policy,
            self.budget.room_G,
            self.budget.size_L,
            self.machine,
            self.guesses,
            self.semantics,
            told=self.told,
            warm=self.warm,
            pinned=self.pinned,
        )


def row_of(
    cell: Cell, work: Workload, timed: Timed, bound_ns: float | None, full_ns: float, seed: int
) -> dict[str, Any]:
    """`bound_ns`, `full_ns`: nanoseconds per generated token that nothing can be under; with all experts resident."""
    n_layers, budget, counts = work.card.n_layers, cell.budget, timed.counts
    step_A = np.repeat(np.arange(len(work.start_V) - 1) // n_layers, np.diff(work.start_V))
    is_decode_S, tokens_S = work.is_decode_S, work.decode_S
    outcome_A = timed.outcome_A
    accesses_S = np.bincount(step_A, minlength=work.n_steps)
    hits_S = np.bincount(step_A, outcome_A == HIT, work.n_steps)
    late_S = np.bincount(step_A, outcome_A == LATE, work.n_steps)
    counted_S = is_decode_S if is_decode_S.any() else np.ones(work.n_steps, np.bool_)
    accesses, tokens = int(accesses_S[counted_S].sum()), int(tokens_S.sum())
    per_token = tokens or np.nan  # of prompts alone nothing is told per generated token
    time_ns = timed.time_S[is_decode_S]
    per_token_ns = float(time_ns.sum() / per_token)
    waited = sum(counts[name] for name in counts if name.endswith("stall_ns"))
    hit_low, hit_high = interval(work, hits_S * counted_S, accesses_S * counted_S, seed)
    time_low, time_high = interval(work, timed.time_S * is_decode_S, tokens_S, seed)
    row: dict[str, Any] = {
        **cell.names,
        "hit_rate": hits_S[counted_S].sum() / max(1, accesses),
        "hit_rate_low": hit_low,
        "hit_rate_high": hit_high,
        "late_hit_rate": late_S[counted_S].sum() / max(1, accesses),
        "tpot_ms": per_token_ns / NS_PER_MS,
        "tpot_ms_low": time_low / NS_PER_MS,
        "tpot_ms_high": time_high / NS_PER_MS,
        "tokens_per_s": 1e9 * float(np.mean(tokens_S[is_decode_S])) / float(np.mean(time_ns))
        if tokens
        else np.nan,
        "tpot_bound_ms": np.nan if bound_ns is None else bound_ns / NS_PER_MS,
        "slowdown": per_token_ns / full_ns if full_ns else np.nan,
        "memory_savings": budget.memory_savings,
        "whole_model_bytes": budget.whole_model_bytes,
        "fits": budget.fits,
        "capacity_experts": sum(budget.slots_G),
        "capacity_token_cycles": budget.token_cycles,
        "stall_fraction": waited / max(1, counts["now_ns"]),
        "link_utilisation": counts["link_ns"] / max(1, counts["now_ns"]),
        "disk_utilisation": counts["disk_ns"] / max(1, counts["now_ns"]),
        "bytes_per_token": counts["moved_bytes"] / per_token,
        "disk_bytes_per_token": counts["disk_bytes"] / per_token,
        "wasted_prefetch_bytes_per_token": counts["wasted_bytes"] / per_token,
    }
    tokens_of = tokens_S[is_decode_S]
    token_ns = np.repeat(
        time_ns / np.maximum(tokens_of, 1), tokens_of
    )  # so that its mean is tpot_ms
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        row[f"tpot_ms_{name}"] = (
            float(np.percentile(token_ns, share)) / NS_PER_MS if tokens else np.nan
        )
    prompts_S = work.prefill_S > 0
    n_prompts = len(np.unique(work.request_S[prompts_S]))
    is_shared = bool(
        (work.request_S[prompts_S] == MIXED).any()
    )  # whose prompt a step was, is not known
    whole_ms = timed.time_S[prompts_S].sum() / NS_PER_MS
    row["ttft_ms"] = whole_ms / n_prompts if n_prompts and not is_shared else np.nan
    row.update(
        {
            name: counts[name]
            for name in counts
            if name.endswith(("loads", "used", "unused", "dropped"))
        }
    )
    for name in ("stall_ns", "late_stall_ns", "host_stall_ns", "disk_stall_ns", "compute_ns"):
        row[name.replace("_ns", "_ms_per_token")] = counts[name] / per_token / NS_PER_MS
    return row


def interval(
    work: Workload, values_S: NDArray[Any], of_S: NDArray[Any], seed: int
) -> tuple[float, float]:
    """Of a ratio of sums, over requests; NaN where steps serve several at once, or there is one request."""
    request_Q, place_S = np.unique(work.request_S, return_inverse=True)
    if len(request_Q) < 2 or (request_Q < 0).any():
        return np.nan, np.nan
    of_Q = np.bincount(place_S, of_S)
    values_Q, of_Q = np.bincount(place_S, values_S)[of_Q > 0], of_Q[of_Q > 0]
    return bootstrap(values_Q, of_Q, seed=seed) if len(of_Q) > 1 else (np.nan, np.nan)
