"""The sizes of the shipped models against what their publishers count."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefetch.errors import ConfigError, FormatError
from prefetch.models.architecture import BITS_PER_WEIGHT, Architecture
from prefetch.models.cards import CARDS, card_names, load_architecture, load_card, model_card
from prefetch.trace.card import ModelCard

MIB = 2**20
NAMES = card_names()
ROUNDED = {"dbrx", "phi_3_5_moe", "nllb_moe_54b", "ernie_4_5_21b_a3b"}  # published to 3 or 4 digits


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_published(name):
    """Exact where the publisher's count is; half a unit of the third digit elsewhere."""
    model = load_architecture(name)
    counted = model.parameters + model.left_out_parameters
    assert counted == pytest.approx(
        model.published_parameters, rel=0.005 if name in ROUNDED else 0, abs=0
    )


@pytest.mark.parametrize("name", [n for n in NAMES if load_architecture(n).left_out_parameters])
def test_what_is_left_out_is_small(name):
    model = load_architecture(name)
    assert 0 < model.left_out_parameters < 0.04 * model.published_parameters


@pytest.mark.parametrize("name", NAMES)
def test_active_parameters_are_those_published(name):
    """3 %: publishers print two or three digits, and do not say what they round."""
    model = load_architecture(name)
    if model.published_active_parameters is not None:
        assert model.active_parameters == pytest.approx(model.published_active_parameters, rel=0.03)


@pytest.mark.parametrize(
    ("name", "own_embeddings"),
    [("qwen3_next_80b_a3b", 0), ("deepseek_v3", 1), ("glm_4_5", 1), ("glm_4_5_air", 1)],
)
def test_prediction_layers_left_out_are_one_layer(name, own_embeddings):
    """One MoE layer with full attention, a 2h x h projection, three norms, a copy of both tables."""
    m = load_architecture(name)
    moe = m.n_experts * (m.expert_weights + m.hidden_size + m.router_bias)
    shared = m.shared_weights // len(m.moe_layers)
    block = m.attention.weights(m.hidden_size) + moe + shared + 2 * m.hidden_size
    joint = 2 * m.hidden_size**2 + 3 * m.hidden_size
    tables = own_embeddings * 2 * m.vocab_size * m.hidden_size
    assert m.left_out_parameters == block + joint + tables


@pytest.mark.parametrize("name", NAMES)
def test_bytes_add_up(name):
    """At 16 bits everywhere the parts are the whole: two bytes for each parameter."""
    fields = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    fields.pop("_target_")
    for part in ("expert_precision", "matrix_precision", "rest_precision"):
        fields[part] = "bf16"
    card = model_card(**fields)
    parts = (card.all_expert_bytes, card.dense_bytes, card.shared_bytes)
    assert sum(part or 0 for part in parts) == 2 * load_architecture(name).parameters


@pytest.mark.parametrize("name", NAMES)
def test_card_survives_json_and_names_its_target(name):
    card = load_card(name)
    assert ModelCard.from_json(card.to_json(), name) == card
    fields = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    assert fields.pop("_target_") == "prefetch.models.cards.model_card"
    assert model_card(**fields) == card


@pytest.mark.parametrize(
    ("name", "precision", "mib"),
    [
        ("switch_base_128", "fp16", 9),
        ("switch_base_128", "fp32", 18),
        ("qwen1_5_moe_a2_7b", "bf16", 16.5),
        ("qwen3_30b_a3b", "bf16", 9),
        ("olmoe_1b_7b", "bf16", 12),
        ("mixtral_8x7b", "bf16", 336),
    ],
)
def test_expert_sizes(name, precision, mib):
    assert set(load_card(name, expert_precision=precision).expert_bytes_L) == {mib * MIB}


def test_gpt_oss_expert_is_what_a_device_read():
    """Golden: BigMoeOnEdge 2d4f2b1, gpt-oss-120b trace, 13,219,200 bytes per expert in all layers.

    That engine reads the matrices; ours are larger by exactly the biases, 2F + D numbers in bf16.
    """
    biases = (2 * 2880 + 2880) * 2
    assert set(load_card("gpt_oss_120b").expert_bytes_L) == {13_219_200 + biases}


def test_q4_k_m_experts_are_what_a_device_read():
    """Golden: BigMoeOnEdge 2d4f2b1, Qwen3-30B-A3B-Q4_K_M trace, layer by layer."""
    large = {*range(6), *range(8, 42, 3), *range(42, 48)}
    expected = tuple(3_059_712 if n in large else 2_654_208 for n in range(48))
    card = load_card("qwen3_30b_a3b", expert_precision="q4_k_m")
    assert card.expert_bytes_L == expected
    mean_bits = sum(expected) * 8 / 48 / (3 * 2048 * 768)
    assert mean_bits == BITS_PER_WEIGHT["q4_k_m"]


