"""Routing that somebody saved as arrays: npz, npy, safetensors, or Parquet with `expert_ids` [T, L, k].

Array names are options with the usual aliases. It knows nothing of the tool that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.progress import Progress
from prefetch.sources.columns import Block, Columns, open_columns
from prefetch.sources.files import UNNAMED, FileSource, Requests, domain_of, used_ids, whole_ids
from prefetch.trace.routing import PHASES, trace_of
from prefetch.trace.writer import TraceWriter

ALIASES = {
    "expert_ids": (
        "topk_indices",
        "indices",
        "ids",
        "topk_ids",
        "selected_experts",
        "routed_experts",
        "experts",
    ),
    "weights": ("gate_weights", "topk_weights", "expert_weights", "routing_weights"),
    "request": ("seq_id", "request_id", "sequence", "sample_id", "seq"),
    "position": ("pos", "positions", "token_idx", "token_index"),
    "phase": (),
    "token": ("token_id", "token_ids", "input_ids"),
    "layer_ids": ("layers", "layer_numbers"),
    "domain": ("dataset_name",),
}
BLOCK_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Arrays(FileSource):
    """One file or many; every file numbers its own requests. Without a request column a file is one request."""

    names: dict[str, str | None] = field(default_factory=dict)
    default_phase: str = "prefill"
    no_expert: int = -1
    top_k: int | None = None
    suffixes: ClassVar[tuple[str, ...]] = (".npz", ".npy", ".safetensors", ".parquet")
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow", "safetensors")

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - set(ALIASES)):
            raise ConfigError(f"source.names: {unknown} are not among {sorted(ALIASES)}")
        if self.default_phase not in PHASES:
            raise ConfigError(
                f"source.default_phase: expected one of {PHASES}, got {self.default_phase!r}"
            )

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        files = self.files()
        used_E, where = np.zeros(0, bool), ", ".join(map(str, files.values()))
        if not self.knows_experts:
            blocks = (
                block["expert_ids"]
                for path in files.values()
                for block in self._blocks(open_columns(path), only_ids=True)
            )
            used_E = used_ids(blocks, where)
        n_experts = self.experts(used_E, writer, where)
        with Progress("reading", None, "tokens") as progress:
            for name, path in files.items():
                writer.file(str(path))
                self._read(open_columns(path), domain_of(name), n_experts, writer, progress)

    def _read(
        self,
        columns: Columns,
        domain: str,
        n_experts: int,
        writer: TraceWriter,
        progress: Progress,
    ) -> None:
        requests, card, first = Requests(), None, 0
        found = self._found(columns)
        if long := sorted({"layer", "layer_id"} & set(columns.names)):
            raise FormatError(
                f"{columns.path}: a column {long[0]} means one row per token and layer; expected one row per token: "
                "reshape to [token, layer, choice]"
            )
        if "phase" not in found:
            writer.note(f"no phase in the file: every row taken as {self.default_phase}")
        if unread := sorted(set(columns.names) - set(found.values())):
            writer.note(f"not read: {', '.join(unread)}")
        for block in self._blocks(columns):
            with reading(f"{columns.path}, rows from {first}", "columns of a trace"):
                ids_TLK = block.pop("expert_ids")
                if card is None:
                    numbers = self._layer_numbers(columns, ids_TLK.shape)
                    card = self.card(
                        UNNAMED,
                        n_experts=n_experts,
                        top_k=ids_TLK.shape[2],
                        layer_numbers=numbers,
                    )
                    writer.begin(card)
                domains = block.pop("domain", None)
                rest = _of_trace(block, ids_TLK.shape, requests, self.default_phase)
                trace = trace_of(card, ids_TLK, domain=domain, **rest)
                if domains is not None:
                    names, codes = np.unique(domains.astype(str), return_inverse=True)
                    trace = replace(
                        trace, domains=tuple(names.tolist()), domain_T=codes.astype(np.int32)
                    )
                starts_late = first == 0 and int(trace.position_T[0]) > 0
                if "phase" not in found and self.default_phase == "prefill" and starts_late:
                    writer.note(
                        "positions start above 0: if these are generated tokens, pass source.default_phase=decode"
                    )
            writer.append(trace)
            progress.advance(trace.n_tokens)
            first += trace.n_tokens

    def _blocks(self, columns: Columns, *, only_ids: bool = False) -> Iterator[Block]:
        """Blocks under our names; ids as int32 with -1 for no expert."""
        found = self._found(columns)
        found.pop("layer_ids", None)
        wanted = {"expert_ids": found["expert_ids"]} if only_ids else found
        for read in columns.blocks(list(wanted.values()), BLOCK_ROWS):
            block = {ours: read[theirs] for ours, theirs in wanted.items()}
            with reading(columns.path, "expert ids"):
                block["expert_ids"] = self._ids(block["expert_ids"])
            yield block

    def _ids(self, ids: NDArray[Any]) -> NDArray[np.int32]:
        if ids.ndim == 2 and self.top_k and ids.shape[1] % self.top_k == 0:
            ids = ids.reshape(len(ids), -1, self.top_k)
        if ids.ndim == 2:
            raise FormatError(
                f"expert_ids: expected [token, layer, choice], found {list(ids.shape)}; if it is a flat "
                "[token, layer * choice], pass source.top_k=..."
            )
        narrow = whole_ids(ids, "token, layer, choice")
        if self.no_expert != -1:
            narrow[narrow == self.no_expert] = -1
        return narrow

    def _found(self, columns: Columns) -> dict[str, str]:
        """Our name -> the file's, of everything that it has."""
        found = {}
        for ours, aliases in ALIASES.items():
            own = self.names.get(ours)
            wanted = (own,) if own else (ours, *aliases)
            theirs = [name for name in wanted if name in columns.names]
            if not theirs and (own or ours == "expert_ids"):
                raise FormatError(
                    f"{columns.path}: expected an array named {' or '.join(wanted)}, found "
                    f"{', '.join(columns.names)}; pass source.names.{ours}=NAME"
                )
            if theirs:
                found[ours] = theirs[0]
        return found

    def _layer_numbers(self, columns: Columns, shape: tuple[int, ...]) -> tuple[int, ...]:
        theirs, n_layers = self._found(columns).get("layer_ids"), shape[1]
        if theirs is None:
            if self.model_card is None and n_layers > max(256, 4 * shape[0]):
                raise FormatError(
                    f"expert_ids: {shape[0]} tokens of {n_layers} layers look transposed; expected [token, layer, "
                    "choice]; if they are right, add an array layer_ids or pass source.model_card=..."
                )
            return tuple(range(n_layers))
        numbers = columns.whole(theirs)
        if numbers.ndim == 2 and len(numbers):  # Parquet repeats them in every row
            numbers = numbers[0]
        if numbers.shape != (n_layers,):
            raise FormatError(
                f"{theirs}: expected {n_layers} layer numbers, found shape {list(numbers.shape)}"
            )
        return tuple(int(number) for number in numbers)


