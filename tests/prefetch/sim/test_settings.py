"""What is printed means what was meant: patterns, counts and shares, read as the engines read them."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.config import choices
from prefetch.engine.offloaded import OffloadedMoE
from prefetch.engine.offloaded import _policy_of as policy_named
from prefetch.errors import ConfigError
from prefetch.models.cards import card_names, load_card
from prefetch.sim.memory import budget_of
from prefetch.sim.memory import rooms_of as rooms_as_taken
from prefetch.sim.settings.engines import page_of, settings_of
from prefetch.sim.settings.ktransformers import ktransformers
from prefetch.sim.settings.llama_cpp import first_on_gpu, host_layers, llama_cpp, pattern
from prefetch.sim.settings.offloaded import TOLD_NOTHING, offloaded
from prefetch.sim.settings.placement import (
    ALL,
    BOTH,
    CACHE,
    HOST,
    STATIC,
    WAYS,
    Placement,
    profile,
    rooms_of,
    spelled,
)
from prefetch.sim.settings.vllm import gib_out, groups, vllm
from prefetch.trace.card import plain_card
from tests.prefetch.sim.test_costs import machine

GIB = 2**30
LITE = load_card("deepseek_v2_lite")  # 26 layers of 64 experts of 16.5 MiB; layer 0 is dense
OSS = load_card("gpt_oss_120b")
UNEVEN = load_card("qwen3_30b_a3b", expert_precision="q4_k_m")
CARDS = (LITE, OSS, UNEVEN)
DECODERS = [name for name in card_names() if name not in ("switch_base_128", "nllb_moe_54b")]
# of a layer of llama.cpp: what must be found, and what must not
ROUTED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
OTHERS = (
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
    "ffn_gate",
    "ffn_up",
    "ffn_gate_inp",
    "attn_q",
)


def placed(card=LITE, way=STATIC, room=(8 * GIB,), **asked) -> Placement:
    return Placement(card, way, room, context=4096, **asked)


def drawn_uses(card, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (card.n_layers, card.n_experts))


def found(regex: str, names, n_layers: int) -> set[int]:
    """Layers of which llama.cpp, searching, finds all these tensors; none of which it finds some."""
    return {
        n
        for n in range(n_layers)
        if all(re.search(regex, f"blk.{n}.{name}.weight") for name in names)
    } | {
        -1
        for n in range(n_layers)
        if len({bool(re.search(regex, f"blk.{n}.{name}.weight")) for name in names}) > 1
    }


def overridden(command: str) -> str:
    """The pattern of -ot, as a shell and llama.cpp cut it."""
    words = shlex.split(command)
    value = words[words.index("-ot") + 1]
    assert "," not in value and value.count("=") == 1
    regex, buffer = value.split("=")
    assert buffer == "CPU"
    return regex


def after(command: str, option: str) -> str:
    words = shlex.split(command)
    return words[words.index(option) + 1]


def bytes_on_gpu(card, host) -> int:
    layers = zip(card.layer_numbers, card.expert_bytes_L, strict=True)
    return card.n_experts * sum(size for number, size in layers if number not in host)


@given(st.sets(st.integers(0, 130), min_size=1))
def test_a_pattern_finds_the_routed_experts_of_its_layers_only(numbers):
    regex = pattern(sorted(numbers))
    assert found(regex, ROUTED, 140) == numbers
    assert not any(
        re.search(regex, f"blk.{n}.{name}.weight") for n in range(140) for name in OTHERS
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CARDS), st.floats(0, 1.05), st.sampled_from([way for way in WAYS if way != ALL])
)
def test_llama_cpp_keeps_what_fits(card, share, way):
    placement = placed(card, way, (int(share * card.all_expert_bytes),))
    host, first = host_layers(placement), first_on_gpu(placement)
    last = [number for number in card.layer_numbers if number < first]
    size, room = card.n_experts * max(card.expert_bytes_L), placement.room_bytes
    for kept in (host, last):
        assert bytes_on_gpu(card, kept) <= room
        assert not kept or bytes_on_gpu(card, kept) + size > room  # and one layer more would not
    if len(set(card.expert_bytes_L)) == 1:
        assert len(host) == len(last)
    commands = llama_cpp(placement).commands
    if not host:
        assert [command.count("-ot") + command.count("moe") for command in commands] == [0]
        return
    by_name, by_count = commands
    assert found(overridden(by_name), ROUTED, 140) == set(host)
    assert int(after(by_count, "--n-cpu-moe")) == first
    # what --n-cpu-moe N looks for: layers 0 to N-1 of the model, dense ones too
    assert set(range(first)) & set(card.layer_numbers) == set(last)


def test_a_dense_first_layer_counts():
    """26 layers of 1,056 MiB, numbered from 1: with 8 GiB seven stay, 1 to 7, or by count 20 to 26."""
    placement = placed(room=(8 * GIB,))
    assert host_layers(placement) == list(range(8, 27))
    assert first_on_gpu(placement) == 20
    assert first_on_gpu(placed(room=(0,))) == 27
    assert host_layers(placed(room=(0,))) == list(range(1, 27))
    both = llama_cpp(placed(room=(0,))).commands
    assert found(overridden(both[0]), ROUTED, 40) == set(
        range(1, 27)
    )  # now both mean the same layers
    assert after(both[1], "--n-cpu-moe") == "27"


def test_what_llama_cpp_cannot_do_it_says():
    part = llama_cpp(placed(room=(8 * GIB,)))
    assert not part.is_exact and "48 experts of layer 8" in part.text
    whole = llama_cpp(placed(room=(7 * 64 * LITE.expert_bytes_L[0],)))
    assert whole.is_exact and "As simulated" in whole.text
    for way in (HOST, BOTH, CACHE):
        text = llama_cpp(placed(way=way, uses_LE=drawn_uses(LITE))).text
        assert f"so not '{way}" in text
        assert ("pull request 27861" in text) == (way != HOST)
        assert ("--moe-cache-slots 19 " in text) == (way == HOST)
    # 8 GiB are 496 experts of 16.5 MiB: 19 in each of 26 layers
    assert "--moe-expert-cache 19 " in llama_cpp(placed(way=CACHE)).text


def test_context_is_of_every_request():
    commands = [block.commands[-1] for block in settings_of(placed(way=ALL, batch=3))]
    assert [after(commands[0], option) for option in ("-c", "-np")] == ["12288", "3"]
    assert after(commands[1], "--max-total-tokens") == "12288"
    assert after(commands[2], "--max-model-len") == "4096"


def test_all_resident_needs_no_option():
    for card in CARDS:
        *others, ours = settings_of(placed(card, ALL, (0,)))
        for block in others:
            assert block.is_exact and len(block.commands) == 1
            assert not re.search("moe|-ot|--kt|offload", block.commands[0])
        assert ours.is_exact == bool(ours.commands) == (card.expert_precision == "bf16")
        assert not ours.commands or f"capacity={card.n_experts}," in ours.commands[0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CARDS), st.integers(0, 10**6), st.sampled_from([STATIC, HOST, BOTH, CACHE]))
def test_ktransformers_reads_the_number_that_was_meant(card, seed, way):
    rng = np.random.default_rng(seed)
    rooms = (int(rng.integers(card.all_expert_bytes)),)
    if way != STATIC and seed % 2:
        rooms = tuple(int(rng.integers(card.n_experts + 1)) * size for size in card.expert_bytes_L)
    placement = placed(card, way, rooms, uses_LE=drawn_uses(card, seed))
    is_gpu_LE, command = placement.is_gpu_LE, ktransformers(placement).commands[-1]
    if is_gpu_LE.all():
        return
    n_all = card.n_layers * card.n_experts
    if "--kt-gpu-experts-ratio" in command:
        n = int(n_all * float(after(command, "--kt-gpu-experts-ratio")))  # as kt_ep_wrapper.py does
    else:
        n = int(after(command, "--kt-num-gpu-experts")) * card.n_layers
    assert n == is_gpu_LE.sum()
    assert (is_gpu_LE * np.array(card.expert_bytes_L)[:, None]).sum() <= placement.room_bytes
    if way == STATIC:  # front-loading: the first n of all
        assert is_gpu_LE.ravel()[:n].all()


def test_ktransformers_takes_the_hottest_by_a_file():
    placement = placed(way=HOST, uses_LE=drawn_uses(LITE))
    block = ktransformers(placement)
    assert block.is_exact and "torch.zeros(1, 27, 64)" in block.commands[0]
    compile(block.commands[0].split("'END'\n")[1].removesuffix("END"), "prepare", "exec")
    assert after(block.commands[1], "--init-expert-location") == "experts.pt"
    assert after(block.commands[1], "--kt-expert-placement-strategy") == "frequency"
    assert "first_k_dense_replace" in block.text  # layer 0 has no experts
    bare = ktransformers(placed(way=HOST))
    assert not bare.is_exact and "uniform" in bare.commands[0] and "Without counts" in bare.text
    for way in (BOTH, CACHE):
        block = ktransformers(placed(way=way, uses_LE=drawn_uses(LITE)))
        assert not block.is_exact and "Nothing is copied at a miss" in block.text


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CARDS), st.floats(0, 0.999))
def test_vllm_leaves_the_room_alone(card, share):
    placement = placed(card, CACHE, (int(share * card.all_expert_bytes),))
    block, all_bytes = vllm(placement), card.all_expert_bytes
    gib = float(after(block.commands[0], "--cpu-offload-gb"))
    assert gib == pytest.approx(gib_out(placement))
    assert 0 <= all_bytes - min(gib * GIB, all_bytes) <= placement.room_bytes
    group, buffer = groups(placement), card.n_experts * max(card.expert_bytes_L)
    if group is None:
        assert len(block.commands) == 1 and placement.room_bytes < buffer
        return
    size, last = group
    host = [number for number in card.layer_numbers if number % size >= size - last]
    assert bytes_on_gpu(card, host) + buffer <= placement.room_bytes
    assert after(block.commands[1], "--offload-group-size") == str(size)
    assert after(block.commands[1], "--offload-num-in-group") == str(last)


def test_groups_by_hand():
    """Half of 36 layers on the GPU, one of them as a buffer: 19 go, the last of each 2 and one more is the best."""
    layer = OSS.n_experts * OSS.expert_bytes_L[0]
    size, last = groups(placed(OSS, CACHE, (18 * layer,)))
    assert sum(n % size >= size - last for n in range(36)) == 19
    assert groups(placed(OSS, CACHE, (19 * layer,))) == (2, 1)
    assert groups(placed(OSS, CACHE, (layer,))) == (1, 1)
    assert groups(placed(OSS, CACHE, (layer - 1,))) is None


def called(block) -> dict[str, str]:
    """What a program gives to OffloadedMoE, as Python reads it."""
    program = block.commands[0].removeprefix("python - <<'END'\n").removesuffix("\nEND")
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if getattr(call.func, "id", "") == "OffloadedMoE"]
    return {word.arg: ast.literal_eval(word.value) for word in made.keywords}


def test_our_own_engine_is_called_as_it_can_be():
    """Every argument that is printed is one, and is read as what was simulated."""
    signature = inspect.signature(OffloadedMoE.__init__).parameters
    rooms = tuple(16 * size for size in LITE.expert_bytes_L)
    ahead = {"predictor": "mlp", "horizon": 4, "width": 6}
    block = offloaded(placed(way=CACHE, room=rooms, policy="sieve", **ahead))
    given = called(block)
    assert set(given) < set(signature) and block.is_exact and "train.horizons=[4]" in block.text
    assert (given["capacity"], given["scope"], given["policy"]) == (16, "per_layer", "sieve")
    assert (given["horizon"], given["width"]) == (4, 6)
    one = called(offloaded(placed(way=CACHE, room=(8 * GIB,), policy="lru")))
    assert (one["capacity"], one["scope"]) == (f"{8 * GIB}B", "global") and "predictor" not in one
    assert (
        sum(rooms_as_taken(LITE, "global", one["capacity"])[0])
        == 8 * GIB // LITE.expert_bytes_L[0] * LITE.expert_bytes_L[0]
    )
    assert not offloaded(placed(way=CACHE, policy="hobbit")).is_exact
    served = set()
    for name in choices("policy"):
        with suppress(ConfigError):
            served.add(name)
            policy_named(name)
            continue
        served.discard(name)
    assert served == TOLD_NOTHING


def test_no_block_is_silent():
    """Every way in every engine: either it is what was simulated, or a sentence says that it is not."""
    for way in WAYS:
        for block in settings_of(placed(way=way, uses_LE=drawn_uses(LITE))):
            assert block.commands and block.read_at in block.text
            assert block.is_exact != bool(re.search("so not '|go to the host", block.text)), (
                block.text
            )


def test_models_with_an_encoder_are_refused_in_words():
    for block in settings_of(placed(load_card("switch_base_128"), CACHE, (GIB,))):
        assert not block.commands and not block.is_exact and "encoder" in block.text


@pytest.mark.parametrize("name", DECODERS)
def test_every_card_has_settings(name):
    card = load_card(name)
    placement = placed(card, STATIC, (card.all_expert_bytes // 3,), host_bytes=3 * GIB)
    page = page_of(placement)
    assert page.startswith(
        f"# {card.name}: static split by layer; context 4096, batch 1; 3.00 GiB of host memory\n"
    )
    assert "-ngl 99 " in page and max(card.layer_numbers) < 98
    assert found(overridden(llama_cpp(placement).commands[0]), ROUTED, 140) < set(
        card.layer_numbers
    )


def test_the_policy_and_the_guesses_are_named():
    told = placed(way=CACHE, policy="lru", predictor="markov", horizon=4, width=8).told
    assert told == "cache (lru), prefetch by markov 4 layers ahead, 8 experts wide"
    assert placed(policy="lru").told == STATIC


def test_profile_by_hand():
    card = plain_card("x", n_experts=4, top_k=2, layer_numbers=(1, 3), expert_bytes_L=(10, 10))
    uses_LE = np.array([[5, 0, 5, 10], [0, 0, 0, 0]])
    table = profile(Placement(card, HOST, (25, 10), context=1, uses_LE=uses_LE))
    assert list(table.columns) == ["layer", "expert", "uses", "share", "rank", "on_gpu"]
    assert table["layer"].tolist() == [1] * 4 + [3] * 4
    assert table["expert"].tolist() == [0, 1, 2, 3] * 2
    assert table["uses"].tolist() == uses_LE.ravel().tolist()
    assert table["share"].tolist() == [0.25, 0, 0.25, 0.5, 0, 0, 0, 0]
    assert table["rank"].tolist() == [2, 4, 3, 1, 1, 2, 3, 4]  # of equals the first
    assert table["on_gpu"].tolist() == [1, 0, 0, 1, 1, 0, 0, 0]
    assert table.to_csv(index=False).splitlines()[1] == "1,0,5,0.25,2,1"


def test_profile_leaves_unknown_things_empty():
    table = profile(placed(way=HOST))
    assert table[["uses", "share", "rank", "on_gpu"]].isna().all(axis=None)
    assert profile(placed())["on_gpu"].sum() == 496
    assert profile(placed(load_card("switch_base_128"), CACHE))["stack"].nunique() == 2


@pytest.mark.parametrize(
    ("scope", "cache"), [("global", 0.3), ("per_layer", 16), ("per_layer", "4GiB")]
)
def test_rooms_of_a_budget_are_bytes(scope, cache):
    for card in (LITE, UNEVEN):
        budget = budget_of(card, machine(), cache=cache, scope=scope)
        rooms = rooms_of(card, budget)
        assert sum(rooms) == budget.cache_bytes
        placement = placed(card, HOST, rooms, uses_LE=drawn_uses(card))
        assert placement.is_gpu_LE.sum() >= sum(budget.slots_G)


def test_spelled_layers():
    assert spelled([]) == "none"
    assert spelled([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


def test_wrong_placements():
    with pytest.raises(ConfigError, match="no way 'magic'"):
        placed(way="magic")
    with pytest.raises(ConfigError, match="expected bytes for each of 26 layers"):
        placed(room=(1, 2))
    with pytest.raises(ConfigError, match="the card has"):
        placed(uses_LE=np.zeros((2, 2), np.int64))
    with pytest.raises(ConfigError, match="how large"):
        placed(plain_card("x", n_experts=4, top_k=1, layer_numbers=(0,)))
