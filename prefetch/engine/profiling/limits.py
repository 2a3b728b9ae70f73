"""At how many tokens memory ends, computed from predicted bytes before it happens. It times nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pandas as pd

from prefetch.engine.profiling import predictions
from prefetch.engine.profiling.grid import Cell
from prefetch.engine.profiling.operations import DENSE, OURS, PRODUCT
from prefetch.kernels.dense import most_tokens


def limits(cells: Sequence[Cell], room_bytes: int, factor: float) -> pd.DataFrame:
    """A row per layer and implementation: the most tokens that fit beside the experts, and what they need."""
    layers = dict.fromkeys(dataclasses.replace(cell, tokens=1, routing="") for cell in cells)
    rows = []
    for layer in layers:
        room = room_bytes - layer.experts * layer.layout.bytes
        sizes = {k: v for k, v in layer.fields.items() if k not in ("tokens", "routing")}
        for name, needed in needs(layer, factor).items():
            most = most_tokens(lambda T, of=needed: sum(of(T).values()), room)  # type: ignore[misc]
            parts = needed(most + 1)
            largest = max(parts, key=parts.__getitem__)
            rows.append({
                **sizes,
                "implementation": name,
                "room_bytes": room,
                "most_tokens": most,
                "first_that_does_not_fit": most + 1,
                "needed_bytes": sum(parts.values()),
                "largest_tensor": largest,
                "largest_share": parts[largest] / sum(parts.values()),
            })  # fmt: skip
    return pd.DataFrame(rows)


def needs(layer: Cell, factor: float) -> dict[str, Callable[[int], dict[str, int]]]:
    """Bytes of every tensor beside the inputs, by tokens."""

    def at(tokens: int) -> Cell:
        return dataclasses.replace(layer, tokens=tokens)

    return {
        DENSE: lambda tokens: predictions.dense(at(tokens), factor, product=False),
        PRODUCT: lambda tokens: predictions.dense(at(tokens), factor, product=True),
        OURS: lambda tokens: predictions.ours(at(tokens)),
    }
