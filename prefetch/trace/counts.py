"""`ExpertCounts`: how often each expert was used, from sources that kept no order. No transitions can come of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.trace.card import ModelCard
from prefetch.trace.provenance import Provenance
from prefetch.trace.version import read_json

SCHEMA = "prefetch.counts/1"


@dataclass(frozen=True, eq=False)
class ExpertCounts:
    """`counts_LE[l, e]`: the choices that went to expert e of layer l."""

    card: ModelCard
    counts_LE: NDArray[np.int64]
    provenance: Provenance

    def __post_init__(self) -> None:
        shape = (self.card.n_layers, self.card.n_experts)
        if self.counts_LE.shape != shape or self.counts_LE.dtype != np.int64:
            raise FormatError(
                f"counts_LE: expected {list(shape)} of int64, got {list(self.counts_LE.shape)}"
            )
        if self.counts_LE.size and self.counts_LE.min() < 0:
            layer, expert = (int(x) for x in np.argwhere(self.counts_LE < 0)[0])
            raise FormatError(
                f"layer {self.card.layer_numbers[layer]}, expert {expert}: a count cannot be negative, "
                f"got {int(self.counts_LE[layer, expert])}"
            )
        if not self.counts_LE.any():
            raise FormatError("counts_LE: every count is zero")

    def save(self, folder: Path) -> None:
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "card": self.card.to_json(),
            "provenance": self.provenance.to_json(),
            "counts": self.counts_LE.tolist(),
        }
        (folder / "counts.json").write_text(json.dumps(about) + "\n")


def load_counts(folder: Path | str) -> ExpertCounts:
    path = Path(folder) / "counts.json"
    about = read_json(path, SCHEMA)
    with reading(path, "card, provenance and counts"):
        card = ModelCard.from_json(about["card"], str(path))
        provenance = Provenance.from_json(about["provenance"], str(path))
        numbers = [number for row in about["counts"] for number in row]
        if not all(type(number) is int for number in numbers):
            raise FormatError("counts must be whole numbers")
        return ExpertCounts(card, np.array(about["counts"], np.int64), provenance)
