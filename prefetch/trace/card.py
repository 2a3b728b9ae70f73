"""What a trace must know about the model it came from, in numbers. It knows no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from prefetch.errors import FormatError

STACKS = ("decoder", "encoder")
SCORES = ("softmax", "sigmoid", "softmax_after_topk", "other")


@dataclass(frozen=True)
class ModelCard:
    """A MoE model from outside; layers are its MoE layers only, in the order of the trace's L axis."""

    name: str
    n_experts: int
    top_k: int
    layer_numbers: tuple[int, ...]  # the model's own numbers: 1..26 where layer 0 is dense
    layer_stacks: tuple[str, ...]  # decoder | encoder, one per layer
    revision: str | None = None
    hidden_size: int | None = None
    score_function: str | None = None  # None = the source does not say
    weights_normalised: bool | None = None  # do the k weights of a token sum to one?
    expert_bytes_L: tuple[int, ...] | None = (
        None  # bytes of one expert, per layer, at `expert_precision`
    )
    expert_precision: str | None = None  # what expert_bytes_L is counted at: bf16, mxfp4, Q4_K_M
    routed_precision: str | None = None  # what the model ran at while its routing was recorded
    dense_bytes: int | None = None  # attention, embeddings, dense layers, routers
    shared_bytes: int | None = None  # experts that every token uses; not among the E
    kv_bytes_per_token: int | None = None

    def __post_init__(self) -> None:
        for field in ("layer_numbers", "layer_stacks", "expert_bytes_L"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, tuple(value))
        layers = self.n_layers
        whole = {
            "n_experts",
            "top_k",
            "hidden_size",
            "dense_bytes",
            "shared_bytes",
            "kv_bytes_per_token",
        }
        listed = {"layer_numbers", "expert_bytes_L"}
        for name in whole | listed:
            value = getattr(self, name)
            parts = (value,) if name in whole else (value or ())
            if value is not None and not all(type(part) is int for part in parts):
                raise FormatError(
                    f"model card {self.name!r}: {name} must hold whole numbers, got {value!r}"
                )
        checks = {
            "n_experts must be from 1 to 65535": 1 <= self.n_experts < 2**16,
            f"top_k must be from 1 to n_experts={self.n_experts}": 1
            <= self.top_k
            <= self.n_experts,
            "layer_numbers must name at least one layer": layers >= 1,
            "layer_stacks must hold one stack per layer": len(self.layer_stacks) == layers,
            f"layer_stacks must be among {STACKS}": set(self.layer_stacks) <= set(STACKS),
            f"score_function must be among {SCORES}": self.score_function in (None, *SCORES),
            "expert_bytes_L must hold one positive size per layer": self.expert_bytes_L is None
            or (len(self.expert_bytes_L) == layers and min(self.expert_bytes_L) > 0),
            "a layer may stand only once": len(
                set(zip(self.layer_stacks, self.layer_numbers, strict=False))
            )
            == layers,
        }
        for claim, holds in checks.items():
            if not holds:
                raise FormatError(
                    f"model card {self.name!r}: {claim}; found layers {str(self.layer_numbers)[:80]}, k {self.top_k}"
                )

    @property
    def n_layers(self) -> int:
        return len(self.layer_numbers)

    @property
    def all_expert_bytes(self) -> int | None:
        """Bytes of every routed expert of the model, or None where the sizes are not known."""
        return None if self.expert_bytes_L is None else self.n_experts * sum(self.expert_bytes_L)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, required = (
            set(fields) - known,
            {"name", "n_experts", "top_k", "layer_numbers", "layer_stacks"},
        )
        if unknown or not required <= set(fields):
            raise FormatError(
                f"{where}: a model card has the fields {sorted(known)} and needs {sorted(required)}; "
                f"unknown {sorted(unknown)}, missing {sorted(required - set(fields))}"
            )
        return cls(**fields)


def plain_card(
    name: str, *, n_experts: int, top_k: int, layer_numbers: tuple[int, ...], **known: Any
) -> ModelCard:
    """The card of a source that tells nothing but the routing: every layer in the decoder, every size unknown."""
    return ModelCard(
        name, n_experts, top_k, layer_numbers, ("decoder",) * len(layer_numbers), **known
    )
