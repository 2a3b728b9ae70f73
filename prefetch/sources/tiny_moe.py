"""The default source: a small real MoE language model, trained on the spot, then run on text it never saw.

The model is an artifact of its own, so other requests or columns do not train it again. It knows no training step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefetch.artifacts import Recipe
from prefetch.errors import ConfigError
from prefetch.models.tiny import corpus
from prefetch.sources.source import Source
from prefetch.threads import one_thread

if TYPE_CHECKING:  # a trace that is found again must not wait for torch
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from prefetch.models.tiny.generate import Generated
    from prefetch.models.tiny.net import Shape
    from prefetch.models.tiny.net import TinyMoE as TinyMoeNet
    from prefetch.models.tiny.train import Trained
    from prefetch.trace.card import ModelCard
    from prefetch.trace.routing import RoutingTrace
    from prefetch.trace.writer import TraceWriter

MODEL = 1  # raise it when the same settings train another model
SHAPE = ("layers", "experts", "top_k", "d", "ff", "context", "vocabulary")
REQUESTS_AT_ONCE = 200  # more are no faster
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TinyMoE(Source):
    """Settings of the model and its corpus first, then of the requests, then of what is recorded."""

    layers: int = 8
    experts: int = 32
    top_k: int = 2
    d: int = 64
    ff: int = 32
    context: int = 128
    vocabulary: int = 512
    steps: int = 420
    domains: list[str] | tuple[str, ...] = tuple(corpus.DOMAINS)
    bytes_per_domain: int = 600_000
    path: str | list[str] | None = None
    requests_per_domain: int = 40
    prompt_tokens: int = 64
    new_tokens: int = 64
    temperature: float = 1.0
    scores: int | str | None = "all"
    gate_inputs: bool = True
    pre_attention: bool = False
    seed: int = 0
    libraries: ClassVar[tuple[str, ...]] = ("python", "torch", "sympy", "numpy")

    def __post_init__(self) -> None:
        sizes = (*SHAPE, "bytes_per_domain", "requests_per_domain", "prompt_tokens")
        claims = {
            f"{', '.join(sizes)} must be at least 1": min(getattr(self, s) for s in sizes) >= 1,
            "steps, new_tokens, temperature and seed must not be negative": min(
                self.steps, self.new_tokens, self.temperature, self.seed
            )
            >= 0,
            "top_k must be at most experts": self.top_k <= self.experts <= 65535,
            "d must be a multiple of 32 (attention heads)": self.d % 32 == 0,
            "ff must be a multiple of 4 (grouped products)": self.ff % 4 == 0,
            "vocabulary must be at least 256 (bytes)": self.vocabulary >= 256,
            "prompt_tokens + new_tokens must be at most context": self.request_tokens
            <= self.context,
            f"domains must be some of {list(corpus.DOMAINS)}, each once": len(self.domains)
            == len(set(self.domains) & set(corpus.DOMAINS))
            > 0,
            "scores must be null, all, or a number from 1 to experts": self.scores in (None, "all")
            or (isinstance(self.scores, int) and 1 <= self.scores <= self.experts),
        }
        self.refuse(claims)

    @property
    def request_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def settings(self) -> dict[str, Any]:
        """All but the place of the user's text, whose content is part of the model's key."""
        return {name: value for name, value in super().settings().items() if name != "path"}

    def upstream(self) -> Mapping[str, Recipe]:
        """The trained model: what it depends on, and nothing that only concerns the requests."""
        names = (*SHAPE, "steps", "bytes_per_domain", "seed")
        config = {name: getattr(self, name) for name in names}
        files: Mapping[str, Path] = {}
        if self.path:
            from prefetch.sources.files import find_files

            files = find_files(self.path, ())
        else:
            config["domains"] = list(self.domains)

        def build(folder: Path, _upstream: Mapping[str, Path]) -> None:
            from prefetch.models.tiny import train

            n = self.bytes_per_domain
            texts = corpus.of_files(files, n) if files else corpus.build(self.domains, n)
            train.make(folder, texts, self._shape(), steps=self.steps, seed=self.seed)

        return {
            "model": Recipe(
                kind="model",
                version=MODEL,
                config=config,
                build=build,
                libraries=self.libraries,
                files=files,
            )
        }

    def _shape(self) -> Shape:
        from prefetch.models.tiny.net import Shape

        return Shape(**{name: getattr(self, name) for name in SHAPE})

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        """Every request: a prompt of unseen text (prefill), and a continuation that the model samples (decode)."""
        from prefetch.models.tiny import train

        trained = train.load(upstream["model"], self._shape())
        for domain, digest in trained.corpus_md5.items():
            writer.input(f"corpus.{domain}", f"md5:{digest}")
        for when, nats in trained.held_out_loss.items():
            writer.fact(f"held_out_nats_per_token_{when}", nats)
        n_parameters = sum(parameter.numel() for parameter in trained.net.parameters())
        writer.note(
            f"a model of {n_parameters:,} parameters after {self.steps} steps: real routing, but what it shows "
            "need not hold for large models"
        )
        if self.scores is not None:
            writer.note("scores are the router's logits")
        with one_thread():
            self._run(writer, trained)
        if self.gate_inputs:
            routers = enumerate(trained.net.routers)
            writer.router_weights({i: router.weight_ED.numpy() for i, router in routers})

    def _run(self, writer: TraceWriter, trained: Trained) -> None:
        import torch

        from prefetch.models.tiny.generate import generate, own_gate_choices
        from prefetch.progress import Progress

        net, generator = trained.net, torch.Generator().manual_seed(self.seed)
        prompts_RS, domain_R = self._prompts(trained.held_out)
        card, own, choices = card_of(net), 0, 0
        writer.begin(card)
        with Progress("running", len(domain_R), "requests") as progress:
            for first in range(0, len(domain_R), REQUESTS_AT_ONCE):
                part = slice(first, first + REQUESTS_AT_ONCE)
                prompts_BS = torch.from_numpy(prompts_RS[part])
                done = generate(net, prompts_BS, self.new_tokens, self.temperature, generator)
                own += own_gate_choices(net, done.routed)
                choices += done.routed.ids.numel()
                writer.file(f"requests from {first}")
                writer.append(self._block(card, done, domain_R[part], tuple(trained.held_out)))
                progress.advance(len(prompts_BS))
        writer.fact("own_gate_agreement", own / choices)

    def _prompts(
        self, held_out: Mapping[str, NDArray[np.int32]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """R prompts of S tokens, drawn parts of the unseen text, none twice; and the domain of each."""
        import numpy as np

        rng, prompts = np.random.default_rng(self.seed), []
        for domain, tokens_T in held_out.items():
            n_parts = len(tokens_T) // self.prompt_tokens
            if n_parts < self.requests_per_domain:
                raise ConfigError(
                    f"source.requests_per_domain={self.requests_per_domain}: the unseen text of {domain} holds "
                    f"{n_parts} prompts of {self.prompt_tokens} tokens; ask for fewer or shorter ones, or raise "
                    "source.bytes_per_domain"
                )
            parts_RS = tokens_T[: n_parts * self.prompt_tokens].reshape(n_parts, -1)
            prompts.append(parts_RS[rng.choice(n_parts, self.requests_per_domain, replace=False)])
        domain_R = np.repeat(np.arange(len(prompts), dtype=np.int32), self.requests_per_domain)
        return np.concatenate(prompts).astype(np.int64), domain_R

    def _block(
        self,
        card: ModelCard,
        done: Generated,
        domain_B: NDArray[np.int32],
        domains: tuple[str, ...],
    ) -> RoutingTrace:
        """The recorded columns, one row per token that ran."""
        import numpy as np

        from prefetch.trace.routing import DECODE, PREFILL, trace_of

        n_requests, n_tokens = done.tokens_BS.shape
        phase_S = np.repeat([PREFILL, DECODE], [self.prompt_tokens, self.new_tokens])
        routed = done.routed
        block = trace_of(
            card,
            _rows(routed.ids),
            request_T=np.repeat(np.arange(n_requests), n_tokens),
            phase_T=np.tile(phase_S, n_requests),
            token_T=done.tokens_BS.flatten().numpy(),
            weights_TLK=_rows(routed.weights),
            gate_inputs_TLD=_float16(routed.gate_inputs) if self.gate_inputs else None,
            pre_attention_TLD=_float16(routed.attention_inputs) if self.pre_attention else None,
            **self._scores(routed.logits),
        )
        return replace(block, domain_T=np.repeat(domain_B, n_tokens), domains=domains)

    def _scores(self, logits_BSLE: torch.Tensor) -> dict[str, Any]:
        if self.scores is None:
            return {}
        if self.scores == "all":
            return {"scores_TLM": _float16(logits_BSLE)}
        from prefetch.trace.routing import id_dtype

        scores, ids = logits_BSLE.topk(int(self.scores), -1)
        return {
            "scores_TLM": _float16(scores),
            "score_ids_TLM": _rows(ids).astype(id_dtype(self.experts)),
        }


def card_of(net: TinyMoeNet) -> ModelCard:
    """Sizes counted on the net itself, as it ran: fp32."""
    from prefetch.trace.card import ModelCard

    shape = net.shape
    expert = 2 * shape.d * shape.ff * FP32_BYTES
    everything = sum(p.numel() for p in net.parameters()) * FP32_BYTES
    return ModelCard(
        f"tiny_moe {shape.layers}x{shape.experts} top-{shape.top_k}",
        shape.experts,
        shape.top_k,
        tuple(range(shape.layers)),
        ("decoder",) * shape.layers,
        hidden_size=shape.d,
        score_function="softmax",
        weights_normalised=shape.top_k > 1,
        expert_bytes_L=(expert,) * shape.layers,
        expert_precision="fp32",
        routed_precision="fp32",
        dense_bytes=everything - expert * shape.experts * shape.layers,
        shared_bytes=0,
        kv_bytes_per_token=2 * shape.layers * shape.d * FP32_BYTES,
    )


def _rows(values_BSLX: torch.Tensor) -> NDArray[Any]:
    """[B, S, L, X] as [T, L, X]."""
    return values_BSLX.flatten(0, 1).numpy()


def _float16(values_BSLX: torch.Tensor) -> NDArray[np.float16]:
    return _rows(values_BSLX.half())
