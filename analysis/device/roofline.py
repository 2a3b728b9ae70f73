"""What a MoE operation costs at least, and how near to that it came.

Operations and bytes by formula (those of TraceLens, so that its tables can be compared), peak rates by number type. It
reads no file. A 4-bit weight beside wider tokens is computed in the tokens' type: that is the rate it can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from analysis.device.shapes import Shape
from prefetch.sim.hardware import NS_PER_S, Hardware

BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "mxfp4": 0.5,
    "int4": 0.5,
}
WIDTH = {"fp32": 4, "bf16": 3, "fp16": 3, "fp8": 2, "int8": 2, "fp4": 1, "mxfp4": 1, "int4": 1}
WIDER = {
    "fp4": "fp8",
    "fp8": "bf16",
    "int8": "bf16",
    "bf16": "fp32",
    "fp16": "fp32",
}  # where there are no such units
COMPUTE, MEMORY = "compute", "memory"
INDEX_BYTES = 4
SAME_RATE = {"fp16": "bf16", "bf16": "fp16"}  # where only one of the two is told
PRODUCTS = ("experts", "up", "down", "gemm")
SCORES = "fp32"  # of routers


@dataclass(frozen=True)
class Cost:
    """Of one call. Weights are read once by whoever is active, tokens once in and once out."""

    flops: float
    n_bytes: float
    arithmetic: str
    active_experts: float | None = None
    on_network: bool = False  # its bytes cross between ranks, for which no rate is known


@dataclass(frozen=True)
class Peaks:
    """What a device can do per second; a type that is not there has no units of its own."""

    name: str
    bytes_per_s: float
    operations_per_s: Mapping[str, float] = field(hash=False)
    source: str = ""

    def rate(self, arithmetic: str) -> tuple[float, str] | None:
        """Operations per second, and in which type they really run."""
        asked: str | None = arithmetic
        while asked is not None:
            twin = self.operations_per_s.get(SAME_RATE.get(asked, asked))
            if rate := self.operations_per_s.get(asked) or twin:
                return rate, asked
            asked = WIDER.get(asked)
        return None


@dataclass(frozen=True)
class Judged:
    """One call against the roofline."""

    cost: Cost
    roofline_ns: float
    bound: str
    efficiency: float  # roofline / measured; above 1 something is not as assumed
    ran_in: str

    @property
    def is_anomaly(self) -> bool:
        return self.efficiency > 1


def peaks_of(hardware: Hardware, *, host: bool = False) -> Peaks:
    if host:
        rates = {"fp32": float(hardware.host.operations_per_s)}
        return Peaks(f"{hardware.name}, host", hardware.host.bytes_per_s, rates, "hardware file")
    table = vars(hardware.device.operations_per_s)
    rates = {name: float(rate) for name, rate in table.items() if rate}
    return Peaks(
        hardware.name, hardware.device.bytes_per_s, rates, f"hardware file, {hardware.kind}"
    )


def active_experts(tokens: float, experts: int, top_k: int) -> float:
    """How many are needed on average when every token takes any k with equal chance: nobody's routing is so even."""
    return experts * (1 - (max(0, experts - top_k) / experts) ** tokens)


def arithmetic_of(weight: str, activation: str) -> str:
    """The wider of the two; two of four bits have units of their own, if they are floating point."""
    wide = max((activation, weight), key=lambda kind: WIDTH[kind])
    return {"mxfp4": "fp4", "int4": "int8"}.get(wide, wide)


def cost_of(role: str, shape: Shape, active: float | None = None) -> Cost | None:
    """None where a number is missing. `active`: experts that were needed, if routing is known."""
    if role not in FORMULAS or shape.missing(role):
        return None
    if active is None and role in PRODUCTS:
        active = _expected(shape, role)
    return FORMULAS[role](_Sizes(shape), active)


