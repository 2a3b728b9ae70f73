"""One MoE layer by our kernels and by every installed peer, against what the machine can do at best. Prints CSV rows.

    python scripts/bench/bench_kernels.py [--quick] [--models NAME...] [--csv FILE]

On a GPU: every shape below, decode and prefill, uniform, Zipf and one-sided routing, three sets of weights in turn (one
layer would stay in L2). `floor_us` is the larger of two times: all distinct experts and the tokens, at the bandwidth of
reading; the operations, at the rate of a square product; both measured by this run. Without a GPU sizes are an eighth
and what is timed as ours is the torch definition: such rows say nothing about the kernels.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch
from machine import describe
from moe_peers import Compute, Peer, Weights, drawn, peers
from roofs import DEVICE, ON_GPU, Roof, Taken, clock_of, roof_of, taken_by
from torch import Tensor

from prefetch.kernels.experts import apply_experts, combine
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.plan import plan
from prefetch.kernels.routing import route
from prefetch.kernels.shipped import config_of, path_of

N_SETS = 3
SHAPES = {  # experts, choices, hidden, inner
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek_v2_lite": (64, 6, 2048, 1408),
    "mixtral_8x7b": (8, 2, 4096, 14336),
    "gpt_oss_20b": (32, 4, 2880, 2880),
    "qwen3_235b_a22b": (128, 8, 4096, 1536),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 2048, 4096, 16384)
FEW_TOKENS = (1, 4, 16, 64)
ROUTINGS = ("uniform", "zipf", "one")  # one: all tokens on the same k experts
LARGEST_ERROR = 0.05  # of the largest output: peers round to bfloat16 between the products


@dataclass(frozen=True)
class Row:
    machine: str
    commit: str
    torch: str
    triton: str
    model: str
    experts: int
    choices: int
    hidden: int
    inner: int
    dtype: str
    tokens: int
    routing: str
    distinct: float  # experts, mean of the sets
    what: str
    clock: str
    median_us: float
    low_us: float
    high_us: float
    floor_us: float | str
    floor_share: float | str  # floor / median: 1 is the best that could be
    times_ours: float  # median / ours: above 1 is slower than ours


@dataclass(frozen=True)
class Case:
    """A shape with its routings, one per set of weights."""

    named: dict[str, str]  # machine and versions
    model: str
    layout: ExpertLayout
    sets: list[Weights]
    x_TD: Tensor
    routings: list[tuple[Tensor, Tensor]]
    routing: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, choices, experts."""
        return *self.routings[0][0].shape, len(self.sets[0].slot_E)

    @property
    def distinct(self) -> float:
        return statistics.mean(len(ids_TK.unique()) for ids_TK, _ in self.routings)

    def floor_us(self, roof: Roof) -> float:
        (T, K, _), D, F = self.sizes, self.layout.hidden, self.layout.inner
        moved = self.distinct * 3 * D * F + 2 * T * D
        return roof.us(moved * self.layout.dtype.itemsize, 6 * T * K * D * F)

    def sum_floor_us(self, roof: Roof) -> float:
        T, K, _ = self.sizes
        return roof.us(T * self.layout.hidden * (K * 4 + self.layout.dtype.itemsize))

    def timed(self, computes: Sequence[Callable[..., object]], *, graph: bool) -> Taken:
        def run() -> None:
            for compute, routing in zip(computes, self.routings, strict=True):
                compute(self.x_TD, *routing)

        return taken_by(run, graph=graph).each(N_SETS)

    def row(self, what: str, clock: str, taken: Taken, floor_us: float, ours_us: float) -> Row:
        T, K, E = self.sizes
        return Row(
            **self.named, model=self.model, experts=E, choices=K, hidden=self.layout.hidden,
            inner=self.layout.inner, dtype=str(self.layout.dtype).removeprefix("torch."), tokens=T,
            routing=self.routing, distinct=round(self.distinct, 1), what=what, clock=clock,
            median_us=round(taken.median, 2), low_us=round(taken.low, 2),
            high_us=round(taken.high, 2), floor_us=round(floor_us, 2) if floor_us else "",
            floor_share=round(floor_us / taken.median, 3) if floor_us else "",
            times_ours=round(taken.median / ours_us, 2),
        )  # fmt: skip


