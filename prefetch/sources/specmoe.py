"""specMoE's routing traces: a pickled list with one record per (text, MoE layer).

A record has layer_id, target_routing [S, E], target_top_k [S, k] and may have token_ids, dataset_name and sample_id;
its hidden_states are random numbers of the wrong width in the published files and are not read.
Format: cyanmishra92/specMoE at 79521e5. S tokens of a text, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.sources.files import UNNAMED, FileSource, domain_of
from prefetch.sources.unpickle import unpickle
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import NO_TOKEN, trace_of
from prefetch.trace.writer import TraceWriter

Record = Mapping[str, Any]
Text = dict[int, Record]  # layer -> its record
SUM_TOLERANCE = 0.02  # float16 probabilities of 128 experts add up to 1 within this


@dataclass(frozen=True, kw_only=True)
class SpecMoE(FileSource):
    """A text is a request. The published files are of the encoder of Switch Transformers."""

    stack: Literal["decoder", "encoder"] = "encoder"
    record_class: str | None = None
    suffixes: ClassVar[tuple[str, ...]] = (".pkl", ".pickle")
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "torch")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        agreed = total = 0
        writer.note("phase: whole texts in one pass, taken as prefill")
        for name, path in self.files().items():
            writer.file(str(path))
            with reading(path, "a list of routing records"):
                texts = by_text(unpickle(path, record_class=self.record_class))
            layers = sorted(next(iter(texts.values())))
            for number, (text_id, text) in enumerate(texts.items()):
                with reading(f"{path}, sample {text_id}", "routing records"):
                    ids_SLK, scores_SLE = self._arrays(text, layers, writer)
                    card = self._card(layers, scores_SLE.shape[2], ids_SLK.shape[2])
                    domain = str(text[layers[0]].get("dataset_name") or domain_of(name))
                    trace = trace_of(
                        card,
                        ids_SLK,
                        request_T=number,
                        token_T=_tokens(text, len(ids_SLK)),
                        domain=domain,
                        scores_TLM=scores_SLE.astype(np.float16),
                    )
                    writer.begin(card)
                agreed += int((scores_SLE.argmax(axis=2) == ids_SLK[:, :, 0]).sum())
                total += ids_SLK[:, :, 0].size
                writer.append(trace)
        writer.fact("first_choice_is_best_score", agreed / max(total, 1))

    def _card(self, layers: list[int], n_experts: int, top_k: int) -> ModelCard:
        return self.card(
            UNNAMED,
            n_experts=n_experts,
            top_k=top_k,
            layer_numbers=tuple(layers),
            score_function="softmax",
        )

    def _arrays(
        self, text: Text, layers: list[int], writer: TraceWriter
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids_SLK, scores_SLE): every layer must have seen the same tokens."""
        if sorted(text) != layers:
            raise FormatError(f"expected records of layers {layers}, got {sorted(text)}")
        scores, ids = [], []
        kinds = set()
        for layer in layers:
            score_SE = _two_axes(text[layer], "target_routing").astype(np.float32)
            kinds.add(_are_probabilities(score_SE))
            if not _are_probabilities(score_SE):
                writer.note("target_routing holds logits: softmax was applied")
                score_SE = np.exp(score_SE - score_SE.max(axis=1, keepdims=True))
                score_SE /= score_SE.sum(axis=1, keepdims=True)
            has_ids = text[layer].get("target_top_k") is not None
            id_SK = (
                _two_axes(text[layer], "target_top_k") if has_ids else score_SE.argmax(1)[:, None]
            )
            scores.append(score_SE)
            ids.append(id_SK)
        shapes = {
            layer: (*s.shape, *i.shape) for layer, s, i in zip(layers, scores, ids, strict=True)
        }
        if len(set(shapes.values())) > 1 or len(ids[0]) != len(scores[0]):
            raise FormatError(
                f"expected target_routing [S, E] and target_top_k [S, k] alike in all layers, got {shapes}"
            )
        if len(kinds) > 1:
            raise FormatError("target_routing: some layers hold probabilities and some do not")
        return np.stack(ids, axis=1).astype(np.int64), np.stack(scores, axis=1)


def by_text(records: Any) -> dict[str, Text]:
    """sample_id -> layer -> record, in the order of the file."""
    if not isinstance(records, list) or not records:
        raise FormatError(f"expected a list of records, found {type(records).__name__}")
    texts: dict[str, Text] = {}
    for number, record in enumerate(records):
        fields = record if isinstance(record, dict) else getattr(record, "__dict__", {})
        missing = {"layer_id", "target_routing", "sample_id"} - set(fields)
        if missing:
            raise FormatError(f"record {number}: lacks {sorted(missing)}; it has {sorted(fields)}")
        text = texts.setdefault(str(fields["sample_id"]), {})
        if int(fields["layer_id"]) in text:
            raise FormatError(
                f"record {number}: layer {fields['layer_id']} of sample {fields['sample_id']} stands twice"
            )
        text[int(fields["layer_id"])] = fields
    return texts


def _two_axes(record: Record, name: str) -> NDArray[Any]:
    """An array [S, n]; a batch of one text may stand before it."""
    value = record[name]
    array = np.asarray(
        value.float()
        if hasattr(value, "is_floating_point") and value.is_floating_point()
        else value
    )
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise FormatError(
            f"{name}: expected numbers [S, n], found {array.dtype} {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise FormatError(f"{name}: expected finite numbers, found NaN or infinity")
    return array


def _are_probabilities(score_SE: NDArray[np.float32]) -> bool:
    return bool((score_SE >= 0).all() and (np.abs(score_SE.sum(axis=1) - 1) < SUM_TOLERANCE).all())


def _tokens(text: Text, n_tokens: int) -> NDArray[Any] | int:
    """The vocabulary entries, where any layer's record has them (`input_embeddings` holds them too)."""
    found = [
        np.asarray(record[name]).reshape(-1)
        for record in text.values()
        for name in ("token_ids", "input_embeddings")
        if record.get(name) is not None
    ]
    if not found:
        return NO_TOKEN
    if any(len(tokens) != n_tokens or (tokens != found[0]).any() for tokens in found):
        raise FormatError(
            "token_ids: expected the same tokens in every layer's record, one per row"
        )
    return found[0]
