"""What to type for llama.cpp, which places the experts of a layer together: they are one tensor per matrix.

It counts whole layers and nothing else. Read at ggml-org/llama.cpp, commit 0c1e57098: the options in common/arg.cpp;
what --n-cpu-moe matches (blk.0 to blk.N-1, of model layers, dense ones included) in common/common.h; that patterns are
searched for, and the first one that is found decides, in src/llama-model-loader.cpp; the tensors' names in
src/llama-arch.cpp; that the -np slots share the -c tokens in src/llama-context.cpp.
What is not in it: the cache of single experts in the description of pull request 27861 (written 2026-08-28, open when
read), and the most used experts beside a computing host in the README of the fork thecodacus/llama.cpp (23604b992).
"""

from __future__ import annotations

from prefetch.sim.memory import spoken
from prefetch.sim.settings.placement import (
    HOST,
    STATIC,
    Block,
    Placement,
    no_such,
    spelled,
    whole,
)

ENGINE, READ_AT = "llama.cpp", "ggml-org/llama.cpp commit 0c1e57098"
# LLM_FFN_EXPS_REGEX: routed experts with a gate beside or fused to the up projection; no shared ones (ffn_up_shexp)
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
PULL = "only in pull request 27861, open when read"
FORK = "only in the fork thecodacus/llama.cpp, for some models"


def llama_cpp(placement: Placement) -> Block:
    """The first layers on the GPU as they were simulated, and as many by the shorter option, which keeps the last."""
    card, host, first = placement.card, host_layers(placement), first_on_gpu(placement)
    if placement.has_encoder:
        return no_such(ENGINE, READ_AT, card)
    start = (
        f"llama-server -m MODEL.gguf -ngl {max(99, card.layer_numbers[-1] + 2)} "
        f"-c {placement.context * placement.batch} -np {placement.batch}"
    )
    if not host:
        return whole(ENGINE, READ_AT, card, start)
    is_exact, why = _reach(placement)
    others = [number for number in card.layer_numbers if number < first]
    says = (
        why,
        f"First command: {_where(placement, host)}, counted at {card.expert_precision}.",
        "Second, shorter: --n-cpu-moe counts the model's layers from 0 and keeps the last on the GPU: "
        f"{_where(placement, others)}.",
    )
    commands = f'{start} -ot "{pattern(host)}=CPU"', f"{start} --n-cpu-moe {first}"
    return Block(ENGINE, READ_AT, is_exact, says, commands)


def pattern(numbers: list[int]) -> str:
    """Finds the routed experts' tensors of these layers: what --n-cpu-moe looks for, layer by layer."""
    return rf"blk\.({'|'.join(map(str, numbers))}){EXPERTS}"


def host_layers(placement: Placement) -> list[int]:
    """True numbers of the layers after those that fit from the first on."""
    layers = zip(placement.card.layer_numbers, placement.is_gpu_L, strict=True)
    return [number for number, is_gpu in layers if not is_gpu]


def first_on_gpu(placement: Placement) -> int:
    """N of --n-cpu-moe: the experts of model layers 0 to N-1 stay on the host, and those of the others fit."""
    card, left = placement.card, placement.room_bytes
    first = card.layer_numbers[-1] + 1
    for number, size in zip(reversed(card.layer_numbers), reversed(placement.size_L), strict=True):
        left -= size * card.n_experts
        if left < 0:
            break
        first = number
    return first


def _reach(placement: Placement) -> tuple[bool, str]:
    """Can llama.cpp do what was simulated, and if not, why not?"""
    way, is_gpu_LE = placement.way, placement.is_gpu_LE
    if way == STATIC and is_gpu_LE is not None:
        left, where = int(is_gpu_LE[~placement.is_gpu_L].sum()), host_layers(placement)[0]
        why = f"Whole layers only: the {left} experts of layer {where} that would still fit go to the host."
        return (False, why) if left else (True, "As simulated.")
    why = f"Whole layers only, so not '{placement.told}'; nearest: as many layers as fit."
    slots = placement.room_bytes // sum(placement.size_L)
    if not slots:
        return False, why
    if way == HOST:
        why += (
            f" The most used experts alone (--moe-cache-slots {slots} beside --cpu-moe) are {FORK}."
        )
    else:
        why += f" A cache of experts (--moe-expert-cache {slots} beside --cpu-moe) is {PULL}."
    return False, why


def _where(placement: Placement, host: list[int]) -> str:
    layers = zip(placement.card.layer_numbers, placement.size_L, strict=True)
    left = placement.card.n_experts * sum(size for number, size in layers if number not in host)
    return f"experts of layers {spelled(host)} on the host, {spoken(left)} of others on the GPU"
