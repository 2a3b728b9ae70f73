"""The default source, at a size that trains in a second: what is recorded, and what a key depends on."""

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from prefetch.config import CONFIGS
from prefetch.errors import ConfigError
from prefetch.sources.tiny_moe import TinyMoE
from prefetch.trace.routing import DECODE, PREFILL

SMALL = TinyMoE(
    layers=2,
    experts=8,
    d=32,
    ff=8,
    context=24,
    vocabulary=300,
    steps=3,
    domains=["data", "cpp"],
    bytes_per_domain=20_000,
    requests_per_domain=5,
    prompt_tokens=12,
    new_tokens=10,
)


def train(source, folder):
    folder.mkdir(exist_ok=True)
    source.upstream()["model"].build(folder, {})
    return {"model": folder}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train(SMALL, tmp_path_factory.mktemp("model"))


def test_the_same_seed_gives_the_same_bytes(collect, tmp_path):
    """Training and recording, twice from nothing; and another seed is another trace."""

    def files(name, source):
        folder = collect(source, upstream=train(source, tmp_path / name)).folder
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    source = replace(SMALL, gate_inputs=True)
    first = files("a", source)
    assert first == files("b", source)
    assert first != files("c", replace(source, seed=1))


def test_every_request_is_a_prompt_and_a_sampled_continuation(collect, model):
    reader = collect(SMALL, upstream=model)
    trace = reader.load("weights")
    assert (reader.n_requests, reader.n_tokens) == (10, 220)
    assert trace.position_T.tolist() == list(range(22)) * 10
    assert trace.phase_T.tolist() == ([PREFILL] * 12 + [DECODE] * 10) * 10
    assert trace.executed_T.all() and (trace.token_T >= 0).all()
    assert [reader.domains[d] for d in trace.domain_T[::110]] == ["data", "cpp"]
    assert len(np.unique(trace.token_T.reshape(10, 22), axis=0)) == 10
    assert (np.diff(trace.weights_TLK.astype(float)) <= 0).all(), "best first"
    assert np.abs(trace.weights_TLK.astype(float).sum(-1) - 1).max() < 2e-3  # float16 of two halves


def test_prompts_are_unseen_text_and_the_corpus_is_named(collect, model):
    from prefetch.models.tiny.train import load

    reader, trained = collect(SMALL, upstream=model), load(model["model"], SMALL._shape())
    tokens = reader.load().token_T.reshape(10, 22)
    for domain, rows in (("data", tokens[:5]), ("cpp", tokens[5:])):
        held_out = trained.held_out[domain]
        windows = {tuple(held_out[i : i + 12]) for i in range(0, len(held_out) - 11, 12)}
        assert {tuple(row[:12]) for row in rows} <= windows
    inputs = reader.provenance.inputs
    assert {name: f"corpus.{name}" in inputs for name in SMALL.domains} == dict.fromkeys(
        SMALL.domains, True
    )
    assert all(digest.startswith("md5:") for digest in inputs.values())


def test_recorded_gate_inputs_and_router_weights_give_the_recorded_ids(collect, model):
    source = replace(SMALL, gate_inputs=True, pre_attention=True)
    reader = collect(source, upstream=model)
    trace = reader.load("gate_inputs", "pre_attention")
    weights_L = reader.router_weights()
    logits_TLE = np.stack(
        [trace.gate_inputs_TLD[:, i].astype(np.float32) @ weights_L[i].T for i in range(2)], axis=1
    )
    again = np.argsort(-logits_TLE, axis=-1)[..., :2]
    assert (again == trace.ids_TLK).mean() > 0.99  # float16 inputs flip near ties
    assert reader.provenance.facts["own_gate_agreement"] == 1.0
    assert trace.pre_attention_TLD.shape == trace.gate_inputs_TLD.shape == (220, 2, 32)


def test_scores_are_all_or_the_best_with_their_ids(collect, model):
    everything = collect(replace(SMALL, scores="all"), upstream=model).load("scores")
    best = collect(replace(SMALL, scores=3), upstream=model).load("scores", "score_ids")
    assert everything.scores_TLM.shape == (220, 2, 8) and best.scores_TLM.shape == (220, 2, 3)
    assert (best.score_ids_TLM[..., :2] == best.ids_TLK).all()
    taken = np.take_along_axis(everything.scores_TLM, best.score_ids_TLM.astype(int), -1)
    assert (taken == best.scores_TLM).all()


