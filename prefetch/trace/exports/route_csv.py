"""A trace as route_trace v1: a preamble with the sizes of every layer, then one CSV row per (token, layer, choice).

Format: Helldez/BigMoeOnEdge at 2d4f2b1. `source=route_csv` reads it back. It knows no cache: there is no residency.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from prefetch.errors import FormatError
from prefetch.progress import Progress
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import PREFILL, RoutingTrace, no_expert

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")


def write_route_csv(reader: TraceReader, path: Path, columns: list[str]) -> list[str]:
    """Says what was left out."""
    has_weights = "weights" in columns
    names = (*COLUMNS, "weight") if has_weights else COLUMNS
    options = csv.WriteOptions(include_header=False)
    n_not_run = n_partial = n_written = 0
    with path.open("wb") as file, Progress("writing", reader.n_tokens, "tokens") as progress:
        file.write("\n".join([*preamble(reader.card, reader.folder), ",".join(names), ""]).encode())
        schema = pa.schema([(n, pa.float32() if n == "weight" else pa.int32()) for n in names])
        with csv.CSVWriter(file, schema, write_options=options) as rows:
            for block in reader.batches(*["weights"] * has_weights):
                whole_T = _is_whole(block)
                n_not_run += int((~block.executed_T).sum())
                n_partial += int((block.executed_T & ~whole_T).sum())
                kept = block.rows(block.executed_T & whole_T)
                n_written += kept.n_tokens
                if kept.n_tokens:
                    rows.write_table(_rows(kept, schema))
                progress.advance(block.n_tokens)
    if not n_written:
        raise FormatError(f"{reader.folder}: no token can be written as route_trace v1")
    return [*_said(n_not_run, n_partial), *_lost(reader)]


def preamble(card: ModelCard, where: Path) -> list[str]:
    """The first lines: the model, and a line per layer."""
    if set(card.layer_stacks) != {"decoder"} or list(card.layer_numbers) != sorted(
        card.layer_numbers
    ):
        raise FormatError(
            f"{where}: route_trace v1 holds the layers of one decoder in ascending order; take them with "
            "traces.do=subset traces.layers=..."
        )
    if card.expert_bytes_L is None:
        raise FormatError(
            f"{where}: route_trace v1 states the bytes of every layer's experts, which the model card does not "
            "know; collect the trace with source.model_card=... or choose another format"
        )
    lines = [
        "# route_trace v1",
        f"# model={_word(card.name)} n_layer={card.layer_numbers[-1] + 1} n_expert={card.n_experts} "
        f"n_expert_used={card.top_k}",
    ]
    dense = [card.dense_bytes or 0, *[0] * (card.n_layers - 1)]  # the reader adds them up
    return lines + [
        f"# layer={number} expert_bytes={size} dense_bytes={rest}"
        for number, size, rest in zip(card.layer_numbers, card.expert_bytes_L, dense, strict=True)
    ]


def _word(name: str) -> str:
    """Without blanks, at which the preamble is cut."""
    return re.sub(r"\s+", "_", name.strip()) or "unknown"


def _is_whole(block: RoutingTrace) -> NDArray[np.bool_]:
    """[T] all K choices in every layer; or none in prefill's last, which llama.cpp runs for output tokens alone."""
    chosen_TL = (block.ids_TLK != no_expert(block.card.n_experts)).sum(axis=2)
    partial_TL = chosen_TL != block.card.top_k
    if block.card.n_layers > 1:
        partial_TL[:, -1] &= (chosen_TL[:, -1] != 0) | (block.phase_T != PREFILL)
    return ~partial_TL.any(axis=1)


def _rows(block: RoutingTrace, schema: pa.Schema) -> pa.Table:
    token_N, layer_N, slot_N = np.nonzero(block.ids_TLK != no_expert(block.card.n_experts))
    found: dict[str, NDArray[Any]] = {
        "turn": block.request_T[token_N],
        "phase": block.phase_T[token_N],
        "step": block.position_T[token_N],
        "layer": np.array(block.card.layer_numbers)[layer_N],
        "slot": slot_N,
        "expert": block.ids_TLK[token_N, layer_N, slot_N],
    }
    arrays = [pa.array(found[name].astype(np.int32)) for name in COLUMNS]
    if block.weights_TLK is not None:
        arrays.append(pa.array(block.weights_TLK[token_N, layer_N, slot_N].astype(np.float32)))
    return pa.Table.from_arrays(arrays, schema=schema)


def _said(n_not_run: int, n_partial: int) -> list[str]:
    lines = []
    if n_not_run:
        lines.append(f"left out: {n_not_run} rows that were not executed")
    if n_partial:
        lines.append(f"left out: {n_partial} tokens with fewer than k choices in some layer")
    return lines


def _lost(reader: TraceReader) -> list[str]:
    card = reader.card
    lines = ["not held: token ids and domains (read back, the file's name becomes the domain)"]
    if card.dense_bytes is None:
        lines.append("the dense bytes of the model are not known: written as 0")
    if (name := PurePosixPath(_word(card.name)).name) != card.name:
        lines.append(f"the model's name is read back as {name}, not {card.name}")
    if "weights" not in reader.columns:
        lines.append("no weights were recorded: the column is absent")
    return lines
