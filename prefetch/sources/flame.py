"""Parquet per layer as the FLAME-MoE traces have it: `actives/iter_<n>/layer_<nn>.parquet`, beside `samples/*.parquet`.

Row i of every layer's file and of the samples, one after the other, is the same token. The files do not say where a
sequence ends. Layout: the data set CMU-FLAME/FLAME-MoE-Traces, its card at 394919b (scores list<float16>[6],
indices list<int16>[6], token_id int32; iterations are checkpoints of one training run, so one is read at a time).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.progress import Progress
from prefetch.sources.columns import Block, open_columns
from prefetch.sources.files import FileSource, used_ids, whole_ids
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import NO_TOKEN, trace_of
from prefetch.trace.writer import TraceWriter

LAYER = re.compile(r"(?:(?:.*/)?iter_(\d+)/|(?:.*/)?)layer_(\d+)\.parquet")
SAMPLES = re.compile(r"(?:.*/)?samples/[^/]+\.parquet")
IDS, WEIGHTS = ("indices", "topk_idx", "topk_ids"), ("scores", "probs", "weights")
BLOCK_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Flame(FileSource):
    """One checkpoint of one model; tokens are cut into requests of `sequence_tokens`."""

    iteration: int | None = None
    sequence_tokens: int = 2048
    max_tokens: int | None = None
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow")

    def __post_init__(self) -> None:
        if self.sequence_tokens < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ConfigError(
                "source.sequence_tokens and source.max_tokens: expected at least 1, got "
                f"{self.sequence_tokens} and {self.max_tokens}"
            )

    def files(self) -> dict[str, Path]:
        """Only what belongs to the iteration: a data set holds eleven of them."""
        found = super().files()
        layers = {name: match for name in found if (match := LAYER.fullmatch(name))}
        if not layers:
            raise FormatError(
                f"{next(iter(found.values()))}: expected files named layer_<nn>.parquet, in folders named iter_<n>"
            )
        iterations = sorted({int(match[1] or -1) for match in layers.values()})
        wanted = self.iteration if self.iteration is not None else iterations[0]
        if wanted not in iterations or (self.iteration is None and len(iterations) > 1):
            raise ConfigError(
                f"source.iteration={self.iteration}: the checkpoints found are {iterations}; pass one of them"
            )
        return {
            name: path
            for name, path in found.items()
            if SAMPLES.fullmatch(name) or (name in layers and int(layers[name][1] or -1) == wanted)
        }

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        files = self.files()
        layers = {int(m[2]): p for name, p in files.items() if (m := LAYER.fullmatch(name))}
        samples = [path for name, path in sorted(files.items()) if SAMPLES.fullmatch(name)]
        if len(layers) + len(samples) != len(files):
            raise FormatError(
                f"{self.path}: two files hold the same layer; pass one model's folder"
            )
        layers = dict(sorted(layers.items()))
        where = _where(layers)
        writer.file(str(where))
        writer.note(
            f"requests are blocks of {self.sequence_tokens} rows: the files do not say where a sequence ends"
        )
        used_E = np.zeros(0, bool)
        if not self.knows_experts:
            blocks = self._layer_blocks(layers, only_ids=True)
            used_E = used_ids((block["ids"] for block in blocks), str(where))
        n_experts = self.experts(used_E, writer, str(where))
        with Progress("reading", self.max_tokens, "tokens") as progress:
            self._read(layers, samples, n_experts, writer, progress)

    def _read(
        self,
        layers: dict[int, Path],
        samples: list[Path],
        n_experts: int,
        writer: TraceWriter,
        progress: Progress,
    ) -> None:
        tokens, card, first = _Tokens(samples), None, 0
        for block in self._layer_blocks(layers):
            with reading(f"{_where(layers)}, rows from {first}", "FLAME-MoE rows"):
                ids_TLK = block["ids"]
                if card is None:
                    card = self._card(tuple(layers), n_experts, ids_TLK.shape[2])
                    writer.begin(card)
                row_T = np.arange(first, first + len(ids_TLK))
                trace = trace_of(
                    card,
                    ids_TLK,
                    request_T=row_T // self.sequence_tokens,
                    position_T=row_T % self.sequence_tokens,
                    token_T=tokens.take(len(row_T)),
                    weights_TLK=block["weights"],
                )
            writer.append(trace)
            progress.advance(len(row_T))
            first += len(row_T)
        if self.max_tokens is None:
            tokens.check_end()

    def _card(self, layers: tuple[int, ...], n_experts: int, top_k: int) -> ModelCard:
        return self.card(
            "FLAME-MoE",
            n_experts=n_experts,
            top_k=top_k,
            layer_numbers=layers,
            revision=None if self.iteration is None else f"iter_{self.iteration:04d}",
        )

    def _layer_blocks(self, layers: dict[int, Path], *, only_ids: bool = False) -> Iterator[Block]:
        """The same rows of all layers, side by side."""
        streams = [_stream(path, only_ids) for path in layers.values()]
        left = self.max_tokens
        while left is None or left > 0:
            parts = [next(stream, {}) for stream in streams]
            rows = {
                p: len(part["ids"]) if part else 0
                for p, part in zip(layers.values(), parts, strict=True)
            }
            if len(set(rows.values())) > 1:
                short = min(rows, key=lambda path: rows[path])
                raise FormatError(f"{short}: has fewer rows than the other layers' files")
            n = next(iter(rows.values()))
            if n == 0:
                return
            with reading(_where(layers), "the same k in every layer"):
                block = {
                    key: np.stack([part[key][:left] for part in parts], axis=1) for key in parts[0]
                }
            yield block
            left = None if left is None else left - n


def _where(layers: dict[int, Path]) -> Path:
    path = next(iter(layers.values()))
    return path if len(layers) == 1 else path.parent


def _stream(path: Path, only_ids: bool) -> Iterator[Block]:
    columns = open_columns(path)
    wanted = {"ids": IDS} if only_ids else {"ids": IDS, "weights": WEIGHTS}
    names: dict[str, str] = {}
    for ours, theirs in wanted.items():
        found = [name for name in theirs if name in columns.names]
        if not found:
            raise FormatError(
                f"{path}: expected a column {' or '.join(theirs)}, found {columns.names}"
            )
        names[ours] = found[0]
    for block in columns.blocks(list(names.values()), BLOCK_ROWS):
        with reading(path, "expert ids"):
            ids = whole_ids(block[names["ids"]], "token, choice")
        yield {ours: block[theirs] for ours, theirs in names.items()} | {"ids": ids}


class _Tokens:
    """The token numbers of the samples' files, one after the other; none where there are no such files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.waiting: NDArray[Any] = np.zeros(0, np.int32)
        self.blocks = (
            block["token_id"]
            for path in paths
            for block in open_columns(path).blocks(["token_id"], BLOCK_ROWS)
        )

    def take(self, rows: int) -> NDArray[Any] | int:
        if not self.paths:
            return NO_TOKEN
        while len(self.waiting) < rows:
            block = next(self.blocks, None)
            if block is None:
                raise FormatError(f"{self.paths[-1]}: the samples have fewer rows than the layers")
            self.waiting = np.append(self.waiting, block)
        taken, self.waiting = self.waiting[:rows], self.waiting[rows:]
        return taken

    def check_end(self) -> None:
        if len(self.waiting) or next(self.blocks, None) is not None:
            raise FormatError(f"{self.paths[-1]}: the samples have more rows than the layers")
