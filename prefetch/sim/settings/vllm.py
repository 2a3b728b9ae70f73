"""What to type for vLLM, which computes every expert on the GPU and reads or copies there what it keeps on the host.

It knows no speed. Read in vLLM 0.33.0 (commit 4ba787ec9): the options in vllm/engine/arg_utils.py, their meaning in
vllm/config/offload.py; that --cpu-offload-gb takes whole tensors from the first layer on, until so much is out, in
vllm/model_executor/offloader/uva.py; that groups count model layers from 0 and buffers hold --offload-prefetch-step
layers, in prefetch.py beside it. The cache of single experts: pull request 37190, open when read (written 2026-03-16).
"""

from __future__ import annotations

import math

from prefetch.sim.memory import spoken
from prefetch.sim.settings.placement import ALL, Block, Placement, no_such, whole

ENGINE, READ_AT = "vLLM", "vLLM 0.33.0"
PULL = "only in pull request 37190, open when read: --moe-expert-cache-size"
EXPERTS = "experts"  # a segment of the tensors' names: mlp.experts.w13_weight; that of shared ones is another
HUNDREDTH = 2**30 / 100


def vllm(placement: Placement) -> Block:
    """Nothing that is simulated here: experts that are read where they lie, or whole layers copied in every step."""
    card, out = placement.card, bytes_out(placement)
    if placement.has_encoder:
        return no_such(ENGINE, READ_AT, card)
    start = f"vllm serve MODEL --max-model-len {placement.context} --max-num-seqs {placement.batch}"
    if out == 0:
        return whole(ENGINE, READ_AT, card, start)
    says = (
        f"vLLM computes all experts on the GPU and keeps no cache of single ones ({PULL}), so not '{placement.told}'.",
        f"First command: {spoken(out)} of experts (at {card.expert_precision}) lie on the host, those of the first "
        "layers; the GPU reads over the link what it uses, in every step anew.",
    )
    command = f"{start} --cpu-offload-gb {gib_out(placement):.2f} --cpu-offload-params {EXPERTS}"
    said, more = _streamed(placement, start)
    return Block(ENGINE, READ_AT, False, (*says, *said), (command, *more))


def bytes_out(placement: Placement) -> int:
    """Of experts, that do not fit."""
    if placement.way == ALL:
        return 0
    return max(0, (placement.card.all_expert_bytes or 0) - placement.room_bytes)


def gib_out(placement: Placement) -> float:
    """Rounded up: whole tensors are taken until so much is out."""
    return math.ceil(bytes_out(placement) / HUNDREDTH) / 100


def groups(placement: Placement) -> tuple[int, int] | None:
    """(G, N): the last N of every G model layers leave the GPU, the fewest bytes, then the smallest groups, that fit.

    None if not even the buffer of one layer fits.
    """
    card, best = placement.card, list[tuple[int, int, int]]()
    each = [size * card.n_experts for size in placement.size_L]
    bytes_of = dict(zip(card.layer_numbers, each, strict=True))
    needed = bytes_out(placement) + max(each)  # the buffer lies on the GPU
    for size in range(1, card.layer_numbers[-1] + 2):
        for last in range(1, size + 1):
            out = sum(n for number, n in bytes_of.items() if number % size >= size - last)
            if out >= needed:
                best.append((out, size, last))
                break
    return min(best)[1:] if best else None


def _streamed(placement: Placement, start: str) -> tuple[list[str], list[str]]:
    """What to say and to type for whole layers, copied one ahead."""
    if (group := groups(placement)) is None:
        return [], []
    size, last = group
    says = (
        f"Second, for prompts and large batches: all experts of the last {last} of every {size} layers are copied in "
        "every step, one such layer ahead."
    )
    options = f"--offload-group-size {size} --offload-num-in-group {last} --offload-prefetch-step 1"
    return [says], [f"{start} {options} --offload-params {EXPERTS}"]
