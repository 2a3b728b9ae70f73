"""Small traces with every column that a trace can have, on disk, and what it means that two of them are equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter

CARD = ModelCard(
    "toy/model", 16, 2, (1, 2, 4), ("decoder",) * 3, hidden_size=5, expert_bytes_L=(10, 20, 40)
)
EVERYTHING = ("weights", "scores", "gate_inputs", "pre_attention")
PLAIN = {"executed_T": True, "token_T": 7}


def everything(
    lengths: list[int], seed: int = 0, *, card: ModelCard = CARD, **known: Any
) -> RoutingTrace:
    """Requests of these lengths in domains that alternate, the first without one; the first half is a prompt."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    shape, request_T = (n, card.n_layers), np.repeat(np.arange(len(lengths)), lengths)
    ids = rng.random((*shape, card.n_experts)).argsort(-1)[..., : card.top_k]
    phases = [np.arange(length) >= (length + 1) // 2 for length in lengths]
    given = {
        "request_T": request_T,
        "phase_T": np.concatenate([np.zeros(0), *phases]).astype(np.uint8),
        "executed_T": rng.random(n) < 0.9,
        "token_T": rng.integers(-1, 50, n),
        "weights_TLK": rng.random((*shape, card.top_k)).astype(np.float16),
        "scores_TLM": rng.random((*shape, card.n_experts)).astype(np.float16),
        "gate_inputs_TLD": rng.random((*shape, 5)).astype(np.float16),
        "pre_attention_TLD": rng.random((*shape, 5)).astype(np.float16),
        **known,
    }
    trace = trace_of(card, ids, **given)
    domain_T = (request_T % 3 - 1).astype(np.int32)
    return dataclasses.replace(trace, domains=("law", "code"), domain_T=domain_T)


def write(
    folder: Path,
    *blocks: RoutingTrace,
    kind: str = "real",
    routers: bool = False,
    provenance: Provenance | None = None,
) -> TraceReader:
    folder.mkdir(parents=True)
    writer = TraceWriter(folder, provenance or Provenance(kind, "test", seed=3), max_dropped=1.0)
    writer.begin(blocks[0].card)
    for block in blocks:
        writer.append(block)
    if routers:
        numbers = blocks[0].card.layer_numbers
        writer.router_weights({n: np.full((16, 5), n, np.float32) for n in numbers})
    writer.close()
    return TraceReader(folder)


def assert_same_rows(left: RoutingTrace, right: RoutingTrace) -> None:
    """Domains count by name."""
    for field in dataclasses.fields(RoutingTrace):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray) and field.name != "domain_T":
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            assert a.dtype == b.dtype, field.name
        elif field.name not in ("domain_T", "domains", "card"):
            assert a is b is None, field.name
    assert domains_of(left) == domains_of(right)


def domains_of(trace: RoutingTrace) -> list[str | None]:
    return [None if code < 0 else trace.domains[code] for code in trace.domain_T.tolist()]


def assert_same_bytes(one: Path, other: Path) -> None:
    """Every file but for the provenance, which tells how each came about."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "trace.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (json.loads((f / "trace.json").read_text()) for f in (one, other))
    for about in (ours, theirs):
        about.pop("provenance")
    assert ours == theirs


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