def test_top_1_keeps_the_raw_probability(collect, tmp_path):
    source = replace(SMALL, top_k=1)
    reader = collect(source, upstream=train(source, tmp_path / "model"))
    assert reader.card.weights_normalised is False
    assert (reader.load("weights").weights_TLK < 0.999).all()


def test_the_card_counts_the_bytes_of_the_net(collect, model):
    from safetensors.torch import load_file

    card = collect(SMALL, upstream=model).card
    tensors = load_file(model["model"] / "model.safetensors")
    assert card.expert_bytes_L == (2 * 32 * 8 * 4,) * 2
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert card.dense_bytes + card.all_expert_bytes == total
    assert (card.hidden_size, card.expert_precision, card.weights_normalised) == (32, "fp32", True)


def test_only_what_the_model_depends_on_trains_another():
    def key(source):
        return source.upstream()["model"].key

    same = replace(SMALL, requests_per_domain=9, gate_inputs=True, temperature=0.5, prompt_tokens=3)
    assert key(same) == key(SMALL)
    other = [{"seed": 1}, {"steps": 4}, {"domains": ["cpp", "data"]}, {"experts": 9}]
    assert len({key(replace(SMALL, **change)) for change in other} | {key(SMALL)}) == 5


def test_own_text_is_known_by_its_content(collect, tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "letters").mkdir(parents=True)
        for name in ("letters/a.txt", "notes.txt"):
            (tmp_path / place / name).write_text("".join(f"{name} says {i}\n" for i in range(900)))
    here, there = (replace(SMALL, path=str(tmp_path / place)) for place in ("here", "there"))
    assert here.upstream()["model"].key == there.upstream()["model"].key
    assert here.settings() == there.settings()
    reader = collect(here, upstream=train(here, tmp_path / "model"))
    assert reader.domains == ("letters", "notes.txt")


def test_too_many_requests_are_refused_with_what_there_is(collect, model):
    with pytest.raises(
        ConfigError, match=r"the unseen text of data holds [0-9]+ prompts of 12 tok"
    ):
        collect(replace(SMALL, requests_per_domain=1000), upstream=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k must be at most experts"),
        ({"d": 40}, "d must be a multiple of"),
        ({"context": 21}, "at most context"),
        ({"domains": ["data", "poetry"]}, "domains must be some of"),
        ({"domains": ["data", "data"]}, "each once"),
        ({"scores": "most"}, "scores must be null, all, or a number"),
        ({"scores": 9}, "scores must be null, all, or a number"),
        ({"steps": -1}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_threads_are_given_back(collect, model):
    threads = torch.get_num_threads()
    collect(SMALL, upstream=model)
    assert torch.get_num_threads() == threads


def test_the_file_lists_every_setting_with_its_default():
    listed = OmegaConf.load(CONFIGS / "source" / "tiny_moe.yaml")
    defaults = {field.name: field.default for field in fields(TinyMoE)}
    assert set(listed) == set(defaults) | {"_target_"}
    given = OmegaConf.to_container(listed, resolve=False)
    for name in defaults.keys() - {"seed", "domains"}:
        assert given[name] == defaults[name], name
    assert tuple(given["domains"]) == defaults["domains"]


def test_the_quick_preset_is_a_smaller_version_of_the_default():
    preset = OmegaConf.load(CONFIGS / "experiment" / "quick.yaml")
    quick = replace(TinyMoE(), **preset.source)
    assert (
        quick.steps < TinyMoE.steps
        and quick.upstream()["model"].key != TinyMoE().upstream()["model"].key
    )


def test_a_trace_that_is_found_does_not_wait_for_torch():
    code = (
        "import sys; from prefetch.sources.tiny_moe import TinyMoE; TinyMoE().upstream()['model'].key;"
        "sys.exit(' '.join({'torch', 'pyarrow', 'sympy', 'numba'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
