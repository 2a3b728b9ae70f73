"""Routed experts as vLLM returns them (`--enable-return-routed-experts`), or as a patch of its MoE layer logs them.

Responses: JSON lines of /v1/completions, /v1/chat/completions, /inference/v1/generate or of dumped RequestOutputs, or
one .npy per request. Read in vLLM's documentation: 0.21 (`prompt_routed_experts` [prompt, L, k] beside `routed_experts`
[generated, L, k], nested lists) and later (`routed_experts` as a base64 .npy of prompt + generated - 1 rows), with
dynamo's {data, shape, dtype, start}. It knows no model: the layer axis is the slot of the MoE layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.sources.columns import ONLY, open_columns
from prefetch.sources.files import UNNAMED, FileSource, domain_of, used_ids
from prefetch.sources.router_log import Log, is_log, read_log
from prefetch.sources.served import DTYPES, Encoding, Served, json_lines, place
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class Vllm(FileSource):
    """One line, or one .npy, is one request (each further choice of a response is one more)."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    n_layers: int | None = None
    top_k: int | None = None
    dtype: str = "int32"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".npy")
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"source.dtype: expected one of {DTYPES}, got {self.dtype!r}")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        files = self.files()
        logs = {name: read_log(path) for name, path in files.items() if is_log(path)}
        served = {name: path for name, path in files.items() if name not in logs}
        used_E, where = np.zeros(0, bool), ", ".join(map(str, files.values()))
        if not self.knows_experts:
            requests = (r.ids_TLK for path in served.values() for _, r in self._requests(path))
            used_E = used_ids(chain((log.ids_TLK for log in logs.values()), requests), where)
        n_experts = self.experts(used_E, writer, where)
        for name, log in logs.items():
            self._write_log(log, domain_of(name), n_experts, writer)
        for name, path in served.items():
            self._write_served(path, domain_of(name), n_experts, writer)

    def _write_served(self, path: Path, domain: str, n_experts: int, writer: TraceWriter) -> None:
        writer.file(str(path))
        writer.note("layers are numbered by MoE slot, not by the model's own layer number")
        if self.cached_tokens is None:
            writer.note(
                "prompt rows of a response without a cached-token count are taken as executed"
            )
        for number, (where, request) in enumerate(self._requests(path)):
            with reading(where, "a response"):
                _, n_layers, top_k = request.ids_TLK.shape
                card = self.card(
                    UNNAMED,
                    n_experts=n_experts,
                    top_k=top_k,
                    layer_numbers=tuple(range(n_layers)),
                )
                trace = trace_of(
                    card, request.ids_TLK, request_T=number, domain=domain, **request.arguments
                )
                writer.begin(card)
            writer.append(trace)

    def _write_log(self, log: Log, domain: str, n_experts: int, writer: TraceWriter) -> None:
        writer.file(str(log.path))
        with reading(log.path, "a router log"):
            card = self.card(
                UNNAMED,
                n_experts=n_experts,
                top_k=log.ids_TLK.shape[2],
                layer_numbers=log.layer_numbers,
            )
            trace = trace_of(
                card,
                log.ids_TLK,
                request_T=log.pass_T,
                domain=domain,
                weights_TLK=log.weights_TLK,
            )
        writer.begin(card)
        writer.drop("dummy batches: passes of one constant row", log.n_dummy)
        writer.note(
            "rows are batch rows: a forward pass stands as one prefill request, so routing within a token may be "
            "read across layers, but not from token to token"
        )
        writer.append(trace)

    def _requests(self, path: Path) -> Iterator[tuple[str, Served]]:
        if path.suffix == ".npy":
            with reading(path, "an array of routed experts"):
                ids, _ = self._encoding.decode(open_columns(path).whole(ONLY).tolist())
                yield str(path), self._placed({}, {}, ids, 0)
            return
        for where, response in json_lines(path):
            with reading(where, "a response with routed experts"):
                requests = list(self._of_response(response))
            for request in requests:
                yield where, request

    @property
    def _encoding(self) -> Encoding:
        return Encoding(self.dtype, self.n_layers, self.top_k)

    def _of_response(self, response: dict[str, Any]) -> Iterator[Served]:
        choices = response.get("choices") or response.get("outputs") or [response]
        prompt = response.get("prompt_routed_experts")
        for index, choice in enumerate(choices):
            routed = choice.get("routed_experts")
            if routed is None and (prompt is None or choice is not response):
                raise FormatError(
                    "expected routed_experts (and prompt_routed_experts): was the server started with "
                    "--enable-return-routed-experts?"
                )
            ids, skipped = self._encoding.decode(routed) if routed is not None else (None, 0)
            if prompt is not None:
                before, _ = self._encoding.decode(prompt)
                whole = before if ids is None or not len(ids) else np.concatenate([before, ids])
                yield self._placed(response, choice, whole, 0, n_prompt=len(before), index=index)
            else:
                assert ids is not None
                yield self._placed(response, choice, ids, skipped, index=index)

    def _placed(
        self,
        response: dict[str, Any],
        choice: dict[str, Any],
        ids: Any,
        skipped: int,
        n_prompt: int | None = None,
        index: int = 0,
    ) -> Served:
        usage = response.get("usage") or {}
        prompt_ids, own_ids = response.get("prompt_token_ids") or [], choice.get("token_ids") or []
        n_generated = None
        if n_prompt is None:
            n_prompt = usage.get("prompt_tokens") or len(prompt_ids) or self.prompt_tokens
            is_only = len(response.get("choices") or [None]) == 1  # usage sums over the choices
            n_generated = len(own_ids) or (usage.get("completion_tokens") if is_only else None)
        if n_prompt is None:
            raise FormatError(
                "nothing says how many rows are the prompt's (usage.prompt_tokens, prompt_token_ids): pass "
                "source.prompt_tokens=..."
            )
        n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if n_cached is None:
            n_cached = response.get("num_cached_tokens")
        if n_cached is None:
            n_cached = self.cached_tokens or 0
        return place(
            ids,
            n_prompt=n_prompt,
            n_generated=n_generated,
            skipped=skipped or int(response.get("routed_experts_prompt_start") or 0),
            n_cached=n_prompt if index else n_cached,  # choices share the prompt: it ran once
            tokens=prompt_ids + own_ids if prompt_ids else None,
        )
