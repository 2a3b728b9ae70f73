"""`layer,expert` rows, one per routed activation (ggml-org/llama.cpp PR 28544, MOE_TRACE_OUT).

The file has no token boundary: tokens are groups of top_k rows of one layer, which is why top_k must be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.files import UNNAMED, FileSource, domain_of
from prefetch.sources.llama_passes import CUT, REQUESTS, Log, passes, trace_of_log
from prefetch.sources.textscan import parse_rows, read_text, whole
from prefetch.trace.writer import TraceWriter

HEADER = "layer,expert"


@dataclass(frozen=True, kw_only=True)
class LlamaCsv(FileSource):
    """Passes and requests are put together as in the server's log."""

    top_k: int | None = None
    ubatch: int = 512
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".csv.gz")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        if self.top_k is None or self.top_k < 1:
            raise ConfigError(
                f"source.top_k={self.top_k}: must be given (at least 1), since the file has no token boundary"
            )
        logs = {name: read_log(path, self.top_k) for name, path in self.files().items()}
        used_E = np.zeros(2**16, bool)
        for log in logs.values():
            used_E[log.ids_RK] = True
        where = ", ".join(str(log.path) for log in logs.values())
        n_experts = self.experts(used_E, writer, where)
        for name, log in logs.items():
            writer.file(str(log.path))
            domain = domain_of(name)
            card = self.card(
                UNNAMED, n_experts=n_experts, top_k=self.top_k, layer_numbers=log.layers
            )
            writer.begin(card)
            writer.drop(CUT, log.n_cut)
            writer.note(REQUESTS)
            writer.append(trace_of_log(log, card, domain=domain, ubatch=self.ubatch))


def read_log(path: Path, top_k: int) -> Log:
    rows = parse_rows(path, read_text(path))
    for line, text in rows.others:
        if text != HEADER:
            raise FormatError(
                f"{path}, line {line}: expected {HEADER!r} or rows, got {text[:80]!r}"
            )
    chosen = ~rows.named_R
    sizes = rows.sizes_R
    if not len(sizes) or (sizes != 2).any():
        line = rows.lines_R[int((sizes != 2).argmax())] if len(sizes) else 1
        raise FormatError(f"{path}, line {line}: expected two numbers, layer and expert")
    values = whole(path, rows, rows.block(chosen, 2), 2**16 - 1, "layer and expert", chosen)
    layer, expert, line_R = values[:, 0], values[:, 1], rows.lines_R
    starts = np.flatnonzero(np.diff(layer, prepend=-1))
    sizes = np.diff(np.append(starts, len(layer)))
    odd = np.flatnonzero(sizes % top_k)
    if len(odd) and (odd[0] < len(sizes) - 1 or len(sizes) == 1):
        raise FormatError(
            f"{path}, line {line_R[starts[odd[0]]]}: {sizes[odd[0]]} rows of layer {layer[starts[odd[0]]]} are no "
            f"multiple of source.top_k={top_k}"
        )
    n_rows = len(layer) - (int(sizes[-1]) % top_k)  # a program that was stopped leaves half a row
    is_cut = rows.is_cut or n_rows < len(layer)
    ids_RK = expert[:n_rows].reshape(-1, top_k)
    return passes(path, layer[:n_rows:top_k], ids_RK, None, line_R[:n_rows:top_k], is_cut)
