"""Routing of any MoE model of transformers, recorded by hooks on the routers that its own class declares.

It knows no router class: prefetch/models does. The model and the text are outside files; their content is in the key.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from prefetch.errors import ConfigError, FormatError
from prefetch.models.hf import LoadedModel, ModelChoice, is_local, load, model_files, pinned
from prefetch.progress import Progress
from prefetch.sources.files import find_files
from prefetch.sources.ranks import Meeting, Rank, in_order
from prefetch.sources.source import Source
from prefetch.sources.texts import Fields, Request, Text, dataset_texts, file_texts, windows
from prefetch.trace.parquet import TraceFiles
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, id_dtype, no_expert, trace_of

if TYPE_CHECKING:  # torch and numba are imported when something is recorded
    from prefetch.models.batches import Arrays, Capture
    from prefetch.trace.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """One request is one window of a text: its prompt rows, then the rows of its generated tokens."""

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    path: str | list[str] | None = None
    dataset: str | None = None
    dataset_part: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    field: str = "text"
    domain_field: str | None = None
    request_tokens: int = 512
    new_tokens: int = 0
    temperature: float = 0.0
    max_requests: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False
    scores: int | str | None = None
    gate_inputs: bool = False
    seed: int = 0
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "torch", "transformers", "tokenizers")

    def __post_init__(self) -> None:
        counts = self.request_tokens, self.batch_size, self.max_requests or 1
        extras, whole = (self.new_tokens, self.temperature), self.request_tokens + self.new_tokens
        scores = self.scores
        claims = {
            "model must be given: source.model= a hub id, or the folder of a saved model": self.model,
            "text must be given, by source.path= or by source.dataset=, not both": (
                (self.path is None) != (self.dataset is None)
            ),
            f"request_tokens, batch_size, max_requests must be at least 1, got {counts}": min(
                counts
            )
            >= 1,
            f"new_tokens and temperature must not be negative, got {extras}": min(extras) >= 0,
            f"max_tokens must hold one request of {whole} tokens, got {self.max_tokens}": (
                (self.max_tokens or whole) >= whole
            ),
            f"scores must be null, all, or a positive number, got {scores!r}": (
                scores in (None, "all") or (isinstance(scores, int) and scores > 0)
            ),
        }
        for claim, holds in claims.items():
            if not holds:
                raise ConfigError(claim)

    @cached_property
    def choice(self) -> ModelChoice:
        """The model, with a hub id pinned to the commit that it names today."""
        assert self.model is not None, "checked when the settings were read"
        return ModelChoice(
            model=self.model,
            revision=None if is_local(self.model) else pinned(self.model, self.revision),
            tokenizer=self.tokenizer,
            tokenizer_revision=self.pinned_tokenizer,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )

    @cached_property
    def pinned_tokenizer(self) -> str | None:
        name = self.tokenizer
        return None if name is None or is_local(name) else pinned(name, None)

    @cached_property
    def pinned_dataset(self) -> str | None:
        name, revision = self.dataset, self.dataset_revision
        return None if name is None else pinned(name, revision, kind="dataset")

    @cached_property
    def texts(self) -> dict[str, Path]:
        return {} if self.path is None else find_files(self.path, ())

    def files(self) -> dict[str, Path]:
        files = {f"text/{name}": path for name, path in self.texts.items()}
        for role in ("model", "tokenizer"):
            folder = getattr(self, role)
            if folder is not None and is_local(folder):
                files |= {f"{role}/{name}": path for name, path in model_files(folder).items()}
        return files

    def settings(self) -> dict[str, Any]:
        """Names instead of places; commits instead of branches."""
        settings = super().settings()
        del settings["path"]
        if self.tokenizer is not None and is_local(self.tokenizer):
            settings["tokenizer"] = Path(self.tokenizer).resolve().name
        if self.temperature:
            settings["drawn"] = "by batch"  # so that it does not matter which process draws
        return settings | {
            "model": self.choice.name,
            "revision": self.choice.revision,
            "tokenizer_revision": self.pinned_tokenizer,
            "dataset_revision": self.pinned_dataset,
        }

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        loaded = load(self.choice)
        capture, n_blocks = self._capture(loaded), 0
        for block in self._blocks(loaded, capture):
            if not n_blocks:
                writer.file(loaded.name)
                writer.begin(capture.card)
            writer.append(block)
            n_blocks += 1
        self._need_text(loaded, n_blocks)
        self._finish(writer, capture)

    def record_with(self, meeting: Meeting, writer: TraceWriter | None) -> None:
        """One of several processes takes every so many-th batch; the one with the writer puts all together."""
        loaded = load(self._on_node(meeting.rank))
        capture, folder = self._capture(loaded), meeting.share()
        folder.mkdir()
        files = TraceFiles(folder)
        for block in self._blocks(loaded, capture, meeting.rank):
            files.append(block)
        if files.columns:
            files.close(capture.card, Provenance("real", "huggingface"))
        meeting.hand_in(capture.told())
        if writer is None:
            return
        shares = meeting.shares()
        self._need_text(loaded, len(files.columns))
        capture.add_told(shares[1:])
        writer.file(loaded.name)
        writer.begin(capture.card)
        for block in in_order([meeting.share(i) for i in range(len(shares))], self.batch_size):
            writer.append(block)
        self._finish(writer, capture)

    def _on_node(self, rank: Rank) -> ModelChoice:
        """A GPU each."""
        if self.device != "cuda":
            return self.choice
        return dataclasses.replace(self.choice, device=f"cuda:{rank.on_node}")

    def _capture(self, loaded: LoadedModel) -> Capture:
        from prefetch.models.batches import Capture, Wanted

        scores = 0 if self.scores == "all" else self.scores
        assert not isinstance(scores, str), "checked when the settings were read"
        return Capture(loaded, Wanted(scores, self.gate_inputs), temperature=self.temperature)

    def _blocks(
        self, loaded: LoadedModel, capture: Capture, rank: Rank | None = None
    ) -> Iterator[RoutingTrace]:
        """A block per batch; of several processes only those batches that this one takes."""
        import torch

        requests, first = self._requests(loaded), 0
        with Progress("capturing", None, "tokens") as progress, torch.random.fork_rng():
            for number in itertools.count():
                if not (batch := list(itertools.islice(requests, self.batch_size))):
                    return
                if rank is None or rank.takes(number):
                    torch.manual_seed(hash_of_batch(self.seed, number))
                    rows = capture.rows([request.tokens for request in batch], self.new_tokens)
                    yield block_of(capture, rows, batch, first)
                    progress.advance(len(rows["token_T"]))
                first += len(batch)

    def _need_text(self, loaded: LoadedModel, found: int) -> None:
        if not found:
            raise FormatError(
                f"{loaded.name}: expected text, found none in {self.path or self.dataset}; if there is some, the model "
                "was saved without a tokenizer: pass source.tokenizer=..."
            )

    def _finish(self, writer: TraceWriter, capture: Capture) -> None:
        report(writer, capture, self.scores)
        if self.gate_inputs:
            write_router_weights(writer, capture)

    def _requests(self, loaded: LoadedModel) -> Iterator[Request]:
        """Windows of the texts, while the limits allow."""
        tokens = requests = 0
        most_requests, most_tokens = self.max_requests or math.inf, self.max_tokens or math.inf
        for text in self._texts():
            for window in windows(loaded.tokenizer, text, self.request_tokens):
                tokens += len(window) + self.new_tokens
                requests += 1
                if requests > most_requests or tokens > most_tokens:
                    return
                yield Request(window, text.domain)

    def _texts(self) -> Iterator[Text]:
        fields = Fields(self.field, self.domain_field)
        if self.dataset is None:
            return file_texts(self.texts, fields)
        assert self.pinned_dataset is not None
        return dataset_texts(
            self.dataset,
            part=self.dataset_part,
            split=self.split,
            revision=self.pinned_dataset,
            fields=fields,
        )


def hash_of_batch(seed: int, number: int) -> int:
    """A seed for each batch, the first one's being that of all."""
    return seed if not number else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def block_of(capture: Capture, rows: Arrays, batch: list[Request], first: int) -> RoutingTrace:
    """One batch; `first` is the number of its first request."""
    card, columns = capture.card, dict[str, Any](rows)
    local_T = columns.pop("request_T")
    if "score_ids_TLM" in columns:
        ids, nobody = columns["score_ids_TLM"], no_expert(card.n_experts)
        columns["score_ids_TLM"] = np.where(ids < 0, nobody, ids).astype(id_dtype(card.n_experts))
    domains = tuple(dict.fromkeys(request.domain for request in batch))
    code_B = np.array([domains.index(request.domain) for request in batch], np.int32)
    block = trace_of(card, request_T=local_T + first, **columns)
    return dataclasses.replace(block, domain_T=code_B[local_T], domains=domains)


