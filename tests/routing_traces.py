"""Traces that tests of analyses share: random, of a known chain, real ones, and the odd ones that must all work."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of


def random_trace(
    seed: int = 0,
    *,
    n_requests: int = 30,
    tokens: int = 40,
    n_layers: int = 4,
    n_experts: int = 16,
    top_k: int = 3,
    skew: float = 1.0,
    **known: object,
) -> RoutingTrace:
    """Zipf draws without replacement; the first half of every request is a prompt."""
    rng = np.random.default_rng(seed)
    n = n_requests * tokens
    noise = rng.gumbel(size=(n, n_layers, n_experts)) - skew * np.log(np.arange(1, n_experts + 1))
    ids = np.argsort(-noise, axis=2)[:, :, :top_k]
    phase = np.repeat([PREFILL, DECODE], [tokens // 2, tokens - tokens // 2])
    card = plain_card(
        "random", n_experts=n_experts, top_k=top_k, layer_numbers=tuple(range(n_layers))
    )
    given = {"phase_T": np.tile(phase, n_requests), **known}
    return trace_of(card, ids, request_T=np.repeat(np.arange(n_requests), tokens), **given)


def chain(n_tokens: int, matrix_EE: NDArray, seed: int = 0, n_layers: int = 2) -> RoutingTrace:
    """k = 1; the next layer's expert depends on this layer's alone, the first is drawn evenly."""
    rng, n_experts = np.random.default_rng(seed), len(matrix_EE)
    cdf_EE = np.cumsum(matrix_EE, axis=1)
    states = [rng.integers(0, n_experts, n_tokens)]
    for _ in range(n_layers - 1):
        above = rng.random(n_tokens)[:, None] >= cdf_EE[states[-1]]
        states.append(np.minimum(above.sum(axis=1), n_experts - 1))
    card = plain_card("chain", n_experts=n_experts, top_k=1, layer_numbers=tuple(range(n_layers)))
    request_T = np.arange(n_tokens) // 100
    return trace_of(card, np.stack(states, axis=1)[:, :, None], request_T=request_T)


def real_trace(path: Path) -> RoutingTrace:
    """One of the npz files of third parties, as it stands."""
    arrays = np.load(path)
    ids_TLK = arrays["expert_ids"]
    card = plain_card(
        path.stem,
        n_experts=64 if "deepseek" in path.name else 32,
        top_k=ids_TLK.shape[2],
        layer_numbers=tuple(arrays["layer_ids"].tolist()),
    )
    given = {"request_T": arrays["seq_id"], "position_T": arrays["pos"]}
    phase = PREFILL if "deepseek" in path.name else DECODE
    return trace_of(card, ids_TLK, phase_T=phase, weights_TLK=arrays["gate_weights"], **given)


def odd_traces() -> dict[str, RoutingTrace]:
    """What must all work: small, narrow, with holes."""
    whole = random_trace()
    holes = whole.ids_TLK.astype(int)
    holes[::3, 1:, -1] = -1
    holes[5, 2] = -1
    two = ModelCard("two stacks", 16, 3, (0, 1, 0, 1), ("encoder", "encoder", "decoder", "decoder"))
    stacks = whole.ids_TLK.astype(int)
    stacks[:600, 2:] = -1
    stacks[600:, :2] = -1
    return {
        "one layer": random_trace(n_layers=1),
        "one request": random_trace(n_requests=1),
        "one token": random_trace(n_requests=1, tokens=1),
        "one of one": random_trace(n_requests=1, tokens=1, n_layers=1, n_experts=1, top_k=1),
        "k = 1": random_trace(top_k=1),
        "k = E": random_trace(n_experts=3),
        "no expert": trace_of(whole.card, holes, request_T=whole.request_T, phase_T=whole.phase_T),
        "never used": random_trace(skew=9.0),
        "wide ids": random_trace(n_experts=300),
        "two stacks": trace_of(two, stacks, request_T=whole.request_T),
        "not run": random_trace(executed_T=np.arange(1200) % 40 >= 10),
    }
