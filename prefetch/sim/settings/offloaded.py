"""What to type for OffloadedMoE, this project's own engine: simulated policies and guesses on a transformers model.

It knows no speed, and imports no engine: its names are those of `prefetch.engine.offloaded`, held together by a test.
"""

from __future__ import annotations

from prefetch import __version__
from prefetch.sim.memory import spoken
from prefetch.sim.settings.placement import ALL, CACHE, Block, Placement, no_such

ENGINE, READ_AT = "OffloadedMoE", f"prefetch {__version__}"
COMPUTED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOLD_NOTHING = frozenset(  # policies that a running model tells all they ask for
    {
        "arc",
        "fifo",
        "least_stale",
        "lfru",
        "lfu",
        "lfu_persistent",
        "lru",
        "random",
        "s3fifo",
        "sieve",
    }
)


def offloaded(placement: Placement) -> Block:
    """A cache in a process of transformers. Nothing is computed on the host."""
    card, says = placement.card, list[str]()
    if placement.has_encoder:
        return no_such(ENGINE, READ_AT, card)
    other_way = placement.way not in (ALL, CACHE)
    precision = str(card.expert_precision)
    is_other = other_way or precision not in COMPUTED or not _is_told(placement)
    nearest = "; nearest: a cache of that size" if precision in COMPUTED else ""
    if is_other:
        says.append(f"{_why(placement)} so not '{placement.told}'{nearest}.")
    elif placement.way == ALL:
        says.append(f"Every expert on the GPU, counted at {precision}.")
    else:
        says.append(
            f"As simulated: {spoken(placement.room_bytes)} of experts on the GPU, counted at {precision}."
        )
    if placement.predictor != "none":
        says.append(
            f"predictor.safetensors: what stage=train predictor={placement.predictor} train.export=true leaves, with "
            f"train.horizons=[{placement.horizon}]."
        )
    if precision not in COMPUTED:  # rooms and host memory here are of another size
        says.append(
            "What to call at bf16 is said by the same command with simulator.precision=bf16."
        )
        return Block(ENGINE, READ_AT, False, tuple(says), ())
    return Block(ENGINE, READ_AT, not is_other, tuple(says), (_program(placement),))


def capacity(placement: Placement) -> tuple[str, str]:
    """(scope, capacity) as OffloadedMoE takes them: whole experts per layer where all layers have as many."""
    sizes, rooms = placement.size_L, placement.room_G
    if placement.way == ALL:
        return "per_layer", str(placement.card.n_experts)
    each = {room // size for room, size in zip(rooms, sizes, strict=False)}
    if len(rooms) == len(sizes) > 1 and len(each) == 1:
        return "per_layer", str(each.pop())
    return "global", f'"{placement.room_bytes}B"'


def policy_of(placement: Placement) -> str:
    return placement.policy if placement.policy in TOLD_NOTHING else "lru"


def _is_told(placement: Placement) -> bool:
    return placement.way != CACHE or placement.policy in TOLD_NOTHING


def _why(placement: Placement) -> str:
    """What it does otherwise."""
    precision, why = str(placement.card.expert_precision), list[str]()
    if placement.way not in (ALL, CACHE):
        why.append("computes every expert on the GPU")
    if precision not in COMPUTED:
        why.append(f"computes bf16, not {precision} (experts are larger, fewer fit)")
    if not _is_told(placement):
        why.append(f"cannot tell {placement.policy} what it asks for")
    return f"{ENGINE} {' and '.join(why)},"


def _program(placement: Placement) -> str:
    dtype = COMPUTED.get(str(placement.card.expert_precision), "bfloat16")
    scope, amount = capacity(placement)
    ahead = ""
    if placement.predictor != "none":
        ahead = f', predictor="predictor.safetensors", horizon={placement.horizon}, width={placement.width}'
    return "\n".join(
        [
            "python - <<'END'",
            "import torch, transformers",
            "from prefetch import OffloadedMoE",
            f'model = transformers.AutoModelForCausalLM.from_pretrained("MODEL", dtype=torch.{dtype})',
            f'model = OffloadedMoE(model, capacity={amount}, scope="{scope}", policy="{policy_of(placement)}", '
            f'device="cuda"{ahead})',
            "END",
        ]
    )
