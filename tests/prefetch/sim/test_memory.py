"""Budgets by hand, their laws, and what impossible ones say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError, MissingData
from prefetch.models.cards import card_names, load_card
from prefetch.sim.hardware import Hardware, hardware
from prefetch.sim.memory import LIBRARY_BYTES, Budget, budget_of, bytes_of, spoken, workspace_bytes
from prefetch.trace.card import plain_card

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "hardware"
QWEN = load_card("qwen3_30b_a3b")  # 48 layers of 128 experts of 9 MiB, k = 8
MIXED = load_card("qwen3_30b_a3b", expert_precision="q4_k_m")  # 24 layers larger than the others
MIB, GIB = 2**20, 2**30
PARTS = ("cache", "staging", "predictor", "dense", "shared", "kv", "workspace", "reserve")


def machine(name: str = "rtx4090_pcie4") -> Hardware:
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    del fields["_target_"]
    return hardware(**fields)


def budget(card=QWEN, name: str = "rtx4090_pcie4", **asked) -> Budget:
    return budget_of(card, machine(name), **asked)


def test_parts_by_hand():
    """4,096 tokens of 96 KiB are 384 MiB; 25 % of 128 experts are 32 in each of 48 layers, 9 MiB each."""
    found = budget(cache=0.25, predictor_bytes=1000)
    assert found.room_G == found.slots_G == (32,) * 48
    assert found.size_L == (1,) * 48
    assert found.cache_bytes == 32 * 48 * 9 * MIB
    assert found.staging_bytes == 2 * 9 * MIB
    assert found.dense_bytes == 3_082_186_752
    assert (found.shared_bytes, found.predictor_bytes) == (0, 1000)
    assert found.kv_bytes == 384 * MIB
    assert found.reserve_bytes == GIB
    # 2,048 tokens of 10 * 2,048 + 8 * (2 * 2,048 + 3 * 768) numbers, 2 bytes each; 1 MiB of logits; 32 MiB
    assert found.workspace_bytes == 2048 * 71_680 * 2 + 33 * MIB
    assert found.whole_model_bytes == sum(getattr(found, f"{name}_bytes") for name in PARTS)
    assert found.savings() == 1 - (32 * 48 * 9 * MIB + 18 * MIB + 1000) / (128 * 48 * 9 * MIB)
    assert found.token_cycles == 4.0
    assert found.fits()
    assert not budget(cache=0.5).fits() and budget(cache=0.5, name="h100_pcie5").fits()


@pytest.mark.parametrize(
    ("cache", "scope", "room"),
    [
        (0.25, "global", 1536),
        ("0.25", "per_layer", 32),
        (0.3, "per_layer", 38),  # 38.4
        (0.3, "global", 1843),  # 1843.2
        (16, "per_layer", 16),
        ("16", "global", 16 * 48),
        (1, "per_layer", 1),
        (1.0, "per_layer", 128),
        ("1.", "global", 6144),
        (0.0, "per_layer", 0),
        (1e-2, "per_layer", 1),  # 1.28
    ],
)
def test_caches_in_experts(cache, scope, room):
    found = budget(cache=cache, scope=scope)
    assert found.room_G == found.slots_G == (room,) * (1 if scope == "global" else 48)
    assert found.size_L == (1,) * 48
    assert found.cache_bytes == sum(found.room_G) * 9 * MIB


def test_a_fraction_is_what_was_written():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    hundred = dataclasses.replace(QWEN, n_experts=100)
    assert budget(hundred, cache=0.29).room_G == (29,) * 48


@pytest.mark.parametrize(
    ("cache", "scope", "experts"),
    [
        ("500MiB", "per_layer", 1),  # 10.4 MiB per layer
        ("500 MiB", "global", 55),
        ("0.5GiB", "global", 56),
        ("1TiB", "per_layer", 128),
        ("1tib", "global", 6144),
        ("100MB", "per_layer", 0),
    ],
)
def test_caches_in_bytes(cache, scope, experts):
    """Units are bytes, of whole experts, and never of more than there are."""
    found = budget(cache=cache, scope=scope)
    n_caches = 1 if scope == "global" else 48
    assert found.size_L == QWEN.expert_bytes_L
    assert found.room_G == (experts * 9 * MIB,) * n_caches
    assert found.slots_G == (experts,) * n_caches
    assert found.cache_bytes == sum(found.room_G)


def test_layers_of_unequal_size():
    """A fraction is whole experts of each layer, bytes are equal bytes; one cache for all counts bytes."""
    sizes = MIXED.expert_bytes_L
    small, large = sorted(set(sizes))
    assert (small, large) == (2_654_208, 3_059_712)
    share = budget(MIXED, cache=0.1)  # 12.8
    assert share.room_G == tuple(12 * size for size in sizes) and share.size_L == sizes
    assert set(share.slots_G) == {12}
    each = budget(MIXED, cache="2000MiB")  # 43,690,666 bytes per layer
    assert set(zip(sizes, each.slots_G, strict=True)) == {(small, 16), (large, 14)}
    assert each.cache_bytes == 24 * (16 * small + 14 * large) <= 2000 * MIB
    one = budget(MIXED, cache="2000MiB", scope="global")
    assert one.room_G == (2000 * MIB,) and one.slots_G == (2000 * MIB // large,)
    assert one.staging_bytes == 2 * large
    one = budget(MIXED, cache=0.1, scope="global")
    assert one.room_G == (128 * sum(sizes) // 10,)
    assert budget(MIXED, cache=16, scope="global").room_G == (16 * sum(sizes),)
    assert budget(MIXED, cache=1.0).savings() < 0  # staging stands beside all of them


def test_what_a_whole_budget_leaves():
    """12,288 MiB less 2,939.4 dense, 384 KV, 313 workspace, 1,024 reserve, 18 staging: 158.5 per layer, 17.6 x 9.

    What 17 in every layer leave holds one more in the first layers.
    """
    found = budget(memory="12GiB")
    left = 12 * GIB - found.beside_bytes - found.staging_bytes
    more = left // (9 * MIB) - 17 * 48
    assert left // 48 // (9 * MIB) == 17 and 0 < more < 48
    assert found.slots_G == (18,) * more + (17,) * (48 - more)
    assert found.whole_model_bytes <= 12 * GIB < found.whole_model_bytes + 9 * MIB
    one = budget(memory="12GiB", scope="global")
    assert 12 * GIB - one.whole_model_bytes < 9 * MIB
    assert budget(memory=12 * GIB) == found
    assert budget(memory="80GB", name="h200_pcie5").slots_G == (128,) * 48


@pytest.mark.parametrize("asked", [{"context": 32_768}, {"batch": 8}, {"staging": 9}])
def test_what_stands_beside_takes_from_the_cache(asked):
    plain = budget(memory="12GiB", scope="global")
    assert budget(memory="12GiB", scope="global", **asked).cache_bytes < plain.cache_bytes
    assert budget(cache=0.25, **asked).cache_bytes == budget(cache=0.25).cache_bytes


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(card_names()),
    st.integers(0, 2**37),
    st.sampled_from(["per_layer", "global"]),
    st.integers(1, 4),
)
def test_laws_of_a_whole_budget(name, more, scope, batch):
    """Nothing is over the budget, and what is left over is less than one more expert."""
    card, hard = load_card(name), machine("mi300x_pcie5")
    empty = budget_of(card, hard, cache=0, scope=scope, batch=batch)
    memory = min(empty.whole_model_bytes + more, hard.device.memory_bytes)
    if memory < empty.whole_model_bytes:
        return
    found = budget_of(card, hard, memory=memory, scope=scope, batch=batch)
    assert found.whole_model_bytes <= memory and found.fits()
    assert found.cache_bytes <= found.all_expert_bytes
    assert found.savings() <= 1 and math.isfinite(found.token_cycles)
    if found.cache_bytes < found.all_expert_bytes:
        assert memory - found.whole_model_bytes < max(card.expert_bytes_L)
    for room, size in zip(found.room_G, found.size_L, strict=False):
        assert room >= 0 and (scope == "global" or room <= card.n_experts * size)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([QWEN, MIXED]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["per_layer", "global"]),
)
def test_a_larger_fraction_is_never_a_smaller_cache(card, one, other, scope):
    small, large = (budget(card, cache=part, scope=scope) for part in sorted([one, other]))
    assert small.cache_bytes <= large.cache_bytes
    assert small.savings() >= large.savings()
    assert large.cache_bytes <= sorted([one, other])[1] * large.all_expert_bytes + 1


def test_workspace_of_wider_numbers_and_longer_steps():
    plain = workspace_bytes(QWEN, 1, 1)
    assert plain == 71_680 * 2 + 1 * MIB + LIBRARY_BYTES
    assert workspace_bytes(QWEN, 2, 3) == 71_680 * 4 + 3 * MIB + LIBRARY_BYTES
    narrow = workspace_bytes(load_card("qwen3_30b_a3b", expert_precision="int4"), 1, 1)
    assert narrow == plain  # activations are not quantised
    assert budget(cache=16, context=100).workspace_bytes == workspace_bytes(QWEN, 100, 1)


def test_sizes_as_people_write_them():
    written = ("12GiB", "1.5 gib", "500MB", "64kB", "7 B", 12, "12884901888", ".5KiB")
    meant = (12 * GIB, 3 * GIB // 2, 500_000_000, 64_000, 7, 12, 12 * GIB, 512)
    assert [bytes_of(text) for text in written] == list(meant)
    assert spoken(12 * GIB) == "12.00 GiB" and spoken(1500) == "1.46 KiB" and spoken(7) == "7 bytes"


def test_what_no_machine_has():
    assert bytes_of("4194304 TiB") == 2**62
    with pytest.raises(ConfigError, match=r"simulator\.budget=5000000 TiB: expected at most 4 EiB"):
        bytes_of("5000000 TiB", "simulator.budget")


@pytest.mark.parametrize("text", ["12 giga", "GiB", "", "-1GiB", "1e9", True, "12GiB of it", None])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="expected a size such as 12GiB"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "one of memory .* found memory=None, cache=None"),
        ({"cache": 0.5, "memory": "12GiB"}, "found memory=12GiB, cache=0.5"),
        (
            {"memory": "4GB"},
            r"less than .* dense 2.87 GiB, kv 384.00 MiB, .*shortfall 8\d\d\.\d\d MiB",
        ),
        ({"memory": 12}, "memory=12 is less than"),
        ({"memory": "48GiB"}, "memory=48GiB: rtx4090_pcie4 has 23.99 GiB"),
        ({"cache": 129}, "129: Qwen/Qwen3-30B-A3B has 128 experts in a layer; .* cache=129MiB"),
        ({"cache": 1.5}, "at most 1.0; experts per layer stand without a dot"),
        ({"cache": "a lot"}, "expected a fraction of all experts"),
        ({"cache": -1}, "expected a fraction"),
        ({"cache": -0.5}, "expected a fraction"),
        ({"cache": float("nan")}, "expected a fraction"),
        ({"cache": True}, "expected a fraction"),
        ({"cache": "12 apples"}, "expected a size"),
        ({"cache": 0, "staging": 0}, "no place"),
        ({"cache": "100MiB", "staging": 0}, "no place"),
        ({"cache": 8, "scope": "layer"}, "'layer': must be one of per_layer, global"),
        ({"cache": 8, "context": 0}, "context=0"),
        ({"cache": 8, "batch": 1.5}, "batch=1.5"),
        ({"cache": 8, "staging": -1}, "staging=-1"),
        ({"cache": 8, "predictor_bytes": -1}, "predictor_bytes=-1"),
    ],
)
def test_what_cannot_be(asked, message):
    with pytest.raises(ConfigError, match=message):
        budget(**asked)


def test_a_card_without_sizes():
    bare = plain_card("bare", n_experts=8, top_k=2, layer_numbers=(0, 1))
    with pytest.raises(
        MissingData, match=r"bare: .* expert_bytes_L, dense_bytes, .*simulator\.model_card"
    ):
        budget(bare, cache=0.5)
    with pytest.raises(MissingData, match="does not say kv_bytes_per_token; pass"):
        budget(dataclasses.replace(QWEN, kv_bytes_per_token=None), memory="12GiB")


def test_one_cache_for_experts_of_two_sizes_says_how_many_it_holds():
    """All of them are all; a share of the bytes is that share of the experts, not of the largest."""
    every = 128 * 48
    assert budget(MIXED, cache=1.0, scope="global").experts == every
    half = budget(MIXED, cache=0.5, scope="global")
    assert half.experts == every // 2 > sum(half.slots_G)
    assert budget(MIXED, cache=0.5).experts == every // 2
    assert budget(cache=0.5, scope="global").experts == every // 2


@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_more_bytes_are_more_experts_and_never_more_than_there_are(scope):
    plain = budget(cache=0.5, scope=scope)
    more = budget(cache=0.5, scope=scope, more_bytes=100 * 9 * MIB + 1)
    assert more.experts == plain.experts + 100
    assert more.whole_model_bytes == plain.whole_model_bytes + 100 * 9 * MIB
    if scope == "per_layer":
        assert more.room_G == (67,) * 4 + (66,) * 44
    assert budget(cache=1.0, scope=scope, more_bytes=10**12).experts == 128 * 48
