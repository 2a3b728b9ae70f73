"""How large a MoE operation is: what it was called with, then the model's card; each number with where it is from.

Tokens M, hidden K, inner N, experts E, choices per token k. It computes no cost. Whatever is guessed says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.device.names import Names, Rule
from prefetch.models.architecture import BITS_PER_WEIGHT, Architecture

PROFILE, KERNEL_NAME, ANNOTATED, TYPED, CARD, ASSUMED = (
    "profile", "kernel name", "step annotation", "command line", "model card", "assumed",
)  # fmt: skip
NEEDS = {
    "experts": ("tokens", "hidden", "inner", "experts", "top_k", "gated"),
    "up": ("tokens", "hidden", "inner", "experts", "top_k", "gated"),
    "down": ("tokens", "hidden", "inner", "experts", "top_k"),
    "gemm": ("rows", "summed", "width", "experts"),
    "router": ("tokens", "hidden", "experts"),
    "routing": ("tokens", "experts", "top_k"),
    "prepare": ("tokens", "hidden"),
    "permute": ("tokens", "hidden", "top_k"),
    "activation": ("tokens", "inner", "top_k", "gated"),
    "combine": ("tokens", "hidden", "top_k"),
    "dispatch": ("tokens", "hidden"),
    "collect": ("tokens", "hidden"),
}
NO_CARD = "no model card: pass diagnose.model_card=NAME, or each as diagnose.NAME=VALUE"
LARGEST = 2**40  # of an axis: more is no tensor's
WITH_WEIGHTS = ("experts", "up", "down", "gemm", "router")
PLAIN_TYPES = ("fp32", "bf16", "fp16")
TYPEABLE = ("tokens", "hidden", "inner", "experts", "top_k", "gated", "weight", "activation")
CARD_TYPES = {
    "fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "fp8_block128": "fp8", "int8": "int8",
    "int4": "int4", "int4_g128": "int4", "mxfp4": "mxfp4", "q4_k_m": "int4",
}  # fmt: skip
SCALE_BYTES = {  # per weight, beside its own
    "mxfp4": 1 / 32,  # a byte for each 32
    "fp4": 1 / 16,  # NVFP4: a byte for each 16
}


@dataclass(frozen=True)
class Given:
    """What the command line says of the run; None = not said."""

    tokens: int | None = None
    hidden: int | None = None
    inner: int | None = None
    experts: int | None = None
    top_k: int | None = None
    gated: bool | None = None
    weight: str | None = None
    activation: str | None = None
    tensor_parallel: int | None = None
    expert_parallel: int | None = None
    scales: bool = True  # of quantised weights are counted where the format says how many

    @property
    def says_ranks(self) -> bool:
        return self.tensor_parallel is not None or self.expert_parallel is not None

    @property
    def cuts_experts(self) -> bool:
        """Every rank computes a part of each expert: none is busier than another."""
        return (self.tensor_parallel or 1) > 1 and self.expert_parallel is None


@dataclass(frozen=True)
class Shape:
    """One rank's part of a layer. `experts` are all of the layer, `local_experts` those of this rank."""

    tokens: int | None = None
    hidden: int | None = None
    inner: int | None = None
    experts: int | None = None
    top_k: int | None = None
    gated: bool | None = None
    rows: int | None = None
    summed: int | None = (
        None  # what one product sums over: `hidden` of the first, `inner` of the second
    )
    width: int | None = None
    local_experts: int | None = None
    weight: str | None = None
    activation: str | None = None
    output: str | None = None
    scale_bytes: float = 0.0  # of a weight, beside its own
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    why_not: str = ""  # a reason beyond a missing number

    def missing(self, role: str) -> list[str]:
        return [name for name in NEEDS.get(role, ()) if getattr(self, name) is None]

    @property
    def local_share(self) -> float:
        return (self.local_experts or self.experts or 1) / (self.experts or 1)

    @property
    def choices(self) -> float:
        """Rows that this rank's experts compute, expected where only some experts are here."""
        return (self.tokens or 0) * (self.top_k or 0) * self.local_share

    def assumptions(self, role: str) -> list[str]:
        """What its cost rests on and is not read from the profile, in words."""
        types = (
            ("weight", "activation", "output") if role in WITH_WEIGHTS else ("activation", "output")
        )
        told = [
            f"{name}={getattr(self, name)} ({source})"
            for name in (*NEEDS.get(role, ()), *types)
            if (source := self.sources.get(name)) is not None
            and source not in (PROFILE, KERNEL_NAME)
        ]
        return [*told, *self._of_scales(role)]

    def _of_scales(self, role: str) -> list[str]:
        if role not in (*WITH_WEIGHTS[:4],) or self.weight in (None, *PLAIN_TYPES):
            return []
        if self.scale_bytes:
            return [f"scales: {self.scale_bytes:.4g} bytes for each {self.weight} weight"]
        return [f"scales of {self.weight} weights: not counted"]


