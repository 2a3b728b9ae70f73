"""The stdout of llama-eval-callback: tensors `ffn_moe_topk-N` printed as nested rows.

The program prints the first and last three of more than six entries: such a dump lacks ids and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.sources.files import UNNAMED, FileSource, domain_of
from prefetch.sources.llama_passes import CUT, REQUESTS, Log, passes, trace_of_log
from prefetch.sources.textscan import read_text
from prefetch.trace.writer import TraceWriter

# e.g. `ggml_debug:  ffn_moe_topk-3 = (i32)  VIEW(ffn_moe_argsort-3{64, 5, 1, 1}, }) = {6, 5, 1, 1}`
HEAD = re.compile(
    r"^\S+:\s+ffn_moe_(topk|weights|weights_norm)-(\d+) = \((\w+)\)(.*)= \{(\d+), (\d+), (\d+), (\d+)\}\s*$",
    re.MULTILINE,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
EXPERTS = re.compile(r"ffn_moe_argsort-\d+\{(\d+),")


@dataclass(frozen=True, kw_only=True)
class LlamaEvalCallback(FileSource):
    """Passes and requests are put together as in the server's log."""

    ubatch: int = 512
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".log", ".txt.gz", ".log.gz")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        dumps = {name: read_dump(path) for name, path in self.files().items()}
        stated = {n for _, n in dumps.values() if n}
        if len(stated) > 1:
            raise FormatError(
                f"source.path: the files have different numbers of experts {sorted(stated)}"
            )
        used_E = np.zeros(2**16, bool)
        for log, _ in dumps.values():
            used_E[log.ids_RK] = True
        where = ", ".join(str(log.path) for log, _ in dumps.values())
        n_experts = stated.pop() if stated else self.experts(used_E, writer, where)
        for name, (log, _) in dumps.items():
            writer.file(str(log.path))
            domain, top_k = domain_of(name), log.ids_RK.shape[1]
            card = self.card(UNNAMED, n_experts=n_experts, top_k=top_k, layer_numbers=log.layers)
            writer.begin(card)
            writer.drop(CUT, log.n_cut)
            writer.note(REQUESTS)
            writer.append(trace_of_log(log, card, domain=domain, ubatch=self.ubatch))


def read_dump(path: Path) -> tuple[Log, int | None]:
    """The routing of a dump, and how many experts its argsort tensors have."""
    text = bytes(read_text(path)).decode(errors="replace")
    ids: list[tuple[int, int, NDArray[Any]]] = []  # layer, line, [T, K]
    weights: list[NDArray[Any] | None] = []
    n_experts = None
    for kind, layer, rest, line, values in _tensors(path, text):
        if kind == "topk":
            ids.append((layer, line, values))
            weights.append(None)
            found = EXPERTS.search(rest)
            n_experts = int(found.group(1)) if found else n_experts
        elif ids and ids[-1][0] == layer and values.size == ids[-1][2].size:
            weights[-1] = values.reshape(
                ids[-1][2].shape
            )  # the last one printed is the one applied
    if not ids:
        raise FormatError(f"{path}: expected tensors named ffn_moe_topk-N, found none")
    widths = {part.shape[1] for _, _, part in ids}
    if len(widths) > 1:
        raise FormatError(f"{path}: expected the same k in every layer, found {sorted(widths)}")
    rows = [len(part) for _, _, part in ids]
    all_weights = None
    if all(part is not None for part in weights):
        all_weights = np.concatenate([part for part in weights if part is not None]).astype(
            np.float32
        )
    log = passes(
        path,
        np.repeat([layer for layer, _, _ in ids], rows).astype(np.int32),
        np.concatenate([part for _, _, part in ids]).astype(np.int32),
        all_weights,
        np.repeat([line for _, line, _ in ids], rows),
    )
    return log, n_experts


def _tensors(path: Path, text: str) -> Iterator[tuple[str, int, str, int, NDArray[Any]]]:
    """kind, layer, what the header says of its origin, line, values [rows, columns]."""
    for head in HEAD.finditer(text):
        line = text.count("\n", 0, head.start()) + 1
        stop = text.find("sum", head.end())
        body = text[head.end() : stop if stop >= 0 else len(text)]
        shape = [int(n) for n in head.groups()[4:]]
        if "..." in body:
            raise FormatError(
                f"{path}, line {line}: ffn_moe_{head.group(1)}-{head.group(2)} of {shape[0]} x {shape[1]} was printed "
                "with '...': the dump lacks ids; print at most 6 tokens of a model with k <= 6, or use llama_server"
            )
        numbers = np.array([float(number) for number in NUMBER.findall(body)])
        if stop < 0 or len(numbers) != np.prod(shape):
            raise FormatError(
                f"{path}, line {line}: expected {int(np.prod(shape))} numbers in {shape}, found {len(numbers)}; "
                "the dump was cut off"
            )
        is_id = (numbers >= 0) & (numbers < 2**16 - 1) & (numbers == np.floor(numbers))
        if (head.group(1) == "topk" and not is_id.all()) or int(head.group(2)) >= 2**16:
            raise FormatError(
                f"{path}, line {line}: expected expert ids, found {numbers[:6].tolist()}"
            )
        columns = shape[0] if head.group(1) == "topk" else shape[0] * shape[1]
        yield head.group(1), int(head.group(2)), head.group(4), line, numbers.reshape(-1, columns)
