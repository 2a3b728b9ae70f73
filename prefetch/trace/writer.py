"""Where every source writes: numbers requests, checks rows, counts what was dropped, and writes the trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard
from prefetch.trace.checks import WARM_UP_ROWS, RowChecks, equal_rows, leading_constant_rows
from prefetch.trace.parquet import TraceFiles
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, no_expert


class TraceWriter:
    """`begin(card)`, then `append(block)` with whole requests in order, then `close()`.

    Request numbers of a block are local to the file that `file()` announced: the writer gives out its own, so that
    requests of different files never collide. A request may go on in the next block.
    """

    def __init__(self, folder: Path, provenance: Provenance, *, max_dropped: float = 0.5) -> None:
        self._files = TraceFiles(folder)
        self._folder = folder
        self._base = provenance
        self._max_dropped = max_dropped
        self._dropped: dict[str, int] = dict(provenance.dropped_rows)
        self._notes = list(provenance.notes)
        self._facts = dict(provenance.facts)
        self._inputs = dict(provenance.inputs)
        self._card: ModelCard | None = None
        self._checks: RowChecks | None = None
        self._where = provenance.source
        self._request = -1  # the last number given out
        self._local: int | None = None  # the source's own number for it
        self._row = 0  # of the file: the next to be checked
        self._may_be_warm_up = True  # the file has shown nothing but one row so far
        self._warm_row: NDArray[Any] | None = None  # that row, once it has come often enough
        self._held: list[RoutingTrace] = []  # until it has

    def begin(self, card: ModelCard) -> None:
        if self._card is not None and card != self._card:
            raise FormatError(
                f"{self._where}: expected the same model in every file, but {_difference(self._card, card)}; "
                "collect it on its own (source.path takes one file, or a glob)"
            )
        self._card = card
        if self._checks is None:
            self._checks = RowChecks(card, suspects=self._base.kind == "real")

    def file(self, where: str) -> None:
        """What follows comes from here: names it in errors, and starts new requests."""
        self._release()
        self._where, self._local, self._row = where, None, 0
        self._may_be_warm_up, self._warm_row = True, None

    def drop(self, reason: str, rows: int) -> None:
        if rows:
            self._dropped[reason] = self._dropped.get(reason, 0) + int(rows)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def fact(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FormatError(
                f"{self._where}: the fact {name} must be a finite number, got {value}"
            )
        self._facts[name] = float(value)

    def input(self, name: str, digest: str) -> None:
        """What went in that is no file of the recipe: a corpus made on the spot."""
        self._inputs[name] = digest

    def append(self, block: RoutingTrace) -> None:
        assert self._card is not None, "begin(card) comes before append(block)"
        if block.card != self._card:
            raise FormatError(
                f"{self._where}: the block is of another model: {_difference(self._card, block.card)}"
            )
        if not block.n_tokens:
            return
        if not self._may_be_warm_up or self._base.kind == "synthetic":
            self._accept(block)
            return
        self._held.append(block)
        ids_TLK = np.concatenate([held.ids_TLK for held in self._held])
        if self._warm_row is None:
            if len(ids_TLK) < WARM_UP_ROWS:
                return
            self._warm_row = ids_TLK[0] if _is_warm_up(ids_TLK, block.card) else None
        rows = 0 if self._warm_row is None else equal_rows(ids_TLK, self._warm_row)
        self._may_be_warm_up = bool(rows) and rows == len(ids_TLK)
        self._drop_held(rows)
        self._release()

    def _drop_held(self, rows: int) -> None:
        self.drop("constant warm-up rows at the start of a file", rows)
        self._row += rows
        for i, block in enumerate(self._held):
            self._held[i] = block.rows(slice(min(rows, block.n_tokens), None))
            rows -= min(rows, block.n_tokens)

    def _release(self) -> None:
        """What was held back because it could have been a warm-up, and was too short for one."""
        held, self._held = self._held, []
        for block in held:
            self._accept(block)

    def _accept(self, block: RoutingTrace) -> None:
        if not block.n_tokens:
            return
        assert self._checks is not None
        block = dataclasses.replace(block, request_T=self._numbered(block.request_T))
        self._checks.add(block, self._where, self._row)
        try:
            self._files.append(block)
        except FormatError as error:
            raise FormatError(f"{self._where}: {error}") from error
        self._row += block.n_tokens

    def beside(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Arrays that belong to the trace as a whole: `name.safetensors` in its folder."""
        from safetensors.numpy import save_file

        tensors = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        save_file(tensors, self._folder / f"{name}.safetensors")

    def router_weights(self, weights_L: Mapping[int, NDArray[Any]]) -> None:
        """layer number -> [E, D]; needed by gate lookahead."""
        self.beside("router_weights", {f"layer.{n}": array for n, array in weights_L.items()})

    def close(self) -> Provenance:
        self._release()
        if self._card is None or self._checks is None or not self._checks.rows:
            dropped = "; ".join(
                f"{rows} rows dropped: {why}" for why, rows in self._dropped.items()
            )
            raise FormatError(
                f"{self._where}: expected routing, found none{'; ' + dropped if dropped else ''}"
            )
        self._checks.finish(self._card.layer_numbers, self._where)
        n_dropped = sum(self._dropped.values())
        share = n_dropped / (n_dropped + self._checks.rows)
        if share > self._max_dropped:
            raise FormatError(
                f"{self._where}: {n_dropped} of {n_dropped + self._checks.rows} rows would be dropped "
                f"({share:.0%}, allowed {self._max_dropped:.0%}): {self._dropped}; if that is right, pass "
                f"collect.max_dropped={min(1.0, share + 0.01):.2f}"
            )
        facts = {
            "duplicate_requests": float(self._checks.duplicate_requests),
            "requests_with_gaps": float(self._checks.requests_with_gaps),
            **self._facts,
        }
        provenance = dataclasses.replace(
            self._base,
            inputs=self._inputs,
            dropped_rows=self._dropped,
            notes=tuple(self._notes),
            facts=facts,
        )
        self._files.close(self._card, provenance)
        return provenance

    def _numbered(self, local_T: NDArray[np.int32]) -> NDArray[np.int32]:
        is_new = np.diff(local_T, prepend=local_T[0]) != 0
        is_new[0] = self._local is None or int(local_T[0]) != self._local
        numbers = self._request + np.cumsum(is_new)
        self._request, self._local = int(numbers[-1]), int(local_T[-1])
        return numbers.astype(np.int32)


def _difference(first: ModelCard, card: ModelCard) -> str:
    one, other = first.to_json(), card.to_json()
    odd = [name for name in one if one[name] != other[name]]
    short = [name for name in odd if not isinstance(one[name], tuple)] or odd
    return ", ".join(f"{name} is {_brief(other[name])} after {_brief(one[name])}" for name in short)


def _brief(value: Any) -> str:
    is_long = isinstance(value, tuple) and len(value) > 6
    return f"[{value[0]}, ..., {value[-1]}] ({len(value)})" if is_long else str(value)


def _is_warm_up(ids_TLK: NDArray[Any], card: ModelCard) -> bool:
    """Rows that never ran are equal too, and so are rows in which every expert is chosen."""
    has_expert = bool((ids_TLK[0] != no_expert(card.n_experts)).any())
    return has_expert and card.top_k < card.n_experts and leading_constant_rows(ids_TLK) > 0
