"""A trace as ESFT's text: a folder per domain, in it a file per layer, in it a line per request with ids and weights.

Format: deepseek-ai/ESFT at 579a771, `results/expert_scores`. `source=esft` reads it back. A line is a whole sequence in
one pass: phases, positions and token ids have no place in it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.progress import Progress
from prefetch.trace.describe import Description
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import DECODE, RoutingTrace, no_expert

ALL = "all"  # the folder of requests without a domain


def write_esft(reader: TraceReader, folder: Path, told: Description) -> list[str]:
    """Says what was left out."""
    _check(reader)
    names = folder_names((*reader.domains, ALL))
    n_left_out = 0
    files = _Lines(folder)
    with Progress("writing", reader.n_tokens, "tokens") as progress:
        for block in reader.batches("weights"):
            nobody = no_expert(reader.card.n_experts)
            run_T = block.executed_T & (block.ids_TLK != nobody).all(axis=(1, 2))
            n_left_out += int((~run_T).sum())
            if run_T.any():
                _write(block.rows(run_T), names, files)
                files.flush()
            progress.advance(block.n_tokens)
    if not files.n_written:
        raise FormatError(f"{reader.folder}: no token can be written as ESFT's text")
    lines = [
        f"read back with source=esft source.top_k={reader.card.top_k}; requests stand by domain"
    ]
    if n_left_out:
        lines.append(f"left out: {n_left_out} rows without all k choices, or not executed")
    if n := int(told.rows_DP[:, DECODE].sum()):
        lines.append(f"{n} decode rows are read back as prefill: the format knows no phase")
    return [*lines, "not held: token ids, positions, sizes of the model"]


def _check(reader: TraceReader) -> None:
    if "weights" not in reader.columns:
        raise FormatError(f"{reader.folder}: ESFT's text holds weights, which were not recorded")
    if len(set(reader.card.layer_numbers)) < reader.card.n_layers:
        raise FormatError(
            f"{reader.folder}: two layers have the same number; take one stack with traces.do=subset traces.layers=..."
        )


class _Lines:
    """Lines on their way to one file per domain and layer; no file stays open, for there may be thousands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_written = folder, 0
        self._waiting: dict[tuple[str, int], list[str]] = {}

    def add(self, domain: str, layer: int, line: str) -> None:
        self._waiting.setdefault((domain, layer), []).append(line)

    def flush(self) -> None:
        for (domain, layer), lines in self._waiting.items():
            (self.folder / domain).mkdir(exist_ok=True)
            path = self.folder / domain / f"expert_weights_{layer}.txt"
            with path.open("a", newline="\n") as file:
                file.writelines(lines)
            self.n_written += len(lines)
        self._waiting = {}


def folder_names(domains: tuple[str, ...]) -> list[str]:
    """A folder for each: what a file system would take for something else becomes _; no two are the same."""
    names: list[str] = []
    for domain in domains:
        plain = re.sub(r"[^\w.-]", "_", domain).strip(".") or "_"
        while plain in names:
            plain += "_"
        names.append(plain)
    return names


def _write(block: RoutingTrace, names: list[str], files: _Lines) -> None:
    assert block.weights_TLK is not None
    for start, stop in zip(
        block.starts_R.tolist(), [*block.starts_R[1:].tolist(), block.n_tokens], strict=True
    ):
        domain = names[int(block.domain_T[start])]  # -1 is the last
        for layer, number in enumerate(block.card.layer_numbers):
            ids = block.ids_TLK[start:stop, layer].ravel().tolist()
            weights = _texts(block.weights_TLK[start:stop, layer].ravel())
            files.add(domain, number, "\t".join(map(str, ids)) + "\t\t" + "\t".join(weights) + "\n")


def _texts(weights: NDArray[np.float16]) -> list[str]:
    """Five digits tell any two float16 numbers apart."""
    return [f"{weight:.5g}" for weight in weights.tolist()]
