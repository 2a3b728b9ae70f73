"""What recording costs: a forward pass with router hooks against a plain one of the same model. One row per size.

    OMP_NUM_THREADS=1 python scripts/bench/bench_hooks.py

Rounds are interleaved and swap their order, and the ratio is the median of the ratios of pairs, so that a slow
moment of the machine meets both; the clock counts the CPU time of this one thread, not of its neighbours. `hooks`
is what runs inside the forward pass; `+ read and control` adds what a capture does after it: reading the routing,
applying every router again, and copying the ids.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import transformers
from machine import describe

from prefetch.models.capture import RouterHooks, decide

ROUNDS = 15
SIZES = [(64, 8, 32, 64), (64, 8, 32, 1024), (256, 8, 64, 256), (512, 4, 64, 512)]


def model_of(hidden: int, layers: int, experts: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        num_experts=experts,
        num_experts_per_tok=4,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def paired(plain: Callable[[], object], other: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of the plain run, median of the paired ratios, and half their spread."""
    pairs = []
    for round_ in range(ROUNDS + 1):
        first, second = (plain, other) if round_ % 2 else (other, plain)
        times = seconds(first), seconds(second)
        pairs.append(times if round_ % 2 else times[::-1])
    ratios = sorted(b / a for a, b in pairs[1:])  # the first round warms up
    quarter = len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2
    return statistics.median(a for a, _ in pairs[1:]), statistics.median(ratios), spread


@torch.no_grad()
def measure(hidden: int, layers: int, experts: int, tokens: int) -> None:
    torch.manual_seed(0)
    model = model_of(hidden, layers, experts)
    token_BS = torch.randint(512, (1, tokens))
    hooks = RouterHooks(model)

    def plain() -> None:
        model.base_model(input_ids=token_BS, use_cache=False)

    def hooked() -> None:
        with hooks:
            plain()
            hooks.take()

    def controlled() -> None:
        with hooks:
            plain()
            for slot, call in hooks.take().items():
                decide(hooks.layers[slot], call).routing.ids_NK.to(torch.int32).cpu().numpy()

    base, ratio, spread = paired(plain, hooked)
    _, whole, whole_spread = paired(plain, controlled)
    print(
        f"| {hidden} | {layers} | {experts} | {tokens} | {base * 1e3:.1f} | {ratio:.3f} ± {spread:.3f} | "
        f"{whole:.3f} ± {whole_spread:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{describe()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        "| hidden | layers | experts | tokens | plain CPU ms | hooks / plain | + read and control / plain |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in SIZES:
        measure(*size)
