"""For a notebook with arrays of its own: what a cache of experts would hit, in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from prefetch import config, leaves
from prefetch.errors import ConfigError
from prefetch.sim.engines.pool import HIT, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.memory import SCOPES
from prefetch.sim.policy import Policy
from prefetch.sim.tables.asked import SEMANTICS
from prefetch.sim.told import told_of
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import DECODE, trace_of


@dataclass(frozen=True, eq=False)
class Simulated:
    """What was needed and what was there. An access is a distinct expert that a step needs at a layer."""

    work: Workload
    is_hit_A: NDArray[np.bool_]

    @property
    def accesses(self) -> int:
        return len(self.is_hit_A)

    @property
    def loads(self) -> int:
        return int((~self.is_hit_A).sum())

    @property
    def hit_rate(self) -> float:
        return float(self.is_hit_A.mean()) if self.accesses else float("nan")


def simulate(
    ids_TLK: NDArray[Any],
    cache: float,
    policy: str | Policy = "lru",
    *,
    n_experts: int,
    request_T: NDArray[Any] | int = 0,
    batch: int = 1,
    scope: str = "per_layer",
    semantics: str = "atomic",
) -> Simulated:
    """Every row is a generated token. `cache`: a share of all experts (0.25) or experts per layer (16).

    ids_TLK: K different experts per token and layer, -1 = none. `policy`: a name of configs/policy, or any object that
    has rules. `semantics`: atomic, overshoot, or sequential (as if a token needed one expert after the other).
    """
    known = {**SEMANTICS, "sequential": SEQUENTIAL}
    if semantics not in known or scope not in SCOPES:
        raise ConfigError(
            f"semantics={semantics!r}, scope={scope!r}: expected one of {', '.join(known)}, and of {', '.join(SCOPES)}"
        )
    ids_TLK = np.asarray(ids_TLK)
    n_layers, top_k = ids_TLK.shape[1:] if ids_TLK.ndim == 3 else (1, 1)
    card = plain_card(
        "arrays", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers))
    )
    trace = trace_of(card, ids_TLK, request_T=request_T, phase_T=DECODE)
    work = workload_of(trace, batch=batch)
    slots = int(cache * n_experts) if isinstance(cache, float) else cache
    if isinstance(cache, bool | str) or not 0 <= slots <= n_experts:
        raise ConfigError(
            f"cache={cache!r}: expected a share from 0.0 to 1.0, or up to {n_experts} experts"
        )
    rooms = [slots] * n_layers if scope == "per_layer" else [slots * n_layers]
    chosen = _named(policy) if isinstance(policy, str) else policy
    told = told_of(chosen, trace, work, len(rooms))
    outcome_A = replay(work, chosen, rooms, [1] * n_layers, known[semantics], told=told)
    return Simulated(work, outcome_A == HIT)


def _named(name: str) -> Policy:
    if name not in config.choices("policy"):
        raise ConfigError(
            f"policy={name!r}: does not exist; there are {', '.join(config.choices('policy'))}"
        )
    leaf = OmegaConf.create(
        {"seed": 0, "policy": OmegaConf.load(config.CONFIGS / "policy" / f"{name}.yaml")}
    )
    return cast(Policy, leaves.instantiate(leaf.policy, "policy"))