@dataclass(frozen=True)
class Known:
    """Everything beside one operation's own inputs."""

    names: Names
    given: Given = Given()
    card: Architecture | None = None
    step_tokens: int | None = None
    ranks: int | None = None


class _Told:
    """Values by name, each from the first that told it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def tell(self, source: str, **told: Any) -> None:
        for name, value in told.items():
            if value is not None and name not in self.values:
                self.values[name], self.sources[name] = value, source


def shape_of(
    known: Known, rule: Rule | None, inputs: Mapping[str, Any], said: Mapping[str, str]
) -> Shape:
    """The first that knows a number gives it: command line, the call itself, the annotation, the card."""
    told, names = _Told(), known.names
    told.tell(TYPED, **{name: getattr(known.given, name) for name in TYPEABLE})
    spelt = {name: names.type_of(said.get(name)) for name in ("weight", "activation", "output")}
    told.tell(KERNEL_NAME, **spelt)
    axes = _axes(rule, inputs)
    if "rows" in axes:  # of one product, whose place in the layer is not told
        axes["summed"] = axes.pop("hidden", None)
    told.tell(PROFILE, **axes)
    told.tell(PROFILE, **_types(rule, inputs, names, packed="packed" in told.values))
    told.tell(ANNOTATED, tokens=known.step_tokens)
    why_not = _from_card(known, told.tell, told.values)
    _assume(told)
    _local(known, told.tell, told.values)
    told.values.pop("packed", None)
    sources = {name: source for name, source in told.sources.items() if name in told.values}
    scales = scale_bytes(known, str(told.values["weight"]))
    return Shape(**told.values, scale_bytes=scales, sources=sources, why_not=why_not)


def _assume(told: _Told) -> None:
    told.tell(ASSUMED, weight="bf16", activation="bf16")
    activation = told.values["activation"]
    told.tell(ASSUMED, output=activation if activation in ("fp32", "fp16") else "bf16")
    if "inner" in told.values and "hidden" in told.values:
        told.tell(ASSUMED, gated=True)


def scale_bytes(known: Known, weight: str) -> float:
    """Of a type that always has as many, else as the card's precision says; TraceLens counts none."""
    if not known.given.scales:
        return 0.0
    precision = known.card.expert_precision if known.card else ""
    if weight in SCALE_BYTES or CARD_TYPES.get(precision) != weight:
        return SCALE_BYTES.get(weight, 0.0)
    return (BITS_PER_WEIGHT[precision] - BITS_PER_WEIGHT[weight]) / 8


