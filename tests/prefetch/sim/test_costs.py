"""Costs by hand for one model on one machine, and what holds for any of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError, MissingData
from prefetch.models.cards import card_names, load_architecture, load_card
from prefetch.sim.costs import (
    Beside,
    before_S,
    beside_of,
    chunks_ns,
    machine_of,
    need_host_memory,
)
from prefetch.sim.engines.machine import BOTH, NO_DISK
from prefetch.sim.hardware import Hardware, Lane, Link, hardware
from prefetch.sim.limits.bounds import compute_S
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, trace_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "hardware"
MACHINES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "measured")
QWEN = load_card("qwen3_30b_a3b")


def machine(name: str = "rtx4090_pcie4") -> Hardware:
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    del fields["_target_"]
    return hardware(**fields)


def _trace(card: ModelCard, prompt: int, generated: int = 1, first: int = 0) -> RoutingTrace:
    n_tokens = prompt + generated
    ids_TLK = np.zeros((n_tokens, card.n_layers, card.top_k), np.int32)
    ids_TLK[:] = np.arange(card.top_k)
    position_T = first + np.arange(n_tokens)
    phase_T = np.repeat([PREFILL, DECODE], [prompt, generated])
    return trace_of(card, ids_TLK, position_T=position_T, phase_T=phase_T)


def steps(card: ModelCard, prompt: int = 0, first: int = 0) -> Workload:
    """One request: a prompt that begins at position `first`, and one token that is generated."""
    return workload_of(_trace(card, prompt, first=first))


@st.composite
def links(draw: st.DrawFn) -> Link:
    n_pieces = draw(st.integers(1, 3))
    sizes = draw(st.sets(st.integers(1, 2**24), min_size=n_pieces - 1, max_size=n_pieces - 1))
    rates = draw(st.lists(st.integers(1, 10**12), min_size=n_pieces, max_size=n_pieces))
    lane = Lane(0, tuple(zip([0, *sorted(sizes)], sorted(rates), strict=True)))
    slow = Lane(0, ((0, draw(st.integers(1, 10**10))),))
    latency_ns, chunk_bytes = draw(st.integers(0, 10**6)), draw(st.integers(2**18, 2**22))
    return Link(latency_ns, chunk_bytes, lane, slow)


@given(links(), st.integers(1, 2**25), st.booleans())
def test_chunks_are_together_exactly_one_copy(link, n_bytes, is_pinned):
    chunks = chunks_ns(link, n_bytes, is_pinned=is_pinned)
    assert sum(chunks) == link.copy_ns(n_bytes, is_pinned=is_pinned)
    assert len(chunks) == -(-n_bytes // link.chunk_bytes)
    assert chunks[0] >= link.latency_ns and min(chunks) >= 0


def test_an_expert_by_hand():
    """9,437,184 bytes of bf16, 4,718,592 weights, on an RTX 4090 over PCIe 4.0: 4.5 chunks of 2 MiB.

    2 MiB at 24 GB/s are 87,381.33 ns; ends of chunks are rounded up: 87,382, 174,763, 262,144, 349,526, 393,216.
    """
    costs = machine_of(QWEN, machine(), steps(QWEN))
    assert set(costs.bytes_L) == {9_437_184}
    assert costs.n_chunks_L.tolist() == [5] * 48
    assert costs.chunk_ns_LX[7].tolist() == [2_800 + 87_382, 87_381, 87_381, 87_382, 43_690]
    assert set(costs.weight_ns_L) == {9_363}  # 9,437,184 / 1.008e12 s = 9,362.3 ns
    assert set(costs.token_ns_L) == {58}  # 2 * 4,718,592 / 165.2e12 s = 57.1 ns
    assert set(costs.host_weight_ns_L) == {131_658}  # 9,437,184 / 71.68e9 s = 131,657.1 ns
    assert set(costs.host_token_ns_L) == {4_096}  # 2 * 4,718,592 / 2.304e12 s
    assert costs.issue_ns == 2_800
    assert costs.shared_per_1000 == 665  # 1 - 24 / 71.68 = 0.6652
    assert costs.chunk_bytes == 2_097_152


def test_a_generated_token_by_hand():
    """3,082,186,752 bytes are 3,057,724.95 ns; 98,304 of each of 1,000 tokens are 97,523.81; 48 layers."""
    found = before_S(QWEN, machine(), steps(QWEN, first=999))
    assert found.tolist() == [30_000 + 65_735]  # 3,155,248.76 / 48 = 65,734.35
    beside = Beside(lookup_bytes=622_329_856)  # 2,440,334.22 ns are left to read
    found = before_S(QWEN, machine(), steps(QWEN, first=999), beside)
    assert found.tolist() == [30_000 + 52_873]  # 2,537,858.03 / 48 = 52,872.04


def test_a_long_prompt_by_hand():
    """Bound by operations: 2 per weight and token, and per pair 4 * 2,048 in each of 48 layers, at 165.2e12 per s.

    1,541,093,376 weights and 4,096 tokens are 76,420,320.44 ns; 4,096 * 4,097 / 2 = 8,390,656 pairs 19,971,792.92.
    """
    found = before_S(QWEN, machine(), steps(QWEN, prompt=4096))
    assert found[0] == 30_000 + 2_008_170  # 96,392,113.35 / 48 = 2,008,169.03


def test_attention_of_prompts_grows_with_the_square():
    """Where nothing else is left, twice the prompt takes four times as long."""
    card = dataclasses.replace(QWEN, dense_bytes=0, kv_bytes_per_token=0)
    short, long = (
        int(before_S(card, machine(), steps(card, prompt=n))[0]) - 30_000 for n in (2048, 4096)
    )
    assert long == pytest.approx(4 * short, rel=1e-3)  # n (n + 1) / 2 pairs


def test_a_prompt_in_chunks_attends_to_what_a_whole_one_does():
    """Each of its tokens to all before it; only keys and values are read again, once per chunk."""
    card = dataclasses.replace(QWEN, dense_bytes=0, kv_bytes_per_token=0)
    trace = _trace(card, prompt=1024)
    whole, chunked = (workload_of(trace, chunk=chunk) for chunk in (None, 100))
    assert (whole.n_steps, chunked.n_steps) == (2, 12)
    whole_ns, chunked_ns = (before_S(card, machine(), work) - 30_000 for work in (whole, chunked))
    assert 0 <= chunked_ns.sum() - whole_ns.sum() < chunked.n_steps  # each step is rounded up


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(0, 4096), st.integers(0, 4096))
def test_before_never_falls_with_the_context_or_the_prompt(tokens, first, more):
    def cost(prompt: int, position: int) -> int:
        return int(before_S(QWEN, machine(), steps(QWEN, prompt, first=position))[0])

    assert cost(tokens, first) <= cost(tokens, first + more)
    assert cost(tokens, first) <= cost(tokens + more % 64, first)


@pytest.mark.parametrize("where", MACHINES)
@pytest.mark.parametrize("name", card_names())
def test_every_shipped_model_has_costs_on_every_machine(name, where):
    """Positive and whole; with what its architecture tells, reading takes no longer than without."""
    card, hard, beside = load_card(name), machine(where), beside_of(load_architecture(name))
    work = steps(card, prompt=2)
    costs = machine_of(card, hard, work, beside=beside)
    for array in costs[:8]:
        assert array.dtype == np.int64
    for array in (costs.before_S, costs.weight_ns_L, costs.token_ns_L, costs.host_weight_ns_L):
        assert (array > 0).all()
    for layer, size in enumerate(card.expert_bytes_L):
        assert costs.chunk_ns_LX[layer].sum() == hard.link.copy_ns(size)
        assert (costs.chunk_ns_LX[layer] > 0).sum() == costs.n_chunks_L[layer]
    assert (costs.weight_ns_L < costs.chunk_ns_LX.sum(axis=1)).all()
    plain = before_S(card, hard, work, dataclasses.replace(beside, lookup_bytes=0))
    assert (costs.before_S <= plain).all()


def test_layers_of_unequal_size():
    """Q4_K_M: one half of the layers is larger; short copies leave chunks empty at the end."""
    card = load_card("qwen3_30b_a3b", expert_precision="q4_k_m")
    costs = machine_of(card, machine(), steps(card))
    sizes, n_chunks = sorted(set(card.expert_bytes_L)), costs.n_chunks_L
    assert sizes == [2_654_208, 3_059_712] and set(n_chunks) == {2}
    copy_ns = [machine().link.copy_ns(size) for size in card.expert_bytes_L]
    assert costs.chunk_ns_LX.sum(axis=1).tolist() == copy_ns
    large = np.array(card.expert_bytes_L) == sizes[1]
    assert costs.weight_ns_L[large].min() > costs.weight_ns_L[~large].max()


def test_what_multiplies_which_weights():
    """fp8 where the device can, else bf16, like weights that are only stored in 4 bits; fp32 in fp32."""
    card = load_card("deepseek_v3")  # fp8, 44,050,944 bytes, a scale of 4 bytes per 128 x 128
    assert set(machine_of(card, machine("h100_pcie5"), steps(card)).token_ns_L) == {45}  # 1979e12
    assert set(machine_of(card, machine("a100_80gb_pcie4"), steps(card)).token_ns_L) == {283}
    card = load_card("gpt_oss_20b")  # mxfp4, 13,236,480 bytes are 24,915,728 weights of 4.25 bits
    assert set(machine_of(card, machine("h100_pcie5"), steps(card)).token_ns_L) == {51}  # 989e12
    card = load_card("switch_base_128")  # fp32, 4,718,592 weights
    assert set(machine_of(card, machine("h100_pcie5"), steps(card)).token_ns_L) == {141}  # 67e12


def test_pageable_memory_is_slower_and_takes_more_of_the_host():
    pinned = machine_of(QWEN, machine(), steps(QWEN))
    pageable = machine_of(QWEN, machine(), steps(QWEN), is_pinned=False)
    assert pageable.issue_ns == 76_200
    assert pageable.chunk_ns_LX[0].sum() == 2_800 + 983_040  # 9,437,184 bytes at 9.6 GB/s
    assert pageable.shared_per_1000 == 598  # 1 - 3 * 9.6 / 71.68 = 0.5982
    assert (pageable.before_S == pinned.before_S).all()


def test_settings_are_passed_on():
    work = steps(QWEN)
    costs = machine_of(
        QWEN,
        machine(),
        work,
        misses="both",
        staging=3,
        predictor_us=1.2345,
        uploads=5,
        cancels=False,
        protects=False,
    )
    found = (
        costs.miss_way,
        costs.staging,
        costs.predict_ns,
        costs.uploads,
        costs.cancels,
        costs.protects,
    )
    assert found == (BOTH, 3, 1235, 5, False, False)


def test_what_architectures_tell_beside():
    """Heads times head size, and embeddings that are looked up unless the output layer shares them."""
    found = beside_of(load_architecture("qwen3_30b_a3b"))
    assert found == Beside("bf16", 32 * 128, 151_936 * 2048 * 2)
    assert beside_of(load_architecture("granite_3_1b_a400m")).lookup_bytes == 0  # tied
    latent = beside_of(load_architecture("deepseek_v2_lite"))
    assert latent.attention_width == 16 * (128 + 64 + 128) / 2
    linear = beside_of(load_architecture("qwen3_next_80b_a3b"))
    assert linear.attention_width == 16 * 256 / 4  # every fourth layer


@pytest.mark.parametrize(
    "field", ["expert_bytes_L", "dense_bytes", "shared_bytes", "kv_bytes_per_token", "hidden_size"]
)
def test_a_size_that_is_missing(field):
    card = dataclasses.replace(QWEN, **{field: None})
    with pytest.raises(MissingData, match=rf"{field}; pass simulator\.model_card"):
        machine_of(card, machine(), steps(QWEN))
    with pytest.raises(MissingData, match=field):
        before_S(card, machine(), steps(QWEN))


def test_a_card_that_tells_nothing():
    bare = plain_card("bare", n_experts=128, top_k=8, layer_numbers=tuple(range(48)))
    with pytest.raises(
        MissingData, match=r"bare: .* expert_bytes_L, dense_bytes, shared_bytes, kv_"
    ):
        machine_of(bare, machine(), steps(bare))


def test_what_does_not_fit():
    work, other = steps(QWEN), load_card("olmoe_1b_7b")
    with pytest.raises(
        ConfigError, match=r"16 layers of 64 experts, the trace of Qwen.* 48 of 128"
    ):
        machine_of(other, machine(), work)
    recorded = dataclasses.replace(QWEN, expert_precision="as in the recorded file")
    with pytest.raises(ConfigError, match="no precision 'as in the recorded file'; there are bf16"):
        machine_of(recorded, machine(), work)
    for asked, message in (
        ({"misses": "never"}, "'never': must be one of wait, host, both"),
        ({"staging": -1}, "staging=-1"),
        ({"uploads": -1}, "uploads=-1"),
        ({"predictor_us": float("nan")}, "predictor_us=nan"),
        ({"beside": Beside(lookup_bytes=2**50)}, "dense_bytes=3082186752"),
    ):
        with pytest.raises(ConfigError, match=message):
            machine_of(QWEN, machine(), work, **asked)


def test_options_of_guesses_by_hand():
    """An expert of QWEN is 9 MiB: 20 MiB are two copies."""
    work = steps(QWEN)
    given = machine_of(QWEN, machine(), work, landing=3, budget="20MiB", queue="by_score")
    assert (given.landing, given.budget_bytes, given.by_score) == (3, 20 * 2**20, True)
    plain = machine_of(QWEN, machine(), work)
    assert (plain.landing, plain.by_score) == (0, False) and plain.budget_bytes > 2**60
    with pytest.raises(ConfigError, match=r"simulator.budget=1MiB: an expert is 9.00 MiB"):
        machine_of(QWEN, machine(), work, budget="1MiB")
    with pytest.raises(ConfigError, match=r"simulator.queue='fifo': must be one of by_layer, by_s"):
        machine_of(QWEN, machine(), work, queue="fifo")


def test_a_disk_by_hand():
    """9 chunks of 1 MiB at 7.45 GB/s after 80 us: 9,437,184 bytes are 1,266,736.1 ns, one chunk is 140,748.5."""
    work = steps(QWEN)
    disk = machine_of(QWEN, machine(), work, host_cache="16GiB").disk
    assert (disk.room_bytes, disk.chunk_bytes) == (2**34 // 9_437_184 * 9_437_184, 2**20)
    assert set(disk.n_chunks_L) == {9} and set(disk.whole_ns_L) == {80_000 + 1_266_737}
    assert disk.chunk_ns_LX[0, :2].tolist() == [80_000 + 140_749, 140_748]
    assert machine_of(QWEN, machine(), work).disk is NO_DISK
    share = machine_of(QWEN, machine(), work, host_cache=0.5).disk.room_bytes
    assert share == 64 * 48 * 9_437_184


def test_what_host_memory_cannot_be():
    work, large = steps(QWEN), load_card("deepseek_v3")
    need_host_memory(QWEN, machine())
    for host_cache, message in (
        ("65GiB", r"simulator.host_cache=65GiB is 65.00 GiB: rtx4090_pcie4 has 64.00 GiB of host"),
        (200, r"simulator.host_cache: cache=200: .* has 128 experts in a layer"),
        ("much", r"simulator.host_cache: cache=much"),
    ):
        with pytest.raises(ConfigError, match=message):
            machine_of(QWEN, machine(), work, host_cache=host_cache)
    with pytest.raises(ConfigError, match=r"rtx4090_pcie4 has 64.00 GiB of host memory, shortfall"):
        need_host_memory(large, machine())


@pytest.mark.parametrize(("prompt", "most"), [(0, 0.0001), (64, 0.004)])
def test_whole_nanoseconds_lose_little_of_tiny_experts(prompt, most):
    """16 KiB experts in 8 layers, as in the default trace: costs are rounded up, in steps of 240,000 nanoseconds.

    A cost per token is rounded before it is multiplied: here all 64 of a prompt choose the same two.
    """
    sizes = {"dense_bytes": 10**6, "shared_bytes": 0, "kv_bytes_per_token": 4096, "hidden_size": 64}
    card = plain_card(
        "tiny", n_experts=32, top_k=2, layer_numbers=tuple(range(8)), expert_bytes_L=(16384,) * 8,
        expert_precision="fp32", **sizes,
    )  # fmt: skip
    work, one = steps(card, prompt), machine()
    made = machine_of(card, one, work)
    read_ns, token_ns = 16384e9 / one.device.bytes_per_s, 8192e9 / one.device.operations_per_s.fp32
    step_A = np.repeat(np.arange(work.n_steps), np.diff(work.start_V[::8]))
    exact_S = np.bincount(step_A, np.maximum(read_ns, token_ns * work.tokens_A))
    lost_S = compute_S(work, made) - exact_S - 8 * made.before_S + 8
    share_S = lost_S / compute_S(work, made)
    assert (share_S >= 0).all() and (share_S < most).all()
    assert (share_S[work.prefill_S == 0] < 0.0001).all()