def routings_of(kind: str, n_tokens: int, n_experts: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """A fresh one for every set of weights; the experts of a token are distinct."""
    of = []
    for seed in range(N_SETS):
        draw = torch.Generator().manual_seed(seed)
        weight_E = 1 / torch.arange(1, n_experts + 1) if kind == "zipf" else torch.ones(n_experts)
        ids_TK = torch.multinomial(weight_E.repeat(n_tokens, 1), k, generator=draw).int()
        if kind == "one":
            ids_TK = torch.arange(k, dtype=torch.int32).repeat(n_tokens, 1)
        weights_TK = torch.rand(n_tokens, k, generator=draw)
        of.append((ids_TK.to(DEVICE), (weights_TK / weights_TK.sum(1, keepdim=True)).to(DEVICE)))
    return of


def rows_of(case: Case, roof: Roof) -> Iterator[Row]:
    """Ours, every peer that computes the same, and the stages of ours."""
    ours_us, expected_TD = 0.0, case.sets[0].pool_EN[:0]
    for same in zip(*(peers(weights) for weights in case.sets), strict=True):
        try:
            found_TD = computed(case, same[0])
            expected_TD = expected_TD if ours_us else found_TD
            check(found_TD, expected_TD)
            taken, clock = timed(case, same)
        except (RuntimeError, ValueError) as error:  # of libraries that are not ours
            if not ours_us:
                raise
            note(f"{same[0].name}, {case.model}, {case.sizes[0]} tokens, left out: {error}")
            continue
        ours_us = ours_us or taken.median
        yield case.row(same[0].name, clock, taken, case.floor_us(roof), ours_us)
    for what, (computes, floor_us) in stages(case, roof).items():
        taken = case.timed(computes, graph=True)
        yield case.row(f"ours: {what}", clock_of(True), taken, floor_us, ours_us)


def computed(case: Case, peer: Peer) -> Tensor:
    T, K, _ = case.sizes
    if peer.bytes_of(T * K) > spare_bytes():
        raise ValueError(f"it copies {peer.bytes_of(T * K) / 1e9:.1f} GB of weights")
    return peer.compute(case.x_TD, *case.routings[0]).float()


def check(found_TD: Tensor, expected_TD: Tensor) -> None:
    """Times of different answers are not compared."""
    error = float((found_TD - expected_TD).abs().max() / expected_TD.abs().max())
    if not error <= LARGEST_ERROR:
        raise ValueError(f"it is off from ours by {error:.1e} of the largest output")


def timed(case: Case, same: tuple[Peer, ...]) -> tuple[Taken, str]:
    """In a graph where the peer does not wait for the device; some find out only when they are asked."""
    computes = [peer.compute for peer in same]
    if not same[0].waits:
        try:
            return case.timed(computes, graph=True), clock_of(True)
        except RuntimeError as error:
            note(f"{same[0].name} in no graph: {str(error).splitlines()[0]}")
    return case.timed(computes, graph=False), clock_of(False)


def stages(case: Case, roof: Roof) -> dict[str, tuple[list[Callable[..., object]], float]]:
    """The parts of ours by themselves, with their floors. Routing is before what the peers are timed at."""
    T, K, E = case.sizes
    logits_TE = torch.randn(T, E, device=DEVICE)
    rows_TKD = torch.zeros(T, K, case.layout.hidden, device=DEVICE)
    path = path_of(T, K)
    block = config_of(path, case.layout, T * K, E).up.rows

    def applied(of: Weights) -> Callable[[Tensor, Tensor, Tensor], None]:
        def run(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
            apply_experts(x_TD, ids_TK, weights_TK, of.pool_EN, of.layout, of.slot_E, rows_TKD)

        return run

    slot_E, dtype = case.sets[0].slot_E, case.layout.dtype
    routed: Callable[..., object] = lambda x, ids, weights: route(logits_TE, K)  # noqa: E731
    planned: Callable[..., object] = lambda x, ids, weights: plan(ids, slot_E, block)  # noqa: E731
    summed: Compute = lambda x, ids, weights: combine(rows_TKD, ids, dtype=dtype)  # noqa: E731
    every = {"route": ([routed] * N_SETS, 0.0), "plan": ([planned] * N_SETS, 0.0)}
    every |= {f"rows, {path}": ([applied(of) for of in case.sets], case.floor_us(roof))}
    every |= {"combine": ([summed] * N_SETS, case.sum_floor_us(roof))}
    return {name: of for name, of in every.items() if name != "plan" or path != "decode"}


def spare_bytes() -> int:
    return torch.cuda.mem_get_info()[0] // 2 if ON_GPU else 2**28


def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    commit, _, rest = describe().removeprefix("commit ").partition(", ")
    name = torch.cuda.get_device_name() if ON_GPU else rest
    triton = metadata.version("triton") if ON_GPU else "not used"
    return {"machine": name, "commit": commit, "torch": torch.__version__, "triton": triton}


def all_rows(models: list[str], quick: bool) -> Iterator[Row]:
    dtype, shrink = (torch.bfloat16, 1) if ON_GPU else (torch.float32, 8)
    roof, named = roof_of(dtype), machine()
    rates = roof.read_bytes_per_s / 1e9, roof.operations_per_s / 1e12
    note(f"measured roofs: reading {rates[0]:.0f} GB/s, {dtype} product {rates[1]:.2f} Top/s")
    for model in models:
        E, k, hidden, inner = SHAPES[model]
        layout = ExpertLayout(hidden // shrink, inner // shrink, dtype)
        sets = [drawn(E, layout, seed, DEVICE) for seed in range(N_SETS)]
        for n_tokens in TOKENS if ON_GPU and not quick else FEW_TOKENS:
            draw = torch.Generator().manual_seed(n_tokens)
            x_TD = torch.randn(n_tokens, layout.hidden, generator=draw).to(DEVICE, dtype)
            for routing in ROUTINGS[:1] if quick else ROUTINGS:
                routings = routings_of(routing, n_tokens, E, k)
                case = Case(named, model, layout, sets, x_TD, routings, routing)
                yield from rows_of(case, roof)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="uniform routing, four sizes")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    asked = parser.parse_args()
    if not ON_GPU:
        note("no GPU: ours is the torch definition, sizes are an eighth; no kernel is timed")
    with ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(asked.csv.open("w", newline=""))] if asked.csv else []
        outputs = [csv.writer(file, lineterminator="\n") for file in (sys.stdout, *files)]
        for output in outputs:
            output.writerow([of.name for of in fields(Row)])
        for row in all_rows(asked.models, asked.quick):
            for output in outputs:
                output.writerow(asdict(row).values())
            sys.stdout.flush()


if __name__ == "__main__":
    main()