def test_another_precision_changes_what_it_names():
    published, smaller = (
        load_card("qwen2_57b_a14b"),
        load_card("qwen2_57b_a14b", expert_precision="int4"),
    )
    assert smaller.all_expert_bytes * 4 == published.all_expert_bytes
    assert (smaller.dense_bytes, smaller.shared_bytes) == (
        published.dense_bytes,
        published.shared_bytes,
    )
    both = load_card("qwen2_57b_a14b", expert_precision="int4", matrix_precision="fp8")
    assert both.shared_bytes * 2 == published.shared_bytes
    assert both.dense_bytes < published.dense_bytes


@pytest.mark.parametrize(
    ("name", "layers", "first", "kv_bytes"),
    [
        ("deepseek_v3", 58, 3, 61 * (512 + 64) * 2),  # latent and rope key, dense layers too
        ("deepseek_v2_lite", 26, 1, 27 * (512 + 64) * 2),
        ("qwen3_30b_a3b", 48, 0, 48 * 2 * 4 * 128 * 2),
        ("gpt_oss_20b", 24, 0, 12 * 2 * 8 * 64 * 2),  # twelve layers see 128 tokens only
        ("qwen3_next_80b_a3b", 48, 0, 12 * 2 * 2 * 256 * 2),  # 36 layers are linear
    ],
)
def test_layers_and_cache(name, layers, first, kv_bytes):
    card = load_card(name)
    assert card.layer_numbers == tuple(range(first, first + layers))
    assert card.kv_bytes_per_token == kv_bytes


def test_encoder_and_decoder_layers_are_told_apart():
    switch, nllb = load_card("switch_base_128"), load_card("nllb_moe_54b")
    assert switch.layer_numbers == (1, 3, 5, 7, 9, 11) * 2
    assert nllb.layer_numbers == (3, 7, 11, 15, 19, 23) * 2
    assert switch.layer_stacks == nllb.layer_stacks == ("encoder",) * 6 + ("decoder",) * 6


def edited(tmp_path: Path, **changes: object) -> Path:
    fields = yaml.safe_load((CARDS / "olmoe_1b_7b.yaml").read_text()) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v != "absent"}))
    return path


def test_a_users_yaml_loads(tmp_path):
    assert load_card(edited(tmp_path)) == load_card("olmoe_1b_7b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "absent"}, "mine.yaml: missing layers"),
        ({"layer": 16}, "mine.yaml: no field layer"),
        ({"layers": "16"}, "mine.yaml: layers must be int; found '16'"),
        ({"top_k": True}, "mine.yaml: top_k must be int; found True"),
        ({"hidden_size": 0}, "mine.yaml: hidden_size, .* must be positive"),
        ({"expert_precision": "bf15"}, "mine.yaml: precisions must be among"),
        ({"score_function": "argmax"}, "mine.yaml: score_function must be among"),
        ({"attention": {"kind": "none"}}, "mine.yaml: attention.kind must be among"),
        ({"attention": {"kind": "grouped"}}, "mine.yaml: attention: missing head_dim"),
        ({"attention": 3}, "mine.yaml: attention must be"),
        ({"first_dense_layers": 1}, "mine.yaml: dense_size must be given"),
        ({"moe_every": 0}, "mine.yaml: .*moe_every must be positive"),
        ({"first_dense_layers": -(2**62)}, "mine.yaml: first_dense_layers.* must not be negative"),
        ({"layers": 10**12}, "mine.yaml: .*layers at most"),
        ({"active_leaves_out": 5}, "mine.yaml: active_leaves_out must be tuple; found 5"),
        ({"active_leaves_out": [{}]}, "mine.yaml: active_leaves_out must be tuple; found"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_card(edited(tmp_path, **changes))


def test_an_error_of_the_card_itself_names_the_file(tmp_path):
    with pytest.raises(FormatError, match=r"mine\.yaml: .*top_k must be from 1"):
        load_card(edited(tmp_path, top_k=10**6))


def test_unknown_names_are_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"no model card 'qwen9'; there are .*qwen3_30b_a3b"
    ) as name:
        load_card("qwen9")
    with pytest.raises(ConfigError, match=r"no precision 'int3'; there are .*mxfp4") as precision:
        load_card("olmoe_1b_7b", expert_precision="int3")
    assert "\n" not in str(name.value) + str(precision.value)


def test_q4_k_m_refuses_rows_that_it_cannot_pack():
    with pytest.raises(ConfigError, match="packs rows of 256"):
        load_card("gpt_oss_20b", expert_precision="q4_k_m")


def test_files_that_are_no_mapping_are_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"list.yaml: a model card is a mapping"):
        load_card(path)
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"list.yaml: not YAML"):
        load_card(path)


def test_architectures_compare_by_value():
    assert isinstance(load_architecture("dbrx"), Architecture)
    assert load_architecture("dbrx") == load_architecture(CARDS / "dbrx.yaml")
