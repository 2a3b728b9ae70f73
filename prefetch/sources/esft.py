"""Text per layer as the ESFT repository writes it: `<task>/expert_weights_<layer>.txt`, one line per sequence.

A line holds all expert ids of the sequence, k per token, two tabs, and as many weights. Line i of every layer's file
is the same sequence. It knows no model: k is an option. Format: deepseek-ai/ESFT at 579a771, `results/expert_scores`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.sources.files import UNNAMED, FileSource, used_ids
from prefetch.sources.textscan import parse_rows, read_text, whole
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter

LAYER = re.compile(r"expert_weights_(\d+)\.txt(\.gz)?")
MOST_EXPERTS = 65535


@dataclass(frozen=True)
class Layer:
    """One file: S sequences of `tokens_S` tokens."""

    path: Path
    number: int
    ids_TK: NDArray[np.uint16]
    weights_TK: NDArray[np.float16]
    tokens_S: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Esft(FileSource):
    """A folder of such files is one task; its name is the domain."""

    top_k: int = 6
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".txt.gz")

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"source.top_k: expected at least 1, got {self.top_k}")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        tasks: dict[str, list[tuple[int, Path]]] = {}
        for name, path in self.files().items():
            if not (found := LAYER.fullmatch(Path(name).name)):
                raise FormatError(
                    f"{path}: expected a file named expert_weights_<layer>.txt or .txt.gz"
                )
            tasks.setdefault(Path(name).parent.name, []).append((int(found[1]), path))
        writer.note("phase: whole sequences in one pass, taken as prefill")
        n_experts = self.n_experts
        for task, files in tasks.items():
            layers = [self._layer(number, path) for number, path in sorted(files)]
            check_aligned(layers)
            if n_experts is None:  # the first task tells; the ids of the others must fit
                where = str(files[0][1].parent)
                used_E = used_ids((layer.ids_TK for layer in layers), where)
                n_experts = self.experts(used_E, writer, where)
            self._write(task or self._task(), layers, n_experts, writer)

    def _task(self) -> str:
        """The name of the task's own folder, where source.path is that folder or the files in it."""
        return next(iter(self.files().values())).resolve().parent.name

    def settings(self) -> dict[str, Any]:
        alone = any(Path(name).parent.name == "" for name in self.files())
        return {**super().settings(), "task": self._task() if alone else None}

    def _layer(self, number: int, path: Path) -> Layer:
        with reading(path, "an ESFT file"):
            data = read_text(path)
            if data[-1] != ord("\n"):
                raise FormatError(f"{path}: the last line has no end: the file was cut off")
            rows = parse_rows(path, data)
            sizes = rows.sizes_R
            if rows.others or not len(sizes):
                line = rows.others[0] if rows.others else (1, "nothing")
                raise FormatError(
                    f"{path}, line {line[0]}: expected ids and weights, got {line[1]!r}"
                )
            self._check_sizes(path, sizes, rows.lines_R)
            is_id = np.arange(len(rows.values_N)) < np.repeat(
                rows.starts_R[:-1] + sizes // 2, sizes
            )
            line_T = np.repeat(np.arange(len(sizes)), sizes // 2 // self.top_k)
            found_TK = rows.values_N[is_id].reshape(-1, self.top_k)
            ids_TK = whole(path, rows, found_TK, MOST_EXPERTS, "expert ids", line_T)
            weights_TK = rows.values_N[~is_id].reshape(-1, self.top_k)
            return Layer(
                path,
                number,
                ids_TK.astype(np.uint16),
                weights_TK.astype(np.float16),
                sizes // 2 // self.top_k,
            )

    def _check_sizes(self, path: Path, sizes: NDArray[np.int64], lines: NDArray[np.int64]) -> None:
        bad = sizes % (2 * self.top_k) != 0
        if bad.any():
            row = int(bad.argmax())
            raise FormatError(
                f"{path}, line {lines[row]}: expected {self.top_k} ids and {self.top_k} weights per token, got "
                f"{sizes[row]} numbers; if k differs, pass source.top_k=..."
            )

    def _write(self, task: str, layers: list[Layer], n_experts: int, writer: TraceWriter) -> None:
        path = layers[0].path if len(layers) == 1 else layers[0].path.parent
        writer.file(str(path))
        card = self.card(
            UNNAMED,
            n_experts=n_experts,
            top_k=self.top_k,
            layer_numbers=tuple(layer.number for layer in layers),
        )
        writer.begin(card)
        tokens_S = layers[0].tokens_S
        with reading(path, "routing"):
            trace = trace_of(
                card,
                np.stack([layer.ids_TK for layer in layers], axis=1).astype(np.int32),
                request_T=np.repeat(np.arange(len(tokens_S)), tokens_S),
                domain=task,
                weights_TLK=np.stack([layer.weights_TK for layer in layers], axis=1),
            )
        writer.append(trace)


def check_aligned(layers: list[Layer]) -> None:
    """Every layer's file holds the same sequences."""
    first = layers[0]
    for layer in layers[1:]:
        if len(layer.tokens_S) != len(first.tokens_S):
            raise FormatError(
                f"{layer.path}: expected {len(first.tokens_S)} lines as in {first.path.name}, got "
                f"{len(layer.tokens_S)}"
            )
        if (different := layer.tokens_S != first.tokens_S).any():
            line = int(different.argmax())
            raise FormatError(
                f"{layer.path}, line {line + 1}: expected {first.tokens_S[line]} tokens as in {first.path.name}, "
                f"got {layer.tokens_S[line]}"
            )
