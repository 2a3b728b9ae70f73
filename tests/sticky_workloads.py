"""Workloads of generated tokens only, one per step, in which experts come back as they do in real models."""

from __future__ import annotations

import numpy as np

from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of


def sticky(
    seed: int, n_tokens: int, n_layers: int, n_experts: int = 64, top_k: int = 6
) -> Workload:
    """Some experts are liked more than others, and who was liked by a token is often liked by the next."""
    rng = np.random.default_rng(seed)
    liking_LE = rng.gumbel(size=(n_layers, n_experts)) * 0.7
    mood_LE, ids = rng.normal(size=(n_layers, n_experts)), []
    for _ in range(n_tokens):
        mood_LE = 0.85 * mood_LE + 0.5 * rng.normal(size=(n_layers, n_experts))
        ids.append(np.argsort(liking_LE + mood_LE, axis=1)[:, ::-1][:, :top_k])
    card = plain_card(
        "sticky", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers))
    )
    return workload_of(trace_of(card, np.stack(ids)))
