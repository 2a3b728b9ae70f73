"""Tiny random-weight models of many MoE families, built from transformers configurations; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from prefetch.models.capture import routed_layers
from prefetch.models.hf import LoadedModel

# A missed override would leave a model at its full size: 23 GB for some.
MOST_PARAMETERS = 4_000_000
# Tried on every configuration; a family takes the names that it has.
SIZES = {
    128: "vocab_size max_position_embeddings max_seq_len",
    32: "hidden_size d_model shared_intermediate_size",
    48: (
        "intermediate_size ffn_hidden_size ffn_dim intermediate_size_mlp encoder_ffn_dim "
        "decoder_ffn_dim d_ff"
    ),
    4: (
        "num_hidden_layers num_layers n_layers num_attention_heads n_heads qk_rope_head_dim "
        "qk_nope_head_dim n_group linear_num_value_heads encoder_layers decoder_layers "
        "encoder_attention_heads decoder_attention_heads num_heads num_decoder_layers "
        "zero_expert_num"
    ),
    2: (
        "num_key_value_heads num_experts_per_tok moe_k moe_topk num_experts_per_token "
        "eos_token_id topk_group linear_num_key_heads mamba_expand num_sparse_encoder_layers "
        "num_sparse_decoder_layers encoder_sparse_step decoder_sparse_step attn_layer_period "
        "expert_layer_period kv_n_heads"
    ),
    8: (
        "head_dim num_experts num_local_experts n_routed_experts moe_num_experts q_lora_rank "
        "kv_lora_rank v_head_dim qk_head_dim linear_key_head_dim linear_value_head_dim "
        "mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim ssm_state_size "
        "d_kv kv_channels"
    ),
    16: (
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size"
    ),
    0: "pad_token_id decoder_start_token_id",
    1: (
        "bos_token_id first_k_dense_replace num_dense_layers moe_layer_start_index mamba_n_groups "
        "n_groups n_shared_experts num_shared_experts moe_num_shared_experts attn_layer_offset "
        "expert_layer_offset"
    ),
    64: "sliding_window",
}
SMALL: dict[str, Any] = {name: value for value, names in SIZES.items() for name in names.split()}
SMALL |= {"norm_topk_prob": True, "use_mamba_kernels": False}
# Lists with an entry per layer follow the number of layers; some families take another default from it.
LAYER_LISTS = [
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "moe_layers",
    "no_rope_layers",
]
ALL, ODD, TAIL = (0, 1, 2, 3), (1, 3), (1, 2, 3)
LATENT = {"num_key_value_heads": 4}


@dataclass(frozen=True)
class Family:
    """What a family is expected to be: its MoE layers by their own numbers, and its experts per token."""

    layers: tuple[int, ...]
    changes: dict[str, Any] = field(
        default_factory=dict
    )  # None = leave the configuration's default
    top_k: int = 2
    n_experts: int = 8
    auto: str = "AutoModelForCausalLM"


DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
}
IMAGES = {  # its language model alone is run
    "text_config": {key: SMALL[key] for key in SMALL if key not in ("layer_types", "num_layers")}
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    },
}
MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
FAMILIES = {
    "afmoe": Family(TAIL),
    "beam": Family((3,)),
    "cohere2_moe": Family(ALL),
    "dbrx": Family(ALL, DBRX),
    "deepseek_v2": Family(TAIL, LATENT),
    "deepseek_v3": Family(TAIL, LATENT),
    "deepseek_v32": Family((3,), LATENT),
    "deepseek_v4": Family(ALL),
    "dots1": Family(TAIL),
    "ernie4_5_moe": Family(TAIL),
    "exaone_moe": Family(TAIL),
    "flex_olmo": Family(ALL),
    "flint": Family((3,)),
    "glm4_moe": Family(TAIL),
    "glm4_moe_lite": Family(TAIL, LATENT),
    "gpt_oss": Family(ALL),
    "granitemoe": Family(ALL),
    "granitemoe_swa": Family(ALL),
    "granitemoehybrid": Family(ALL, {**MIXED, "layers_block_type": None}),
    "granitemoeshared": Family(ALL),
    "hunyuan_v1_moe": Family(ALL),
    "hy_v3": Family(TAIL),
    "inkling_text": Family(ALL),
    "jamba": Family(ODD, dict.fromkeys(LAYER_LISTS)),
    "jetmoe": Family(ALL),
    "kimi_linear": Family(TAIL, {**LATENT, **MIXED, "linear_head_dim": 8, "linear_num_heads": 4}),
    "kolibri1": Family(ALL),
    "laguna": Family(TAIL),
    "lfm2_moe": Family(TAIL, {"layer_types": ["conv", "full_attention"] * 2}),
    "llama4_text": Family(ALL),
    "longcat_flash": Family((0, 1), {**LATENT, "head_dim": 4}),
    "mellum": Family(ALL),
    "mimo_v2_flash": Family(TAIL),
    "minimax": Family(ALL),
    "minimax_m2": Family(ALL),
    "mistral4": Family(TAIL, LATENT, auto="Mistral4ForCausalLM"),
    "mixtral": Family(ALL),
    "nemotron_h": Family(
        ODD,
        {
            "layer_types": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        },
    ),
    "nllb-moe": Family(ODD * 2, auto="AutoModelForSeq2SeqLM"),
    "olmoe": Family(ALL),
    "phimoe": Family(ALL),
    "qwen2_moe": Family(ODD),
    "qwen3_5_moe_text": Family(ALL),
    "qwen3_moe": Family(ODD),
    "qwen3_next": Family(ODD),
    "qwen3_vl_moe": Family(ODD, IMAGES, auto="AutoModelForImageTextToText"),
    "solar_open": Family(ALL),
    "switch_transformers": Family(ODD * 2, top_k=1, auto="AutoModelForSeq2SeqLM"),
    "zaya": Family(ALL, {"num_experts_per_tok": 1}, top_k=1),
}
NAMED = {"deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear"}


def tiny_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind, changes = CONFIG_MAPPING[name], FAMILIES[name].changes
    usual = kind()
    values = {key: value for key, value in SMALL.items() if hasattr(usual, key)}
    for key in LAYER_LISTS:
        given = getattr(usual, key, None)
        if isinstance(given, list) and len(given) >= 4:
            values[key] = given[:4]
    if name in NAMED:
        values.pop("head_dim", None)
    if name == "dbrx":  # its names are aliases of others, and may be given once
        names = ("vocab_size", "d_model", "n_heads", "n_layers", "max_seq_len")
        values = {key: SMALL[key] for key in names}
    values |= changes
    return kind(**{key: value for key, value in values.items() if value is not None})


@functools.cache
def build(name: str) -> LoadedModel:
    """In evaluation mode, with routers that tell tokens apart: weights as they start are too small, or zero."""
    import torch
    import transformers

    auto, config = getattr(transformers, FAMILIES[name].auto), tiny_config(name)
    make = getattr(auto, "from_config", auto)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in make(config).parameters())
    assert size < MOST_PARAMETERS, f"{name}: {size:,} parameters; an override is missing"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"attn_implementation": "eager"} if name == "nllb-moe" else {}
        model = make(config, **settings).eval()
        for layer in routed_layers(model):
            for weight in layer.router.parameters():
                torch.nn.init.normal_(weight, std=0.3)
            if hasattr(
                layer.router, "tid2eid"
            ):  # ids are a table of the token, which starts at zero
                layer.router.tid2eid.copy_(torch.rand(128, 8).argsort(dim=1)[:, :2])
    return LoadedModel(name, None, model, Tokens())


@dataclass(frozen=True)
class Tokens:
    """What of a tokenizer a capture asks for."""

    pad_token_id: int = 0
    eos_token_id: int = 2


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family, one after the other."""
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[[str], LoadedModel]:
    """The model of a family, built once."""
    return build


@pytest.fixture
def expected() -> dict[str, Family]:
    return FAMILIES
