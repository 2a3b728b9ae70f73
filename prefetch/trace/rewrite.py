"""Rows of traces that exist already, on their way into a new one: numbered anew, and checked for what always holds.

It knows no reason to leave a row out. What a fresh recording must be asked (warm-up rows, evenness) was asked then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard
from prefetch.trace.checks import RowChecks
from prefetch.trace.parquet import WIDE, TraceFiles, TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace

COUNTED = ("duplicate_requests", "requests_with_gaps")  # facts that are counted anew


@dataclasses.dataclass(frozen=True)
class Written:
    """What an operation left: where, how much, and what there is to say about it, a line each."""

    path: Path
    tokens: int
    requests: int
    said: tuple[str, ...] = ()


class Rewriter:
    """`add(block)` with whole requests in order, then `close`."""

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self._files, self._card = TraceFiles(folder), card
        self._checks = RowChecks(card, suspects=False)
        self.requests = 0

    @property
    def tokens(self) -> int:
        return self._checks.rows

    def add(self, block: RoutingTrace, where: str) -> None:
        if not block.n_tokens:
            return
        starts = block.starts_R
        lengths = np.diff(np.append(starts, block.n_tokens))
        numbers = np.arange(self.requests, self.requests + len(starts), dtype=np.int32)
        self.requests += len(starts)
        block = dataclasses.replace(block, card=self._card, request_T=np.repeat(numbers, lengths))
        self._checks.add(block, where, self.tokens)
        self._files.append(block)

    def close(self, provenance: Provenance) -> None:
        if not self.tokens:
            raise FormatError("no row is left: nothing was written")
        self._checks.finish(self._card.layer_numbers, "the new trace")
        facts = {name: float(getattr(self._checks, name)) for name in COUNTED}
        facts = {**provenance.facts, **facts}
        self._files.close(self._card, dataclasses.replace(provenance, facts=facts))


def kept_columns(reader: TraceReader, leave_out: Iterable[str]) -> list[str]:
    """What the trace recorded beside its choices, without what is not wanted; `score_ids` go with their scores."""
    unwanted = set(leave_out)
    unknown = unwanted - set(WIDE) | unwanted & {"experts"}
    if unknown:
        raise FormatError(
            f"leave_out: expected among {sorted(set(WIDE) - {'experts', 'score_ids'})}, got {sorted(unknown)}"
        )
    if "scores" in unwanted:
        unwanted.add("score_ids")
    return [name for name in reader.columns if name != "experts" and name not in unwanted]


def as_note(text: str, facts: Mapping[str, float]) -> list[str]:
    """Facts that were measured on other rows than these, as a sentence."""
    told = ", ".join(f"{name}={value:g}" for name, value in facts.items() if name not in COUNTED)
    return [f"{text}: {told}"] if told else []
