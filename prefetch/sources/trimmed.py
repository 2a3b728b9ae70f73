"""The first layers, and of each token the first choices, of another trace: so that it can stand for a smaller model.

Where weights were recorded, the first choices are those with the largest. It reads a trace's folder and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.artifacts import Outside
from prefetch.errors import ConfigError
from prefetch.progress import Progress
from prefetch.sources.source import Source
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class Trimmed(Source):
    path: str | None = None
    n_layers: int | None = None  # None = all
    top_k: int | None = None
    libraries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.path is None:
            raise ConfigError("path is missing: pass source.path=FOLDER, that of a trace")
        for name in ("n_layers", "top_k"):
            asked, has = getattr(self, name), getattr(self._whole.card, name)
            if asked is not None and not 1 <= asked <= has:
                raise ConfigError(f"{name}={asked}: {self.path} has {has}; expected from 1 to that")

    @property
    def _whole(self) -> TraceReader:
        return TraceReader(str(self.path))

    @property
    def real(self) -> bool:  # type: ignore[override]
        return self._whole.provenance.kind == "real"

    def settings(self) -> dict[str, Any]:
        return {"n_layers": self.n_layers, "top_k": self.top_k}

    def upstream(self) -> Mapping[str, Any]:
        return {"trace": Outside("trace", self._whole.folder)}

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        reader = TraceReader(upstream["trace"])
        card = self._card(reader.card)
        writer.begin(card)
        writer.note(
            f"of {reader.card.n_layers} layers, {reader.card.top_k} choices: {reader.folder.name}"
        )
        has_weights = "weights" in reader.columns
        with Progress("trimming", reader.n_tokens, "tokens") as progress:
            for block in reader.batches(*["weights"] * has_weights):
                writer.append(trimmed(block, card))
                progress.advance(block.n_tokens)

    def _card(self, whole: ModelCard) -> ModelCard:
        n = self.n_layers or whole.n_layers
        sizes_L = whole.expert_bytes_L
        return dataclasses.replace(
            whole,
            top_k=self.top_k or whole.top_k,
            layer_numbers=whole.layer_numbers[:n],
            layer_stacks=whole.layer_stacks[:n],
            expert_bytes_L=None if sizes_L is None else sizes_L[:n],
        )


def trimmed(block: RoutingTrace, card: ModelCard) -> RoutingTrace:
    """The rows of a block as a smaller model's."""
    ids_TLK: NDArray[Any] = block.ids_TLK[:, : card.n_layers]
    if block.weights_TLK is None:
        return dataclasses.replace(block, card=card, ids_TLK=_first(ids_TLK, card.top_k))
    weights_TLK = block.weights_TLK[:, : card.n_layers]
    order_TLK = np.argsort(-weights_TLK.astype(np.float32), axis=2, kind="stable")
    ids_TLK, weights = (
        _first(np.take_along_axis(of, order_TLK, axis=2), card.top_k)
        for of in (ids_TLK, weights_TLK)
    )
    return dataclasses.replace(block, card=card, ids_TLK=ids_TLK, weights_TLK=weights)


def _first(of_TLK: NDArray[Any], top_k: int) -> NDArray[Any]:
    return np.ascontiguousarray(of_TLK[..., :top_k])
