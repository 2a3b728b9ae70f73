"""The expert log of llama-server forks (okuvshynov/llama.cpp, branch log_experts; env variant LLAMA_MOE_LOG).

A log holds runs of rows per layer, and no token index, no request and no weight: passes are put together from
ascending layers. These loggers read a strided view as if it were dense, so prompts are often wrong; see `_judge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.files import UNNAMED, FileSource, domain_of
from prefetch.sources.llama_passes import CUT, REQUESTS, Log, ids_of, passes, trace_of_log
from prefetch.sources.textscan import Rows, parse_rows, read_text, whole
from prefetch.trace.checks import LOG_CHANCE, log_chance_of_uniformity, permuted_windows
from prefetch.trace.writer import TraceWriter

HEADERS = {"layer_id,expert_ids": 1, "Layer,Token,ExpertIDs,ExpertWeights": 2}
GATE = "gate_input"
STRIDE = "rows of passes logged with a wrong stride"


@dataclass(frozen=True, kw_only=True)
class LlamaServer(FileSource):
    """A pass of several tokens is a prompt and starts a request; passes of one token are its decode."""

    gate_inputs: bool = False
    corrupted: str = "refuse"
    ubatch: int = 512
    one_request: bool = False
    suffixes: ClassVar[tuple[str, ...]] = (".log", ".log.gz", ".csv", ".txt")

    def __post_init__(self) -> None:
        if self.corrupted not in ("refuse", "drop"):
            raise ConfigError(f"corrupted: expected refuse or drop, got {self.corrupted!r}")
        if self.ubatch < 1:
            raise ConfigError(f"ubatch: expected at least 1, got {self.ubatch}")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        logs = {name: self._read(path) for name, path in self.files().items()}
        used_E = np.zeros(2**16, bool)
        for _, log in logs.values():
            used_E[log.ids_RK] = True
        where = ", ".join(str(log.path) for _, log in logs.values())
        n_experts = self.experts(used_E, writer, where)
        for name, (rows, log) in logs.items():
            self._write(writer, name, rows, log, n_experts)

    def _read(self, path: Path) -> tuple[Rows, Log]:
        rows = parse_rows(path, read_text(path), word=GATE)
        for line, text in rows.others:
            if text not in HEADERS and not text.startswith("=== MoE"):
                raise FormatError(
                    f"{path}, line {line}: expected the header {' or '.join(HEADERS)}, rows `layer,ids` or "
                    f"{GATE} lines, got {text[:80]!r}"
                )
        texts = [text for _, text in rows.others]
        before = (
            HEADERS["Layer,Token,ExpertIDs,ExpertWeights"]
            if any(t.startswith("Layer,") for t in texts)
            else 1
        )
        return rows, read_log(path, rows, numbers_before=before)

    def _write(self, writer: TraceWriter, name: str, rows: Rows, log: Log, n_experts: int) -> None:
        writer.file(str(log.path))
        top_k, domain = log.ids_RK.shape[1], domain_of(name)
        card = self.card(UNNAMED, n_experts=n_experts, top_k=top_k, layer_numbers=log.layers)
        writer.begin(card)
        keep_T = self._judge(log, ids_of(log, n_experts), n_experts)[log.pass_T]
        trace = trace_of_log(
            log,
            card,
            domain=domain,
            ubatch=self.ubatch,
            one_request=self.one_request,
            gate_inputs_TLD=self._gate_inputs(writer, rows, log),
        )
        writer.drop(CUT, log.n_cut)
        writer.drop(STRIDE, int((~keep_T).sum()))
        writer.note(REQUESTS)
        if len(log.layers) == 1:
            writer.note(
                "one layer only: passes cannot be told apart, all rows are taken as one prompt"
            )
        writer.append(trace.rows(keep_T))

    def _judge(self, log: Log, ids_TLK: NDArray[Any], n_experts: int) -> NDArray[np.bool_]:
        """Which passes to keep. A logger that ignores the stride writes every pass of several tokens wrongly."""
        keep_P = np.ones(len(log.tokens_P), bool)
        prompts = np.flatnonzero(log.tokens_P > 1)
        full = ids_TLK[:, : max(1, len(log.layers) - 1)]  # the last layer may lack rows
        parts = {p: full[first : first + n] for p, first, n in self._spans(log, prompts)}
        chances = {p: log_chance_of_uniformity(part, n_experts) for p, part in parts.items()}
        is_bad = min(chances.values(), default=0.0) < LOG_CHANCE or (
            max(chances.values(), default=0.0) < 0 and sum(chances.values()) < LOG_CHANCE
        )
        if not is_bad:
            return keep_P
        worst = min(chances, key=chances.__getitem__)
        if self.corrupted == "refuse":
            permuted_L, windows = permuted_windows(parts[worst], n_experts)
            lines = log.line_R[log.pass_R == worst]
            raise FormatError(
                f"{log.path}, lines {lines[0]} to {lines[-1]}: {int(permuted_L.max())} of {windows} blocks of "
                f"{min(n_experts, parts[worst].shape[0] * parts[worst].shape[2])} choices name every expert at most "
                "once, which no router does: this logger ignores the stride of the top-k view, so every pass of "
                f"several tokens is wrong ({len(prompts)} of {len(keep_P)} passes); record again with a fixed logger, "
                "or pass source.corrupted=drop to keep the passes of one token"
            )
        keep_P[prompts] = False
        return keep_P

    @staticmethod
    def _spans(log: Log, passes: NDArray[Any]) -> list[tuple[int, int, int]]:
        first_P = log.first_token_P
        return [(int(p), int(first_P[p]), int(log.tokens_P[p])) for p in passes]

    def _gate_inputs(self, writer: TraceWriter, rows: Rows, log: Log) -> NDArray[np.float16] | None:
        """[T, L, D] from the gate_input lines, where every token and layer has one."""
        n_lines, n_tokens = int(rows.named_R.sum()), int(log.tokens_P.sum())
        if not self.gate_inputs:
            if n_lines:
                writer.note("gate_input lines were skipped; source.gate_inputs=true keeps them")
            return None
        wanted = n_tokens * len(log.layers)
        sizes = rows.sizes_R[rows.named_R]
        if not n_lines or len(set(sizes.tolist())) != 1:
            raise FormatError(
                f"{log.path}: source.gate_inputs=true needs gate_input lines of one width"
            )
        values = rows.block(rows.named_R, int(sizes[0]))
        layer_G = whole(log.path, rows, values[:, 0], 2**16, "a layer", rows.named_R)
        index_G = whole(log.path, rows, values[:, 1], 2**24, "a token of the pass", rows.named_R)
        # a line belongs to the pass of the last selection row, unless that pass is beyond its layer already
        before_G = np.searchsorted(log.line_R, rows.lines_R[rows.named_R]) - 1
        pass_G = np.where(before_G < 0, 0, log.pass_R[np.maximum(before_G, 0)])
        pass_G += (before_G >= 0) & (log.layer_R[np.maximum(before_G, 0)] > layer_G)
        known = np.isin(layer_G, log.layers) & (pass_G < len(log.tokens_P))
        if log.cut_line is not None:  # what belongs to the pass that was cut off
            known &= rows.lines_R[rows.named_R] < log.cut_line
        known &= index_G < log.tokens_P[np.minimum(pass_G, len(log.tokens_P) - 1)]
        gates = np.full((n_tokens, len(log.layers), values.shape[1] - 2), np.nan, np.float16)
        token_G = log.first_token_P[pass_G[known]] + index_G[known]
        slot_G = np.searchsorted(log.layers, layer_G[known])
        if len(np.unique(token_G * len(log.layers) + slot_G)) < len(token_G):
            raise FormatError(f"{log.path}: some token has two gate_input lines of one layer")
        gates[token_G, slot_G] = values[known, 2:]
        missing = int(np.isnan(gates[:, :, 0]).sum())
        if missing:
            raise FormatError(
                f"{log.path}: source.gate_inputs=true needs a gate_input line for each of {wanted} tokens and layers; "
                f"{missing} have none (log all layers, or leave the option out)"
            )
        return gates


def read_log(path: Path, rows: Rows, *, numbers_before: int = 1) -> Log:
    """Selection rows and passes: a pass is a run of rows for each layer, in ascending layers."""
    chosen = ~rows.named_R
    sizes = rows.sizes_R[chosen]
    if not len(sizes):
        raise FormatError(f"{path}: expected rows `layer,ids`, found none")
    width = int(sizes[0])
    if (sizes != width).any() or width <= numbers_before:
        row = int((sizes != width).argmax())
        raise FormatError(
            f"{path}, line {rows.lines_R[chosen][row]}: expected {width - numbers_before} ids as in the first row, "
            f"found {sizes[row] - numbers_before}"
        )
    values = rows.block(chosen, width)
    n_ids = width - numbers_before
    weights = None
    if numbers_before == 2:  # the variant with a token index and weights
        if n_ids % 2:
            raise FormatError(
                f"{path}, line {rows.lines_R[chosen][0]}: expected as many weights as ids, found {n_ids} numbers"
            )
        n_ids //= 2
        weights = values[:, 2 + n_ids :]
    layer_R = whole(path, rows, values[:, 0], 2**16, "a layer", chosen)
    ids_RK = whole(
        path,
        rows,
        values[:, numbers_before : numbers_before + n_ids],
        2**16 - 1,
        "expert ids",
        chosen,
    )
    return passes(path, layer_R, ids_RK, weights, rows.lines_R[chosen], rows.is_cut)