def _from_card(known: Known, tell: Any, values: Mapping[str, Any]) -> str:
    """A card's widths are the whole model's: of a run on several ranks one must know how they were cut."""
    card, given = known.card, known.given
    if card is None:
        return "" if "inner" in values else NO_CARD
    tell(CARD, hidden=card.hidden_size, experts=card.n_experts, top_k=card.top_k, gated=card.gated)
    tell(CARD, weight=CARD_TYPES.get(card.expert_precision))
    if "inner" in values:
        return ""
    if (known.ranks or 1) > 1 and not given.says_ranks:
        return (
            f"the run had {known.ranks} ranks, and the profile does not say how experts were cut: pass "
            f"diagnose.tensor_parallel={known.ranks} or diagnose.expert_parallel={known.ranks}"
        )
    parts = given.tensor_parallel or 1
    if card.expert_size % parts:
        return f"diagnose.tensor_parallel={parts} does not divide the experts' width {card.expert_size}"
    cut = f", / {parts} ranks" if parts > 1 else ""
    tell(f"{CARD}{cut}", inner=card.expert_size // parts)
    return ""


def _local(known: Known, tell: Any, values: dict[str, Any]) -> None:
    """Weights that were passed are this rank's own; of all others expert parallelism leaves a part."""
    experts, here = values.get("experts"), values.pop("experts_here", None)
    total = known.card.n_experts if known.card else None
    if here is not None:
        ranks = known.given.expert_parallel or 1
        source = CARD if total else f"profile, x {ranks} ranks" if ranks > 1 else PROFILE
        tell(source, experts=total or here * ranks)
        tell(PROFILE, local_experts=here)
    elif experts is not None and (known.given.expert_parallel or 1) > 1:
        tell(TYPED, local_experts=max(1, experts // int(known.given.expert_parallel or 1)))


def _axes(rule: Rule | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes by the names that the rule gives to the axes of its inputs."""
    if rule is None:
        return {}
    found: dict[str, int] = {}
    is_weight: set[str] = set()
    packing = 1
    for axes, dims in zip(rule.dims, _listed(inputs, "Input Dims"), strict=False):
        if axes is None or not _are_sizes(dims, len(axes)):
            continue
        of_weights = axes[0] == "experts" and len(axes) == 3
        for axis, size in zip(axes, dims, strict=True):
            if axis == "hidden" and of_weights and 0 < size < found.get("hidden", 0):
                packing = found["hidden"] // size  # several weights in an element
            found.setdefault(axis, size)
            is_weight |= {axis} if of_weights else set()
    return _settled(found, is_weight, packing, rule, inputs)


def _listed(inputs: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = inputs.get(name)
    return found if isinstance(found, (list, tuple)) else ()


def _are_sizes(dims: Any, n: int) -> bool:
    return (
        isinstance(dims, (list, tuple))
        and len(dims) == n
        and all(type(size) is int and 0 < size < LARGEST for size in dims)
    )


def _settled(
    found: dict[str, int], is_weight: set[str], packing: int, rule: Rule, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    out: dict[str, Any] = {**found}
    if "inner" in found:
        out["inner"] = found["inner"] * packing
    up = out.pop("up", None)
    if "inner" in out and up in (out["inner"], 2 * out["inner"]):
        out["gated"] = up != out["inner"]
    if "experts" in is_weight:
        out["experts_here"] = out.pop("experts")
    if packing > 1:
        out["packed"] = packing
    concrete = _listed(inputs, "Concrete Inputs")
    for axis, place in rule.concrete.items():
        if place < len(concrete) and str(concrete[place]).isdigit():
            out.setdefault(axis, int(concrete[place]))
    return out


def _types(
    rule: Rule | None, inputs: Mapping[str, Any], names: Names, *, packed: bool
) -> dict[str, str | None]:
    if rule is None:
        return {}
    told: dict[str, str | None] = {}
    for axes, spelt in zip(rule.dims, _listed(inputs, "Input type"), strict=False):
        if axes is None:
            continue
        kind = names.type_of(str(spelt))
        if axes[0] == "experts" and len(axes) == 3:
            told.setdefault("weight", _of_weights(kind, packed=packed))
        elif axes[0] in ("tokens", "rows") and axes[-1] in ("hidden", "inner"):
            told.setdefault("activation", kind)
    return told


def _of_weights(kind: str | None, *, packed: bool) -> str | None:
    """Elements that hold several weights hold four bits of each; a plain byte that holds one is no int4."""
    if packed:
        return "int4" if kind in (None, "int4", "int8") else kind
    return "int8" if kind == "int4" else kind
