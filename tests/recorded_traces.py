"""Traces with inputs of gates and of attention, and what every test of a predictor on them asks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from routing_traces import random_trace

from prefetch.predict.past import Past
from prefetch.predict.predictor import Predictor, restore, save, state_of
from prefetch.trace.card import plain_card
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter

INPUTS = ("gate_inputs_TLD", "pre_attention_TLD")
SMALL = {  # settings that keep a fit short
    "hidden_mlp": {"hidden": 8, "epochs": 1},
    "pre_attention": {"hidden": 8, "epochs": 1},
    "mlp": {"hidden": 8, "epochs": 1},
    "memory_mlp": {"hidden": 8, "epochs": 1},
    "recurrent": {"hidden": 8, "epochs": 1},
    "transformer": {"hidden": 8, "epochs": 1},
    "encoder": {"hidden": 8, "epochs": 1},
    "ensemble": {"members": ["token_table", "gate_lookahead", {"mlp": {"hidden": 8, "epochs": 1}}]},
}


def recorded(seed: int = 0, n_requests: int = 12, tokens: int = 20, width: int = 6) -> RoutingTrace:
    """Noise: nothing to be found."""
    rng = np.random.default_rng(seed)
    shape = n_requests * tokens, 4, width
    inputs = {name: rng.normal(size=shape).astype(np.float16) for name in INPUTS}
    return random_trace(seed, n_requests=n_requests, tokens=tokens, **inputs)


def routed(
    seed: int = 0, n_tokens: int = 800, drift: float = 0.0
) -> tuple[RoutingTrace, np.ndarray]:
    """Routers [L, E, D] choose the best 2 of 8 by the recorded input, which moves by `drift` from layer to layer."""
    rng, (n_layers, n_experts, width) = np.random.default_rng(seed), (4, 8, 12)
    routers_LED = np.random.default_rng(99).normal(size=(n_layers, n_experts, width))
    routers_LED = routers_LED.astype(np.float32)
    moves_TLD = rng.normal(size=(n_tokens, n_layers, width))
    moves_TLD[:, 1:] *= drift
    x_TLD = np.cumsum(moves_TLD, axis=1).astype(np.float16)
    logits_TLE = np.einsum("tld,led->tle", x_TLD.astype(np.float32), routers_LED)
    ids_TLK = np.argsort(-logits_TLE, axis=2, kind="stable")[:, :, :2]
    card = plain_card("routed", n_experts=n_experts, top_k=2, layer_numbers=(1, 2, 4, 5))
    trace = trace_of(
        card,
        ids_TLK,
        request_T=np.arange(n_tokens) // 20,
        gate_inputs_TLD=x_TLD,
        pre_attention_TLD=x_TLD,
    )
    return trace, routers_LED


def recall(scores_TLE: np.ndarray, trace: RoutingTrace, first: int) -> float:
    """Of the layers from `first` on."""
    best_TLK = np.argsort(-scores_TLE, axis=2, kind="stable")[:, :, : trace.card.top_k]
    hit_TLK = (trace.ids_TLK[..., None] == best_TLK[:, :, None]).any(axis=3)
    return float(hit_TLK[:, first:].mean())


def check_restored(fitted: Predictor, fresh: Any, trace: RoutingTrace, folder: Path) -> None:
    """What was saved gives the same scores in a predictor that was never fitted."""
    save(fitted, folder, {}, 0.0)
    restore(fresh, folder)
    assert state_of(fresh).keys() == state_of(fitted).keys()
    for horizon in fitted.horizons:
        past = Past(trace, horizon)
        np.testing.assert_array_equal(fresh.scores(past), fitted.scores(past))


def check_same_bytes(one: Predictor, two: Predictor) -> None:
    ours, theirs = state_of(one), state_of(two)
    assert ours.keys() == theirs.keys() and ours
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


def check_causal(fitted: Predictor, trace: RoutingTrace, other: RoutingTrace) -> None:
    """What comes after layer l - horizon of a token leaves the scores at l and before as they were."""
    row = trace.n_tokens // 2 + 3
    for horizon in fitted.horizons:
        plain = fitted.scores(Past(trace, horizon))
        for layer in range(trace.card.n_layers):
            arrays = {}
            for name in ("ids_TLK", *INPUTS):
                mine, theirs = getattr(trace, name).copy(), getattr(other, name)
                known = max(0, layer - horizon + 1) + (name == "pre_attention_TLD")
                mine[row, known:] = theirs[row, known:]
                mine[row + 1 :] = theirs[row + 1 :]
                arrays[name] = mine
            scores = fitted.scores(Past(dataclasses.replace(trace, **arrays), horizon))
            np.testing.assert_array_equal(scores[:row], plain[:row])
            np.testing.assert_array_equal(scores[row, : layer + 1], plain[row, : layer + 1])


def full_trace(seed: int = 0, n_requests: int = 8, tokens: int = 10) -> RoutingTrace:
    """Everything recorded that a predictor could ask for."""
    rng = np.random.default_rng(seed)
    n = n_requests * tokens
    weights = rng.random((n, 4, 3))
    return random_trace(
        seed,
        n_requests=n_requests,
        tokens=tokens,
        token_T=rng.integers(0, 9, n),
        weights_TLK=weights / weights.sum(axis=2, keepdims=True),
        gate_inputs_TLD=rng.normal(size=(n, 4, 6)).astype(np.float16),
        pre_attention_TLD=rng.normal(size=(n, 4, 6)).astype(np.float16),
    )


def on_disk(trace: RoutingTrace, folder: Path, seed: int = 0) -> TraceReader:
    """With routers of its layers beside it."""
    folder.mkdir(exist_ok=True)
    writer = TraceWriter(folder, Provenance("synthetic", "test"), max_dropped=0.5)
    writer.begin(trace.card)
    writer.append(trace)
    rng = np.random.default_rng(seed)
    writer.router_weights({n: rng.normal(size=(16, 6)).astype(np.float32) for n in range(4)})
    writer.close()
    return TraceReader(folder)
