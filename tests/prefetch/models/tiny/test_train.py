"""Training: the same seed gives the same files, what is held out is never learnt, and the loss falls."""

import json
from dataclasses import replace

import pytest
import torch

from prefetch.errors import ConfigError, FormatError
from prefetch.models.tiny import corpus, train
from prefetch.models.tiny.net import Shape

SHAPE = Shape(layers=2, experts=6, top_k=2, d=32, ff=8, context=16, vocabulary=280)


@pytest.fixture(scope="module")
def texts():
    return corpus.build(["data", "prose"], 20_000)


def made(folder, texts, *, steps, seed=0):
    folder.mkdir()
    train.make(folder, texts, SHAPE, steps=steps, seed=seed)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(tmp_path, texts):
    a, b, c = (
        made(tmp_path / name, texts, steps=2, seed=s) for name, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["held_out.safetensors"] == c["held_out.safetensors"]


def test_the_loss_on_unseen_text_falls(tmp_path, texts):
    about = json.loads(made(tmp_path / "model", texts, steps=40)["model.json"])
    assert about["held_out_loss"]["trained"] < about["held_out_loss"]["untrained"] - 0.5
    assert about["corpus_md5"] == {name: corpus.md5_of(text) for name, text in texts.items()}


def test_what_is_held_out_is_the_end_and_is_not_in_the_rest(tmp_path, texts):
    made(tmp_path / "model", texts, steps=0)
    trained = train.load(tmp_path / "model", SHAPE)
    for name, text in texts.items():
        seen, held_out = train.split(text)
        assert seen + held_out == text
        assert len(held_out) == pytest.approx(0.1 * len(text), rel=0.2)
        assert not any(held_out[i : i + 128] in seen for i in range(0, len(held_out) - 128, 64))
        assert trained.coder.decode(trained.held_out[name]) == held_out


def test_training_changes_no_thread_and_no_random_state_of_the_process(tmp_path, texts):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    made(tmp_path / "model", texts, steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_another_shape_or_with_merges_that_explode_is_refused(tmp_path, texts):
    made(tmp_path / "model", texts, steps=0)
    with pytest.raises(FormatError, match="size mismatch"):
        train.load(tmp_path / "model", replace(SHAPE, ff=12))
    path = tmp_path / "model" / "model.json"
    about = json.loads(path.read_text())
    for merges, told in (
        ([[32, 300]], "two of 256 tokens"),
        ([[32, 32], *([i, i] for i in range(256, 290))], "33"),
    ):
        path.write_text(json.dumps({**about, "merges": merges}))
        with pytest.raises(FormatError, match=told):
            train.load(tmp_path / "model", SHAPE)


def test_too_little_text_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="corpus domain short: expected more than 16 tokens"):
        made(tmp_path / "model", {"short": b"too short\n" * 9}, steps=1)
