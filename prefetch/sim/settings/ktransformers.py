"""What to type for KTransformers (SGLang with kt-kernel): chosen experts on the GPU, the others computed on the host.

It knows no speed. Read in sglang-kt 0.7.2: the options in sglang/srt/server_args.py; what each placement strategy
takes, the file of counts, and which layers are taken to have experts, in sglang/srt/layers/moe/kt_ep_wrapper.py; that
the file is no balancing plan here, in sglang/srt/eplb/expert_location.py. What cores and thread pools should be, and
that deferring costs accuracy, in kt-kernel/README.md of kvcache-ai/ktransformers, commit 721b6c4c9.
"""

from __future__ import annotations

from prefetch.sim.settings.placement import ALL, HOST, STATIC, Block, Placement, no_such, whole

ENGINE, READ_AT = "KTransformers", "sglang-kt 0.7.2"
PROFILE, COUNTS = "experts.csv", "experts.pt"
HOW = (
    "WEIGHTS, METHOD: the host's copy of the experts and its format; CORES: physical cores; NODES: NUMA nodes. "
    "No expert is deferred, which would change what the model says."
)
HOST_OPTIONS = (
    "--kt-weight-path WEIGHTS --kt-method METHOD --kt-cpuinfer CORES --kt-threadpool-count NODES "
    "--kt-max-deferred-experts-per-token 0"
)
DENSE = (
    "config.json must name the layers without experts as first_k_dense_replace or moe_layer_freq."
)
PREPARE = """python - <<'END'
import pandas, torch
is_gpu = torch.zeros(1, {layers}, {experts})  # layers: num_hidden_layers of config.json
for row in pandas.read_csv("{profile}").itertuples():
    is_gpu[0, row.layer, row.expert] = row.on_gpu
torch.save({{"logical_count": is_gpu}}, "{counts}")
END"""


def ktransformers(placement: Placement) -> Block:
    """Chosen experts by count, by order or by a file; nothing that depends on what a request asked for."""
    card = placement.card
    if placement.has_encoder:
        return no_such(ENGINE, READ_AT, card)
    start = (
        f"python -m sglang.launch_server --model-path MODEL --context-length {placement.context} "
        f"--max-running-requests {placement.batch} --max-total-tokens {placement.context * placement.batch}"
    )
    n, n_all = gpu_experts(placement), card.n_layers * card.n_experts
    if n == n_all:
        return whole(ENGINE, READ_AT, card, start)
    is_exact, why, options = _strategy(placement)
    counted = f"{n} of {n_all} experts on the GPU, counted at {card.expert_precision}."
    says = (why, counted, HOW, *([DENSE] if card.n_layers <= card.layer_numbers[-1] else []))
    command = f"{start} {HOST_OPTIONS} {amount(placement, n)} {options}"
    commands = (_prepare(placement), command) if COUNTS in options else (command,)
    return Block(ENGINE, READ_AT, is_exact, says, commands)


def gpu_experts(placement: Placement) -> int:
    """In all layers together; without counts of use, as many as the rooms hold."""
    if (is_gpu_LE := placement.is_gpu_LE) is not None:
        return int(is_gpu_LE.sum())
    size_L, most = placement.size_L, placement.card.n_experts
    if len(placement.room_G) == 1:
        return min(placement.room_bytes // max(size_L), most * len(size_L))
    rooms = zip(placement.room_G, size_L, strict=True)
    return sum(min(room // size, most) for room, size in rooms)


def amount(placement: Placement, n: int) -> str:
    """So many per layer, or the share of all experts that is cut to this number where it is read."""
    card = placement.card
    if n % card.n_layers == 0:
        return f"--kt-num-gpu-experts {n // card.n_layers}"
    return f"--kt-gpu-experts-ratio {(n + 0.5) / (card.n_layers * card.n_experts):.8f}"


def _strategy(placement: Placement) -> tuple[bool, str, str]:
    """Is it what was simulated? What there is to say, and the options."""
    option, why = "--kt-expert-placement-strategy", "As simulated."
    if placement.way in (ALL, STATIC):
        return True, why, f"{option} front-loading"
    if placement.way != HOST:
        why = (
            f"Nothing is copied at a miss, so not '{placement.told}'; nearest: the most used experts stay, the host "
            "computes the others. Only long prompts change who stays, if --kt-enable-dynamic-expert-update is given."
        )
    if placement.uses_LE is None:
        return False, f"{why} Without counts of use: as many of each layer.", f"{option} uniform"
    why += f" The counts name those of {PROFILE} with on_gpu = 1."
    return placement.way == HOST, why, f"{option} frequency --init-expert-location {COUNTS}"


def _prepare(placement: Placement) -> str:
    card = placement.card
    layers = card.layer_numbers[-1] + 1
    return PREPARE.format(layers=layers, experts=card.n_experts, profile=PROFILE, counts=COUNTS)
