"""A part of a trace as a trace of its own: some domains, requests, layers, a phase, or as many tokens as are wanted.

Requests are numbered anew in their old order; layers keep the model's own numbers; positions stay as they were.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.artifacts import Outside
from prefetch.progress import Progress
from prefetch.trace.beside import copy_beside
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import WIDE, TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.rewrite import Rewriter, Written, as_note, kept_columns
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.selection import (
    Selection,
    beyond,
    chosen_requests,
    domain_codes,
    layer_slots,
    rows_kept,
)
from prefetch.trace.target import check_apart, new_folder


def subset(
    trace: TraceReader | Path | str,
    to: Path | str,
    asked: Selection,
    *,
    leave_out: tuple[str, ...] = (),
) -> Written:
    """Writes the part that was asked for into the new folder `to`."""
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    check_apart(to, reader.folder)
    slots = layer_slots(reader.card, asked.layers)
    columns = kept_columns(reader, leave_out)
    chosen_R, card = chosen_requests(reader, asked), card_of(reader.card, slots)
    with new_folder(to) as folder, Progress("subset", reader.n_tokens, "tokens") as progress:
        writer = Rewriter(folder, card)
        for block in reader.batches(*columns):
            kept_T = np.isin(block.request_T, chosen_R)
            kept_T &= rows_kept(vars(block), domain_codes(reader, asked.domains), asked.phase)
            writer.add(part_of(block, kept_T, slots, card), str(reader.folder))
            progress.advance(block.n_tokens)
        said = copy_beside(reader, card, folder)
        said += [f"left out: {name}" for name in reader.columns if name in leave_out]
        writer.close(_provenance(reader, asked, chosen_R, said))
    said = [*beyond(reader, asked), *said]  # of the command: the part's own notes need it not
    return Written(Path(to), writer.tokens, writer.requests, tuple(said))


def card_of(card: ModelCard, slots: list[int]) -> ModelCard:
    """The card of these layers; what it says of the whole model stays."""
    by_layer: dict[str, Any] = {
        name: None if values is None else tuple(values[slot] for slot in slots)
        for name in ("layer_numbers", "layer_stacks", "expert_bytes_L")
        for values in [getattr(card, name)]
    }
    return dataclasses.replace(card, **by_layer)


def part_of(
    block: RoutingTrace, kept_T: NDArray[np.bool_], slots: list[int], card: ModelCard
) -> RoutingTrace:
    """These rows, and of them these layers."""
    rows = block if kept_T.all() else block.rows(kept_T)
    if len(slots) == block.card.n_layers:
        return rows
    wide: dict[str, Any] = {
        field: np.ascontiguousarray(array[:, slots])
        for _, field in WIDE.values()
        for array in [getattr(rows, field)]
        if array is not None
    }
    return dataclasses.replace(rows, card=card, **wide)


def _provenance(
    reader: TraceReader, asked: Selection, chosen_R: NDArray[np.int32], said: list[str]
) -> Provenance:
    """That of the whole, with what was measured on the whole as sentences: it is no fact of the part."""
    whole, key = reader.provenance, Outside("trace", reader.folder).key
    dropped = {f"{why} (rows)": float(n) for why, n in whole.dropped_rows.items()}
    notes = [
        f"part of trace {key}: {asked.told()}; {len(chosen_R)} of {reader.n_requests} requests",
        *as_note("dropped while the whole was recorded", dropped),
        *as_note("measured on the whole", whole.facts),
        *said,
    ]
    notes += [note for note in whole.notes if note not in notes]
    return dataclasses.replace(
        whole,
        inputs={**whole.inputs, "trace": key},
        dropped_rows={},
        facts={},
        notes=tuple(notes),
    )