def _of_trace(
    block: Block, shape: tuple[int, ...], requests: Requests, default_phase: str
) -> dict[str, Any]:
    """The arguments of `trace_of` that the other columns give."""
    for name, kinds in (("position", "iu"), ("token", "iu"), ("weights", "f")):
        if name in block and block[name].dtype.kind not in kinds:
            kind = "fractions" if kinds == "f" else "whole numbers"
            raise FormatError(f"{name}: expected {kind}, found {block[name].dtype}")
    request_T, position_T = requests.number(block.get("request", np.zeros(shape[0], np.int32)))
    rest: dict[str, Any] = {"request_T": request_T, "position_T": block.get("position", position_T)}
    rest["phase_T"] = _phases(block["phase"]) if "phase" in block else PHASES.index(default_phase)
    if "token" in block:
        rest["token_T"] = block["token"]
    if "weights" in block:
        weights = block["weights"]
        is_flat = weights.shape == (shape[0], shape[1] * shape[2])
        rest["weights_TLK"] = weights.reshape(shape) if is_flat else weights
    return rest


def _phases(phase_T: NDArray[Any]) -> NDArray[np.uint8]:
    """0 and 1, or the words."""
    known = {name: i for i, name in enumerate(PHASES)} | {str(i): i for i in range(len(PHASES))}
    words, word_T = np.unique(phase_T.astype(str), return_inverse=True)
    if unknown := sorted(set(words.tolist()) - set(known)):
        raise FormatError(f"phase: expected {sorted(known)}, found {unknown[:5]}")
    return np.array([known[word] for word in words.tolist()], np.uint8)[word_T]
