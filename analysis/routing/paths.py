"""The way of a few requests through the model: which expert each layer chose first, token by token.

Real paths: the same request and the same tokens in every layer. It knows no statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, plan_of
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard

SAMPLES = 8  # requests, evenly spread over the trace
TOKENS = 256  # of each, from its start
SCHEMA = {
    "expert_sequence": "first choice (largest weight; first listed, where no weights were recorded) per token, "
    "-1 = no expert; in every layer the same tokens",
    "tokens": f"the first {TOKENS} executed rows of each of {SAMPLES} requests evenly spread over the trace",
}


class Paths:
    """The first choices of the sampled requests."""

    def __init__(self, plan: Plan, samples: int = SAMPLES, tokens: int = TOKENS) -> None:
        if min(samples, tokens) < 1:
            raise ValueError(f"samples and tokens must be at least 1, got {samples} and {tokens}")
        self.plan, self.tokens = plan, tokens
        requests = plan.survey.request_R
        spread = np.unique(np.linspace(0, len(requests) - 1, samples).astype(int))
        self.wanted = {requests[i] for i in spread}
        self.found: dict[int, tuple[str | None, NDArray[Any], NDArray[Any]]] = {}

    def add(self, batch: Batch) -> None:
        block = batch.block
        stops = [*batch.starts_R[1:].tolist(), block.n_tokens]
        for start, stop in zip(batch.starts_R.tolist(), stops, strict=True):
            request = int(block.request_T[start])
            if request in self.wanted:
                rows = slice(start, min(stop, start + self.tokens))
                code = int(block.domain_T[start])
                name = block.domains[code] if code >= 0 else None
                first_LS = batch.first_choice_LT[:, rows].astype(np.int64)
                first_LS[first_LS == batch.nobody] = -1
                self.found[request] = name, block.position_T[rows], first_LS

    def merge(self, later: Paths) -> None:
        self.found |= later.found

    def table(self) -> pd.DataFrame:
        """One row per sampled request, layer and token."""
        numbers = np.array(self.plan.card.layer_numbers)
        frames = []
        for request, (_, position_S, first_LS) in sorted(self.found.items()):
            layer, token = np.indices(first_LS.shape)
            columns = {"request": request, "position": position_S[token.ravel()]}
            columns |= {"layer": numbers[layer.ravel()], "expert": first_LS.ravel()}
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """`sample_trace_paths.json` of the expert analysis guide: layer -> its samples."""
        paths: dict[str, Any] = {"schema": SCHEMA}
        for layer, name in enumerate(layer_names(self.plan.card)):
            paths[name] = [
                {
                    "sample_id": f"request_{request}",
                    "expert_sequence": first_LS[layer].tolist(),
                    "sequence_length": first_LS.shape[1],
                    "dataset_name": domain,
                }
                for request, (domain, _, first_LS) in sorted(self.found.items())
            ]
        return paths


def layer_names(card: ModelCard) -> list[str]:
    """Keys of layers in JSON: the model's numbers, with the stack where there are two."""
    two = len(set(card.layer_stacks)) > 1
    pairs = zip(card.layer_stacks, card.layer_numbers, strict=True)
    return [f"{stack}_{number}" if two else str(number) for stack, number in pairs]


def sample_paths(trace: Traceable, samples: int = SAMPLES, tokens: int = TOKENS) -> pd.DataFrame:
    """First choices of a few requests, layer by layer."""
    plan = plan_of(trace)
    paths = Paths(plan, samples, tokens)
    accumulate(trace, plan, [paths], *plan.recorded("weights"))
    return paths.table()
