"""What the engine takes: the host per event, whole layers with every expert there, and models that run through it.

    python scripts/bench/bench_engine.py [cpu|cuda] [decisions|layers|models]     default: a GPU if there is one, all

Three tables. Decisions: a device that takes no time, so that what is left is the host's. Layers: drawn weights of a
model card's sizes (on a CPU: of a small card), the same layers without the engine in the same run. Models: tiny models
with random weights, beside transformers' own loop over experts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import describe

from prefetch.engine.backend import COMPUTE
from prefetch.engine.clock import DeviceClock
from prefetch.engine.cuda import need_device
from prefetch.engine.engine import Engine
from prefetch.engine.live import machine_without_clock
from prefetch.engine.offloaded import OffloadedMoE
from prefetch.engine.replay import drive
from prefetch.engine.validating.costs import Silent
from prefetch.models.cards import load_architecture
from prefetch.sim.engines.machine import Guesses, no_guesses
from prefetch.sim.engines.reference import Caches
from prefetch.sim.policies.lfru import Lfru
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.sim.tables.needed import Noise
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import DECODE, RoutingTrace, trace_of

ROUNDS, STEPS, SHARE, AHEAD, RECALL = 5, 60, 0.25, 4, 0.8
CARDS = {
    "cuda": ("qwen3_30b_a3b", "deepseek_v2_lite", "olmoe_1b_7b"),
    "cpu": ("granite_3_1b_a400m",),
}
LAYERS = {"cuda": 16, "cpu": 4}  # of a card: what the memory of a machine holds


def drawn(card: ModelCard, batch: int = 1) -> RoutingTrace:
    """Experts that some tokens in a row like."""
    rng, n_tokens = np.random.default_rng(0), STEPS * batch
    mood = rng.normal(size=(n_tokens // 16 + 1, card.n_layers, card.n_experts))
    score_TLE = np.repeat(mood, 16, axis=0)[:n_tokens] + rng.normal(
        size=(n_tokens, *mood.shape[1:])
    )
    ids_TLK = np.argsort(-score_TLE, axis=-1)[..., : card.top_k]
    request_T = np.repeat(np.arange(batch), STEPS)
    return trace_of(card, ids_TLK, request_T=request_T, phase_T=DECODE)


def cut(name: str, n_layers: int) -> ModelCard:
    """The first layers of a card; what stands beside its experts in proportion."""
    card = load_architecture(name).card(None, None)
    n_layers = min(n_layers, card.n_layers)
    part = {"dense_bytes": (card.dense_bytes or 0) * n_layers // card.n_layers}
    part["shared_bytes"] = (card.shared_bytes or 0) * n_layers // card.n_layers
    return replace(
        card,
        layer_numbers=card.layer_numbers[:n_layers],
        layer_stacks=card.layer_stacks[:n_layers],
        expert_bytes_L=(card.expert_bytes_L or ())[:n_layers],
        **part,
    )


class Plain(Engine):
    """With the caches that define what is decided."""

    caches_of = Caches


def engine_of(
    backend: Any,
    work: Workload,
    share: float,
    guesses: Guesses,
    *,
    kind: type[Engine] = Engine,
    policy: Policy | None = None,
    is_global: bool = False,
    **start: Any,
) -> Engine:
    card = work.card
    each = max(1, round(share * card.n_experts))
    machine = machine_without_clock(card, 2)
    rooms = [each * card.n_layers] if is_global else [each] * card.n_layers
    told = (work, policy or Lru(), rooms, [1] * card.n_layers, machine, guesses)
    return kind(backend, each * card.n_layers + 2, *told, **start)


def decisions() -> None:
    """Both kinds of caches in turns: in brackets how much longer the definition's take, the median of ratios."""
    print(f"\n## Decisions: µs per event, a cache of {SHARE:.0%}, batch 1\n")
    ways: dict[str, dict[str, Any]] = {
        "LRU": {},
        "LRU, with guesses": {"ahead": True},
        "one cache for all": {"is_global": True},
        "... with guesses": {"is_global": True, "ahead": True},
        "one for all, LFRU": {"is_global": True, "policy": Lfru()},
    }
    print(f"| shape | {' | '.join(ways)} | every expert there |\n|---|{'---|' * (len(ways) + 1)}")
    for name in ("qwen3_30b_a3b", "deepseek_v2_lite", "gpt_oss_20b"):
        card = cut(name, 99)
        work = workload_of(drawn(card))
        everyone = np.arange(card.n_layers * card.n_experts)
        cells = [compared(work, **way) for way in ways.values()]
        all_there = [host_us(work, 1.0, no_guesses(), warm=everyone) for _ in range(ROUNDS)]
        shape = f"{card.n_layers} x {card.n_experts}, k = {card.top_k}"
        print(f"| {shape} | {' | '.join(cells)} | {median(all_there):.1f} |", flush=True)


def compared(work: Workload, *, ahead: bool = False, **how: Any) -> str:
    guesses = Noise(work, 0).guesses(RECALL, AHEAD) if ahead else no_guesses()
    took: dict[type[Engine], list[float]] = {Engine: [], Plain: []}
    host_us(work, SHARE, guesses, **how)  # compiles
    for _ in range(ROUNDS):
        for kind, each in took.items():
            each.append(host_us(work, SHARE, guesses, kind=kind, **how))
    ratio = median(plain / quick for quick, plain in zip(took[Engine], took[Plain], strict=True))
    return f"{median(took[Engine]):.1f} ({ratio:.1f}x)"


