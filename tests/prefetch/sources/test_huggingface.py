"""From a saved model and text files to a trace: requests, domains, phases, limits, keys, and every refusal."""

import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.huggingface import HuggingFace

SENTENCE = "the router sends every token to two of the experts and the cache holds some of them "


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Qwen3-MoE with one dense layer and a tokenizer of words, as a folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("saved") / "tiny-moe"
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *sorted(set(SENTENCE.split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    ).save_pretrained(folder)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    """Two domains: a subfolder with two files, and a file of its own."""
    folder = tmp_path / "texts"
    (folder / "prose").mkdir(parents=True)
    (folder / "prose" / "one.txt").write_text(SENTENCE * 2)
    (folder / "prose" / "two.txt").write_text(SENTENCE)
    (folder / "notes.txt").write_text("every token holds the experts")
    return folder


def test_text_becomes_a_trace(saved, texts, collect):
    reader = collect(
        HuggingFace(model=str(saved), path=str(texts), request_tokens=12, batch_size=3)
    )
    trace, card = reader.load("weights"), reader.card
    # 5, 34 and 17 words in windows of 11, each behind a [BOS]
    assert reader.domains == ("notes", "prose")
    sizes = np.diff([*trace.starts_R, trace.n_tokens]).tolist()
    assert sizes == [6, 12, 12, 12, 2, 12, 7]
    assert (trace.token_T[trace.starts_R] == 1).all()
    assert (card.layer_numbers, card.n_experts, card.top_k) == ((1, 2), 8, 2)
    assert (card.name, card.revision, card.routed_precision) == ("tiny-moe", None, "fp32")
    assert card.expert_bytes_L == (3 * 32 * 16 * 4,) * 2
    assert card.kv_bytes_per_token == 2 * 2 * 8 * 4 * 3
    assert reader.provenance.facts["own_gate_agreement"] == 1.0
    assert reader.provenance.kind == "real"


def test_generation_is_recorded_as_decode_rows(saved, texts, collect):
    source = HuggingFace(
        model=str(saved), path=str(texts / "prose"), request_tokens=10, new_tokens=4
    )
    trace = collect(source).load()
    starts = [*trace.starts_R, trace.n_tokens]
    for start, stop in itertools.pairwise(starts):
        phase = trace.phase_T[start:stop]
        assert 0 < phase.sum() <= 4 and (np.diff(phase.astype(int)) >= 0).all()
        assert trace.position_T[start:stop].tolist() == list(range(stop - start))


def test_the_same_seed_samples_the_same_bytes(saved, texts, collect):
    def tokens(seed: int) -> list[int]:
        source = HuggingFace(
            model=str(saved), path=str(texts), new_tokens=6, temperature=1.5, seed=seed
        )
        return collect(source).load().token_T.tolist()

    assert tokens(1) == tokens(1) != tokens(2)


def test_scores_and_gate_inputs_come_with_the_router_weights(saved, texts, collect):
    source = HuggingFace(model=str(saved), path=str(texts), scores="all", gate_inputs=True)
    reader = collect(source)
    trace, weights = reader.load("scores", "gate_inputs"), reader.router_weights()
    assert trace.scores_TLM.shape[2] == 8 and sorted(weights) == [1, 2]
    for slot, number in enumerate((1, 2)):
        logits = trace.gate_inputs_TLD[:, slot].astype(np.float32) @ weights[number].T
        np.testing.assert_allclose(logits, trace.scores_TLM[:, slot], atol=2e-3)  # float16 inputs
    assert any("scores are the router's logits" in note for note in reader.provenance.notes)
    best = collect(HuggingFace(model=str(saved), path=str(texts), scores=3)).load(
        "scores", "score_ids"
    )
    assert best.score_ids_TLM.shape[2] == 3 and best.score_ids_TLM.dtype == np.uint8


def test_limits_stop_before_they_are_passed(saved, texts, collect):
    few = collect(HuggingFace(model=str(saved), path=str(texts), request_tokens=8, max_requests=3))
    assert few.n_requests == 3
    short = HuggingFace(
        model=str(saved), path=str(texts), request_tokens=8, new_tokens=2, max_tokens=25
    )
    assert collect(short).n_tokens <= 25


def test_jsonl_has_a_text_and_a_domain_a_line(saved, tmp_path, collect):
    path = tmp_path / "rows.jsonl"
    rows = [{"body": SENTENCE, "kind": "a"}, {"body": "the cache", "kind": "b"}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = HuggingFace(model=str(saved), path=str(path), field="body", domain_field="kind")
    trace = collect(source).load()
    assert trace.domains == ("a", "b") and np.bincount(trace.domain_T).tolist() == [18, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"rows.jsonl, line 2: expected one JSON object per line"),
        (
            '{"body": "a"}\n',
            r"line 1: expected text in the field 'text', got None; the fields are \['body'\]",
        ),
        ("[1]\n", r"line 1: expected an object"),
        ("\n", "expected text, found none"),
        (b"\xff\xfe\xfa", "expected UTF-8 text"),
    ],
)
def test_malformed_text_is_named(saved, tmp_path, collect, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=message):
        collect(HuggingFace(model=str(saved), path=str(path)))


