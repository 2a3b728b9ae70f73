"""SGLang: files of its per-token expert recorder, and routed experts returned with responses as base64.

Recorder files (`--expert-distribution-recorder-mode per_token`) hold one record per forward pass; read in
sgl-project/sglang, srt/eplb/expert_distribution.py at 02295fe. Their ids are physical experts, and the layer axis
counts every layer of the model. Responses (`return_routed_experts`, pull request 12162) are raw numbers of shape
[prompt + generated - 1, layer, k].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.models.cards import load_card
from prefetch.sources.columns import open_columns
from prefetch.sources.files import UNNAMED, FileSource, domain_of, used_ids
from prefetch.sources.served import DTYPES, Encoding, Served, json_lines, place
from prefetch.sources.sglang_passes import Recording, check_ranks, read_recording, translate
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter

KINDS = ("physical", "logical")
WHICH = (
    "whether its ids are physical or logical experts (with expert balancing a physical expert is a copy): pass "
    "source.ids=logical, or source.ids=physical with source.physical_to_logical=FILE to translate them"
)
MAP = "map "  # names the map among the files


@dataclass(frozen=True, kw_only=True)
class Sglang(FileSource):
    """`ids` says what the numbers are where the file cannot: with expert balancing a physical expert is a copy."""

    ids: str | None = None
    physical_to_logical: str | None = None
    n_layers: int | None = None
    top_k: int | None = None
    dtype: str = "int32"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".jsonl", ".jsonl.gz")
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "torch")

    def __post_init__(self) -> None:
        if self.ids not in (None, *KINDS) or self.dtype not in DTYPES:
            raise ConfigError(
                f"source.ids: expected one of {KINDS}, got {self.ids!r}; source.dtype: one of {DTYPES}, got "
                f"{self.dtype!r}"
            )
        if self.physical_to_logical and self.ids != "physical":
            raise ConfigError(
                "source.physical_to_logical: translates physical ids: pass source.ids=physical"
            )

    def files(self) -> dict[str, Path]:
        """The map determines the content as much as the recordings do."""
        found = super().files()
        if self.physical_to_logical:
            path = Path(self.physical_to_logical).expanduser()
            if not path.is_file():
                raise ConfigError(f"source.physical_to_logical={path}: no such file")
            found[f"{MAP}{path.name}"] = path
        return found

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        del settings["physical_to_logical"]  # its content counts, not its place
        return settings

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        files = {name: p for name, p in self.files().items() if not name.startswith(MAP)}
        map_LP = self._map()
        recordings = {
            name: self._logical(read_recording(path), map_LP, writer)
            for name, path in files.items()
            if path.suffix == ".pt"
        }
        check_ranks(list(recordings.values()))
        served = {name: path for name, path in files.items() if name not in recordings}
        if served and self.ids is None:
            raise ConfigError(f"{next(iter(served.values()))}: a response does not say {WHICH}")
        used_E, where = np.zeros(0, bool), ", ".join(map(str, files.values()))
        if not self.knows_experts:
            requests = (r.ids_TLK for p in served.values() for _, r in self._requests(p, map_LP))
            used_E = used_ids(chain((r.ids_TLK for r in recordings.values()), requests), where)
        n_experts = self.experts(used_E, writer, where)
        for name, recording in recordings.items():
            self._write_recording(recording, domain_of(name), n_experts, writer)
        for name, path in served.items():
            self._write_served(path, map_LP, domain_of(name), n_experts, writer)

    def _map(self) -> NDArray[np.int64] | None:
        """[layer of the model, physical expert] -> logical expert."""
        if not self.physical_to_logical:
            return None
        path = Path(self.physical_to_logical).expanduser()
        columns = open_columns(path)
        with reading(path, "an array [layer, physical expert]"):
            map_LP = columns.whole(columns.names[0])
            if map_LP.ndim != 2 or map_LP.dtype.kind not in "iu":
                raise FormatError(f"expected whole numbers [layer, physical], found {map_LP.shape}")
            return map_LP.astype(np.int64)

    def _logical(
        self, recording: Recording, map_LP: NDArray[np.int64] | None, writer: TraceWriter
    ) -> Recording:
        """Physical ids translated by the map given, or by the recording's own."""
        with reading(recording.path, "physical expert ids"):
            if self.ids == "logical":
                writer.note("ids are logical experts: stated by source.ids")
                return recording
            if map_LP is not None:
                writer.note("physical ids translated by source.physical_to_logical")
                return recording.translated(map_LP)
            if recording.map_LP is not None:
                writer.note(
                    "physical ids translated by the recording's last map: a rebalancing before it goes unnoticed"
                )
                return recording.translated(recording.map_LP)
            if self.ids is None:
                raise ConfigError(f"a recording without its map does not say {WHICH}")
            writer.note("ids are physical experts: copies of one expert count as different")
            return recording

    def _write_recording(
        self, recording: Recording, domain: str, n_experts: int, writer: TraceWriter
    ) -> None:
        writer.file(str(recording.path))
        writer.note(
            "a recording names no requests: a row continues the running request whose next position it has"
        )
        with reading(recording.path, "a recording"):
            card = self.card(
                UNNAMED,
                n_experts=n_experts,
                top_k=recording.ids_TLK.shape[2],
                layer_numbers=recording.layer_numbers,
            )
            trace = trace_of(card, recording.ids_TLK, domain=domain, **recording.arguments)
        writer.begin(card)
        writer.append(trace)

    def _write_served(
        self,
        path: Path,
        map_LP: NDArray[np.int64] | None,
        domain: str,
        n_experts: int,
        writer: TraceWriter,
    ) -> None:
        writer.file(str(path))
        if map_LP is not None:
            writer.note("physical ids translated by source.physical_to_logical")
        else:
            writer.note(f"ids are {self.ids} experts: stated by source.ids")
        for number, (where, request) in enumerate(self._requests(path, map_LP)):
            with reading(where, "a response"):
                card = self.card(
                    UNNAMED,
                    n_experts=n_experts,
                    top_k=request.ids_TLK.shape[2],
                    layer_numbers=self._layers(request.ids_TLK.shape[1]),
                )
                trace = trace_of(
                    card, request.ids_TLK, request_T=number, domain=domain, **request.arguments
                )
                writer.begin(card)
            writer.append(trace)

    def _requests(
        self, path: Path, map_LP: NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Served]]:
        encoding = Encoding(self.dtype, self.n_layers, self.top_k)
        for where, response in json_lines(path):
            with reading(where, "a response with routed experts"):
                requests = [
                    self._placed(response, routed, encoding, map_LP) for routed in _routed(response)
                ]
            for request in requests:
                yield where, request

    def _placed(
        self,
        response: dict[str, Any],
        routed: Any,
        encoding: Encoding,
        map_LP: NDArray[np.int64] | None,
    ) -> Served:
        ids_TLK: NDArray[Any]
        usage = response.get("meta_info") or response.get("usage") or {}
        ids_TLK, skipped = encoding.decode(routed)
        layers = self._layers(ids_TLK.shape[1])
        if len(layers) != ids_TLK.shape[1]:
            ids_TLK = ids_TLK[:, list(layers)]  # dense layers have a row of zeros
        if map_LP is not None:
            ids_TLK = translate(ids_TLK, map_LP, layers)
        details = usage.get("prompt_tokens_details") or {}
        return place(
            ids_TLK,
            n_prompt=usage["prompt_tokens"],
            n_generated=usage.get("completion_tokens"),
            skipped=skipped or int(response.get("routed_experts_start_len") or 0),
            n_cached=usage.get("cached_tokens") or details.get("cached_tokens") or 0,
        )

    def _layers(self, n_layers: int) -> tuple[int, ...]:
        """The server returns a row for every layer of the model; which are MoE layers, the card knows."""
        if self.model_card is not None:
            numbers = load_card(self.model_card).layer_numbers
            if max(numbers) < n_layers:
                return numbers
        return tuple(range(n_layers))


def _routed(response: dict[str, Any]) -> list[Any]:
    """The arrays of a response: `/generate` has one under meta_info, the OpenAI routes one per choice."""
    choices = response.get("choices") or [response]
    found = [
        choice.get("routed_experts")
        or (choice.get("meta_info") or {}).get("routed_experts")
        or (choice.get("sgl_ext") or {}).get("routed_experts")
        for choice in choices
    ]
    if None in found:
        raise FormatError(
            "expected routed_experts in meta_info or sgl_ext: ask with return_routed_experts of a server started with "
            "--enable-return-routed-experts"
        )
    if len(found) > 1:
        raise FormatError("expected one choice per response: usage adds several up; ask with n=1")
    return found