def _expected(shape: Shape, role: str) -> float:
    assert shape.experts is not None
    if role == "gemm":
        k, here = shape.top_k or 1, shape.local_experts or shape.experts
        if k > 1 and here == shape.experts and (shape.rows or 0) % k == 0:
            return active_experts((shape.rows or 0) // k, here, k)  # a token's choices differ
        return active_experts(shape.rows or 0, here, 1)
    return active_experts(shape.tokens or 0, shape.experts, shape.top_k or 1) * shape.local_share


class _Sizes:
    """Sizes as plain numbers, by the letters of the formulas."""

    def __init__(self, shape: Shape) -> None:
        number: Any = lambda value: float(value or 0)  # noqa: E731
        self.M, self.K, self.N = number(shape.tokens), number(shape.hidden), number(shape.inner)
        self.E, self.k, self.choices = number(shape.experts), number(shape.top_k), shape.choices
        self.rows, self.width = number(shape.rows), number(shape.width)
        self.summed = number(shape.summed)
        self.g = 2 if shape.gated else 1
        weight, activation, output = (
            shape.weight or "bf16",
            shape.activation or "bf16",
            shape.output or "bf16",
        )
        self.b_w = BYTES[weight] + shape.scale_bytes
        self.b_in, self.b_out = BYTES[activation], BYTES[output]
        self.arithmetic, self.plain = arithmetic_of(weight, activation), output
        self.weighing = max(0.0, 2 * self.choices - self.M) * self.K  # a product and a sum for each


def _experts(s: _Sizes, active: float | None) -> Cost:
    a = active or 0.0
    product = 2 * s.choices * s.K * s.N
    n_bytes = s.M * s.K * s.b_in + a * s.N * s.K * s.b_w * (s.g + 1) + s.M * s.K * s.b_out
    return Cost(product * s.g + product + s.weighing, n_bytes, s.arithmetic, a)


def _up(s: _Sizes, active: float | None) -> Cost:
    a = active or 0.0
    n_bytes = s.M * s.K * s.b_in + a * s.g * s.K * s.N * s.b_w + s.choices * s.N * s.b_out
    return Cost(2 * s.choices * s.K * s.N * s.g, n_bytes, s.arithmetic, a)


def _down(s: _Sizes, active: float | None) -> Cost:
    a = active or 0.0
    n_bytes = s.choices * s.N * s.b_in + a * s.N * s.K * s.b_w + s.M * s.K * s.b_out
    return Cost(2 * s.choices * s.N * s.K, n_bytes, s.arithmetic, a)


def _gemm(s: _Sizes, active: float | None) -> Cost:
    a = active or 0.0
    n_bytes = (
        s.rows * s.summed * s.b_in + a * s.summed * s.width * s.b_w + s.rows * s.width * s.b_out
    )
    return Cost(2 * s.rows * s.summed * s.width, n_bytes, s.arithmetic, a)


def _router(s: _Sizes, _: float | None) -> Cost:
    n_bytes = s.M * s.K * s.b_out + s.E * s.K * s.b_out + s.M * s.E * s.b_out
    return Cost(2 * s.M * s.K * s.E, n_bytes, s.plain)


def _routing(s: _Sizes, _: float | None) -> Cost:
    """Scores in, ids and weights of k choices out."""
    return Cost(0.0, s.M * s.E * s.b_out + s.M * s.k * (INDEX_BYTES + s.b_out), SCORES)


def _prepare(s: _Sizes, _: float | None) -> Cost:
    """Tokens in, and out in the type that the product reads."""
    return Cost(0.0, s.M * s.K * (s.b_out + s.b_in), SCORES)


def _permute(s: _Sizes, _: float | None) -> Cost:
    """Each token is read once, and written once for each of its experts."""
    return Cost(0.0, s.M * s.K * s.b_out + s.choices * s.K * s.b_in, SCORES)


def _activation(s: _Sizes, _: float | None) -> Cost:
    return Cost(0.0, s.choices * s.N * s.b_out * (s.g + 1), SCORES)


def _combine(s: _Sizes, _: float | None) -> Cost:
    """The outputs of a token's experts in, their weighted sum out."""
    n_bytes = (s.choices + s.M) * s.K * s.b_out
    return Cost(s.weighing, n_bytes, SCORES)


def _dispatch(s: _Sizes, _: float | None) -> Cost:
    return Cost(0.0, s.M * s.K * s.b_in, SCORES, on_network=True)


def _collect(s: _Sizes, _: float | None) -> Cost:
    return Cost(0.0, s.M * s.K * s.b_out, SCORES, on_network=True)


FORMULAS = {
    "experts": _experts, "up": _up, "down": _down, "gemm": _gemm, "router": _router, "routing": _routing,
    "prepare": _prepare, "permute": _permute, "activation": _activation, "combine": _combine,
    "dispatch": _dispatch, "collect": _collect,
}  # fmt: skip


def judge(cost: Cost, took_ns: float, peaks: Peaks) -> Judged | None:
    """None where the device has no rate for it, or nothing was measured."""
    rate = peaks.rate(cost.arithmetic)
    if rate is None or took_ns <= 0 or cost.on_network:
        return None
    compute_ns = cost.flops / rate[0] * NS_PER_S
    memory_ns = cost.n_bytes / peaks.bytes_per_s * NS_PER_S
    roofline_ns = max(compute_ns, memory_ns)
    bound = COMPUTE if compute_ns >= memory_ns else MEMORY
    return Judged(cost, roofline_ns, bound, roofline_ns / took_ns, rate[1])


def why_too_fast(
    role: str, shape: Shape, took_ns: float, peaks: Peaks, *, is_exact: bool = False
) -> str:
    """Over 100 %: whether any routing could explain it, or the time or the shape must be wrong."""
    if is_exact:
        return (
            "impossible on this device with the recorded routing: it is of another run, or the durations, the sizes, "
            "the number type or the hardware file are not those of this one"
        )
    fewest = float(shape.top_k or 1) * shape.local_share if role in PRODUCTS else None
    least = cost_of(role, shape, fewest)
    judged = judge(least, took_ns, peaks) if least is not None else None
    if judged is not None and not judged.is_anomaly and fewest is not None:
        return (
            f"possible if fewer experts were needed than even routing expects: with {fewest:.3g} of them it would be "
            f"{judged.efficiency:.0%} of the roofline; record the routing (trace=...) to know"
        )
    return (
        "impossible on this device whatever the routing: the durations, the sizes, the number type or the hardware "
        "file are not those of this run"
    )