def test_a_dataset_is_read_by_name_and_pinned(saved, monkeypatch, collect):
    from prefetch.sources import huggingface

    def load_dataset(name, part, *, split, revision, streaming):
        assert (name, part, split, revision, streaming) == ("me/set", None, "test", "abc", True)
        return [{"text": SENTENCE}, {"text": "the cache"}]

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)  # the package is optional
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr(huggingface, "pinned", lambda *_args, **_kwargs: "abc")
    source = HuggingFace(model=str(saved), dataset="me/set", split="test")
    assert source.settings()["dataset_revision"] == "abc"
    trace = collect(source).load()
    assert trace.domains == ("set",) and len(trace.starts_R) == 2


def test_the_key_knows_contents_and_not_places(saved, texts):
    source = HuggingFace(model=str(saved), path=str(texts))
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= set(
        source.files()
    )
    assert {"text/notes.txt", "text/prose/one.txt"} <= set(source.files())
    assert str(saved.parent) not in json.dumps(source.settings())
    assert source.settings()["model"] == "tiny-moe"


def test_a_hub_that_cannot_be_reached_is_one_clear_error(texts, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="nobody/no-such-moe: neither a folder here") as caught:
        HuggingFace(model="nobody/no-such-moe", path=str(texts)).settings()
    assert "HF_HUB_OFFLINE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model must be given"),
        ({"path": None}, "text must be given"),
        ({"dataset": "a/b"}, "not both"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"new_tokens": -1}, "must not be negative"),
        ({"scores": "some"}, "scores must be null, all"),
        ({"max_tokens": 5}, "max_tokens must hold one request"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        HuggingFace(**({"model": "a/b", "path": "text.txt"} | change))


def damaged(saved: Path, tmp_path: Path, **change: bytes | None) -> str:
    """A copy of the saved model with some files replaced or left out."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in saved.iterdir():
        content = change.get(path.name.split(".")[0], path.read_bytes())
        if content is not None:
            (folder / path.name).write_bytes(content)
    return str(folder)


def test_damaged_models_are_refused_by_name(saved, texts, tmp_path, collect):
    weights = (saved / "model.safetensors").read_bytes()
    model = damaged(saved, tmp_path, model=weights[:1000])
    with pytest.raises(FormatError, match=r"source.model=.*damaged: cannot be loaded"):
        collect(HuggingFace(model=model, path=str(texts)))


def test_a_checkpoint_that_lacks_weights_is_not_filled_at_random(saved, texts, tmp_path, collect):
    from safetensors.numpy import load_file, save

    tensors = load_file(saved / "model.safetensors")
    name = next(name for name in tensors if "norm" in name)
    tensors.pop(name)
    model = damaged(saved, tmp_path, model=save(tensors, {"format": "pt"}))
    with pytest.raises(FormatError, match="the checkpoint lacks 1 weights"):
        collect(HuggingFace(model=model, path=str(texts)))


def test_a_folder_without_a_model_a_wrong_dtype_and_a_missing_device_are_refused(
    saved, texts, collect
):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        HuggingFace(model=str(texts), path=str(texts)).files()
    with pytest.raises(ConfigError, match="dtype: expected auto or one of"):
        collect(HuggingFace(model=str(saved), path=str(texts), dtype="float8"))
    with pytest.raises(ConfigError, match=r"source.device=nowhere"):
        collect(HuggingFace(model=str(saved), path=str(texts), device="nowhere"))


def test_other_precisions_are_on_the_card(saved, texts, collect):
    card = collect(HuggingFace(model=str(saved), path=str(texts), dtype="bf16")).card
    assert (card.routed_precision, card.expert_precision) == ("bf16", "bf16")
    assert card.expert_bytes_L == (3 * 32 * 16 * 2,) * 2