def host_us(work: Workload, share: float, guesses: Guesses, **how: Any) -> float:
    engine = engine_of(Silent(), work, share, guesses, **how)
    began = time.perf_counter()
    drive(engine, work)
    return (time.perf_counter() - began) / (work.n_steps * work.card.n_layers) * 1e6


def layers(device: torch.device) -> None:
    print(f"\n## Layers: ms per step on {device.type}, drawn weights\n")
    print(
        "| model, layers | batch | without the engine | every expert there / without | 50 % | 25 % | 25 %, guesses |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in CARDS[device.type]:
        card = cut(name, LAYERS[device.type])
        for batch in (1, 4):
            rows = [of_layers(card, batch, device) for _ in range(ROUNDS)]
            bare = median(row["bare"] for row in rows)
            there = [row["there"] / row["bare"] for row in rows]
            spread = f"{median(there):.3f} [{min(there):.3f}..{max(there):.3f}]"
            others = " | ".join(
                f"{median(row[way] for row in rows):.2f}" for way in ("half", "few", "ahead")
            )
            print(
                f"| {card.name}, {card.n_layers} | {batch} | {bare:.2f} | {spread} | {others} |",
                flush=True,
            )


def of_layers(card: ModelCard, batch: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per step, one way after the other."""
    trace = drawn(card, batch)
    work = workload_of(trace, batch=batch)
    clock = DeviceClock(card, trace.ids_TLK, device=device.type, lookup_bytes=0, seed=0)
    n_entries, n_experts = card.n_layers * card.n_experts, card.n_experts
    make, noise = clock.backend(work), Noise(work, 0)

    def through(share: float, guesses: Guesses, warm: Any) -> float:
        backend = make(max(1, round(share * n_experts)) * card.n_layers + 2)
        engine = engine_of(backend, work, share, guesses, warm=warm)
        took = drive(engine, work).timed.time_S.sum() / work.n_steps / 1e6
        backend.close()
        return float(took)

    with torch.no_grad():
        few = np.arange(n_entries)
        return {
            "bare": bare(make(n_entries + 2), work),
            "there": through(1.0, no_guesses(), few),
            "half": through(0.5, no_guesses(), few),
            "few": through(SHARE, no_guesses(), few),
            "ahead": through(SHARE, noise.guesses(RECALL, AHEAD), few),
        }


def bare(backend: Any, work: Workload) -> float:
    """The same layers, launched one after the other: no engine, no copies."""
    n_layers, n_experts, body = work.card.n_layers, work.card.n_experts, backend.body
    rows = [{e: layer * n_experts + e for e in range(n_experts)} for layer in range(n_layers)]
    began = 0.0
    for step in range(-1, work.n_steps):
        began = time.perf_counter() if step == 0 else began  # the first warms up
        for layer in range(n_layers):
            body.before(max(0, step), layer)
            body.launch(layer, {}, rows[layer])
            body.combine(layer)
        backend.wait([backend.record(COMPUTE)])
    took = (time.perf_counter() - began) / work.n_steps * 1e3
    backend.close()
    return took


def models(device: torch.device) -> None:
    import transformers

    print(
        f"\n## Models on {device.type}: ms per generated token, ratios to transformers' eager experts\n"
    )
    print(
        "| family | eager | batched_mm | grouped_mm | offloaded, all | 50 % | 25 % |\n|---|---|---|---|---|---|---|"
    )
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
             "head_dim": 64, "vocab_size": 500, "num_experts": 32, "num_experts_per_tok": 4}  # fmt: skip
    for family, inner in (
        ("qwen3_moe", {"moe_intermediate_size": 256}),
        ("olmoe", {"intermediate_size": 256}),
    ):
        config = transformers.AutoConfig.for_model(family, **sizes, **inner, eos_token_id=None)

        def made(implementation: str, config: Any = config) -> Any:
            torch.manual_seed(0)
            cls = transformers.AutoModelForCausalLM
            return cls.from_config(config, experts_implementation=implementation).to(device).eval()

        ways: dict[str, Callable[[], Any]] = {
            **{
                name: (lambda name=name: made(name))
                for name in ("eager", "batched_mm", "grouped_mm")
            },
            **{
                f"{share}": (lambda share=share: OffloadedMoE(made("eager"), capacity=share))
                for share in (1.0, 0.5, 0.25)
            },
        }
        took = {name: [] for name in ways}  # type: dict[str, list[float]]
        running = {name: make() for name, make in ways.items()}
        for _ in range(ROUNDS):
            for name, model in running.items():
                took[name].append(per_token_ms(model, device))
        ratios = [
            median(a / b for a, b in zip(took[name], took["eager"], strict=True))
            for name in ways
            if name != "eager"
        ]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {family} | {median(took['eager']):.2f} | {cells} |", flush=True)


def per_token_ms(model: Any, device: torch.device) -> float:
    prompt = torch.arange(16, device=device)[None]
    tokens, began = 24, time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return (time.perf_counter() - began) / tokens * 1e3


def main(name: str = "auto", *tables: str) -> None:
    device = need_device(name)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{describe()}, torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    of_device = {"layers": lambda: layers(device), "models": lambda: models(device)}
    known: dict[str, Callable[[], None]] = {"decisions": decisions, **of_device}
    for table in tables or known:
        known[table]()


if __name__ == "__main__":
    main(*sys.argv[1:])