def report(writer: TraceWriter, capture: Capture, scores: int | str | None) -> None:
    """What the controls found, and what a reader of the trace must know."""
    agreement = capture.reproduced / capture.decisions
    writer.fact("own_gate_agreement", agreement)
    writer.fact("padding_rows_left_out", capture.padding_rows)
    if agreement < 1:
        writer.note(
            "some routers, applied again to the recorded gate input, chose other experts: see own_gate_agreement"
        )
    for kind in sorted(capture.unheard):
        writer.note(
            f"{kind}: the router's choice is recorded, but the experts of this version of transformers ran others, so "
            "later layers saw hidden states that the model was not trained for"
        )
    adapter = capture.hooks.layers[0].adapter
    if scores is not None:
        writer.note(
            f"scores are the router's {adapter.scores}, before any bias, group limit or scaling"
        )
    if capture.loaded.has_encoder:
        writer.note("positions of decoder rows go on after the request's encoder rows")
    if adapter.heard == "nothing":
        writer.note("experts of this model are not given ids: they are read from the dispatch")


def write_router_weights(writer: TraceWriter, capture: Capture) -> None:
    from prefetch.models.measured import router_matrix

    for stack, name in (("decoder", "router_weights"), ("encoder", "encoder_router_weights")):
        layers = [layer for layer in capture.hooks.layers if layer.stack == stack]
        matrices = {layer.number: router_matrix(layer, capture.card) for layer in layers}
        if any(matrix is None for matrix in matrices.values()):
            writer.note(
                "router weights are not recorded: a router is more than one matrix, or offloaded"
            )
        elif matrices:
            arrays = {
                f"layer.{n}": m.float().cpu().numpy() for n, m in matrices.items() if m is not None
            }
            writer.beside(name, arrays)
