"""Forward passes of a batching server, as SGLang's per-token recorder saves them, tied together into requests.

A record names no requests. It has the positions of its rows, how many rows each prefilled request contributed, and
the batch keeps its order; a row that could continue two requests is refused rather than guessed.
T rows, L layers of the model (MoE ones are kept), K choices, P physical experts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.trace.routing import DECODE, PREFILL
from prefetch.zipped import check_stored

EXTEND, DECODE_PASS, MIXED, IDLE = 1, 2, 3, 4  # sglang's ForwardMode
MOST_EXPERTS = 2**15


@dataclass(frozen=True)
class Recording:
    """One file: whole requests one after the other. `arguments` are those of `trace_of`."""

    path: Path
    layer_numbers: tuple[int, ...]
    ids_TLK: NDArray[np.int16]
    arguments: dict[str, Any]
    map_LP: NDArray[np.int64] | None  # of every layer of the model, where the file has it
    first_pass: str  # digest: files of two ranks that hold copies have the same

    def translated(self, map_LP: NDArray[np.int64]) -> Recording:
        return replace(self, ids_TLK=translate(self.ids_TLK, map_LP, self.layer_numbers))


def translate(
    ids_TLK: NDArray[Any], map_LP: NDArray[np.int64], layers: Iterable[int]
) -> NDArray[np.int16]:
    """Physical experts to logical ones, layer by layer; -1 stays."""
    rows = list(layers)
    if max(rows) >= len(map_LP) or (ids_TLK.size and int(ids_TLK.max()) >= map_LP.shape[1]):
        raise FormatError(
            f"physical_to_logical: has {list(map_LP.shape)} [layer, physical expert], the recording goes up to layer "
            f"{max(rows)}, expert {ids_TLK.max()}"
        )
    logical = map_LP[np.array(rows)[None, :, None], ids_TLK.clip(min=0)]
    return np.where(ids_TLK < 0, -1, logical).astype(np.int16)


def read_recording(path: Path) -> Recording:
    import torch

    with reading(path, "a file of SGLang's per-token recorder"):
        if not path.stat().st_size:
            raise FormatError(f"{path}: the file is empty")
        with path.open("rb") as file:
            check_stored(file)
        about = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(about, dict) or "records" not in about:
            raise FormatError(
                f"{path}: expected a dictionary with records, found {sorted(about)[:5]}; a recording of mode stat has "
                "counts only: record with mode per_token"
            )
        records = sorted(about["records"], key=lambda record: record["forward_pass_id"])
        records = [record for record in records if record["input_ids"]]
        if not records:
            raise FormatError(f"{path}: every recorded pass is empty")
        own_map = about.get("last_physical_to_logical_map")
        map_LP = None if own_map is None else np.asarray(own_map, np.int64)
        ids_TLK, layers = _ids(records)
        columns = _columns(records)
        order = np.argsort(columns["request_T"], kind="stable")
        arguments = {name: column[order] for name, column in columns.items()}
        return Recording(path, layers, ids_TLK[order], arguments, map_LP, _digest(records[0]))


def _columns(records: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """The arguments of `trace_of`, pass after pass."""
    ties = Ties()
    tied = [ties.tie(record) for record in records]
    return {
        "request_T": np.concatenate([request_T for request_T, _ in tied]),
        "phase_T": np.concatenate([phase_T for _, phase_T in tied]),
        "position_T": np.concatenate([record["positions"] for record in records]),
        "token_T": np.concatenate([record["input_ids"] for record in records]),
    }


def _ids(records: list[dict[str, Any]]) -> tuple[NDArray[np.int16], tuple[int, ...]]:
    """The rows of all passes, without dense layers and without the padding beyond k."""
    parts = []
    for record in records:
        ids_LTK = record["topk_ids_of_layer"].numpy()
        if ids_LTK.ndim != 3 or ids_LTK.shape[1] != len(record["input_ids"]):
            raise FormatError(
                f"pass {record['forward_pass_id']}: expected topk_ids_of_layer [layer, {len(record['input_ids'])}, k], "
                f"found {list(ids_LTK.shape)}"
            )
        if ids_LTK.size and not -1 <= int(ids_LTK.min()) <= int(ids_LTK.max()) < MOST_EXPERTS:
            raise FormatError(
                f"pass {record['forward_pass_id']}: expert id {ids_LTK.max()} is out of range"
            )
        parts.append(ids_LTK.transpose(1, 0, 2).astype(np.int16))
    ids_TLK = np.concatenate(parts)
    layers = np.flatnonzero((ids_TLK >= 0).any(axis=(0, 2)))
    slots = np.flatnonzero((ids_TLK >= 0).any(axis=(0, 1)))
    if not len(layers):
        raise FormatError("no pass chose any expert")
    return ids_TLK[:, layers, : slots[-1] + 1], tuple(layers.tolist())


class Ties:
    """Which request every row belongs to, pass by pass.

    A running request has a row in every decode pass, so one that has none is over. Only the request that was
    prefilled last may be unfinished (a chunk); then its next rows begin where it stopped.
    """

    def __init__(self) -> None:
        self.running: list[tuple[int, int]] = []  # (request, next position), as in the batch
        self.chunk: tuple[int, int] | None = None
        self.n_requests = 0

    def tie(self, record: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """(request_T, phase_T) of one pass."""
        mode, positions = record["forward_mode"], record["positions"]
        lengths = record["extend_seq_lens"] if mode in (EXTEND, MIXED) else [1] * len(positions)
        where = f"pass {record['forward_pass_id']}"
        if mode not in (EXTEND, DECODE_PASS, MIXED):
            raise FormatError(
                f"{where}: forward_mode {mode} (speculative decoding?) is not read; record without it"
            )
        if not sum(lengths) == len(positions) == len(record["input_ids"]):
            raise FormatError(
                f"{where}: expected {len(record['input_ids'])} rows, got {len(positions)} positions and requests of "
                f"{sum(lengths)} rows"
            )
        starts = [positions[at] for at in np.cumsum([0, *lengths[:-1]])]
        due = {position for _, position in self.running}
        is_decode = [
            mode == DECODE_PASS or (mode == MIXED and n == 1 and start in due)
            for start, n in zip(starts, lengths, strict=True)
        ]
        decoded = self._decoded(
            [s for s, d in zip(starts, is_decode, strict=True) if d], where, any(is_decode)
        )
        requests = [
            next(decoded) if decodes else self._prefilled(start, n)
            for start, n, decodes in zip(starts, lengths, is_decode, strict=True)
        ]
        phases = np.where(is_decode, DECODE, PREFILL).astype(np.uint8)
        return np.repeat(requests, lengths), np.repeat(phases, lengths)

    def _decoded(self, positions: list[int], where: str, any_decodes: bool) -> Any:
        """The requests of a pass's decode rows; whoever has no row is over."""
        waiting: dict[int, list[int]] = {}
        for request, position in self.running:
            waiting.setdefault(position, []).append(request)
        for position, rows in Counter(positions).items():
            if len(waiting.get(position, [])) > rows:
                raise FormatError(
                    f"{where}: {rows} rows at position {position} could continue requests {waiting[position]}; record "
                    "with --max-running-requests 1, or use return_routed_experts, which names its request"
                )
        requests = [waiting[p].pop(0) if waiting.get(p) else self._new() for p in positions]
        if any_decodes:
            self.running = [
                (request, p + 1) for request, p in zip(requests, positions, strict=True)
            ]
            if self.chunk is not None and self.chunk[0] in requests:
                self.chunk = (
                    None  # it decodes, so its prompt is whole: a prefill there is another's
                )
        return iter(requests)

    def _prefilled(self, start: int, length: int) -> int:
        is_next = self.chunk is not None and start > 0 and self.chunk[1] == start
        request = self.chunk[0] if is_next and self.chunk else self._new()
        self.chunk = (request, start + length)
        self.running = [pair for pair in self.running if pair[0] != request] + [self.chunk]
        return request

    def _new(self) -> int:
        self.n_requests += 1
        return self.n_requests - 1


def check_ranks(recordings: list[Recording]) -> None:
    """Tensor-parallel ranks record the same tokens: two of their files are one recording twice."""
    seen: dict[str, Path] = {}
    for recording in recordings:
        twin = seen.setdefault(recording.first_pass, recording.path)
        if twin != recording.path:
            raise FormatError(
                f"{recording.path}: begins with the same pass as {twin.name}: ranks that hold copies; pass one file"
            )


def _digest(record: dict[str, Any]) -> str:
    text = repr((record["forward_pass_id"], record["positions"], record["input_ids"]))
    return hashlib.sha256(text.encode()).hexdigest()
