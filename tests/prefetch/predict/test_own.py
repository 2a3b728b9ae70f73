"""A predictor of one's own: each class has guesses of its own, and new ones when its file changes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recorded_traces import on_disk
from routing_traces import random_trace

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError
from prefetch.predict.markov import Markov
from prefetch.predict.part import whole
from prefetch.predict.popularity import Popularity
from prefetch.predict.predictor import restore, save
from prefetch.predict.recipes import name_of, predictions_recipe
from prefetch.trace.predictions import PredictionsReader

SOURCE = """
import numpy as np

class Always:
    needs, sees, score = (), "nothing", "rank"
    def __init__(self, horizons=(1,), expert=0):
        self.horizons, self.expert = tuple(horizons), expert
    def fit(self, train, validation):
        return self
    def scores(self, past):
        scores = np.zeros(past.shape, np.float32)
        scores[:, :, self.expert] = 1
        return scores

class Last(Always):
    def scores(self, past):
        return np.broadcast_to(np.arange(past.shape[2], dtype=np.float32), past.shape)

class Wide(Always):
    def scores(self, past):
        return np.zeros((*past.shape[:2], past.shape[2] + 1), np.float32)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_guesses.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_guesses", raising=False)
    return path


def configured(tmp_path: Path, name: str) -> Config:
    folder = tmp_path / "trace"
    if not folder.exists():
        on_disk(random_trace(n_requests=12, tokens=8), folder)
    words = ["stage=train", f"store={tmp_path / 'store'}", f"trace={folder}", "train.horizons=[1]"]
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=words)
    cfg.predictor = OmegaConf.create({"_target_": f"own_guesses.{name}", "horizons": [1]})
    return cast(Config, cfg)


def first_guess(cfg: Config) -> int:
    reader = PredictionsReader(
        Store(cfg.store, makers=cfg.makers).make(predictions_recipe(cfg)).folder
    )
    return int(next(reader.batches()).ids_THLP[0, 0, 0, 0])


def test_classes_of_one_file_are_told_apart(tmp_path: Path, module: Path) -> None:
    assert first_guess(configured(tmp_path, "Always")) == 0
    assert first_guess(configured(tmp_path, "Last")) == 15
    assert name_of(configured(tmp_path, "Last")) == "own_guesses.Last"


def test_a_changed_file_is_asked_again(tmp_path: Path, module: Path) -> None:
    assert first_guess(configured(tmp_path, "Always")) == 0
    module.write_text(SOURCE.replace("self.expert] = 1", "7] = 1  # another one"))
    importlib.reload(sys.modules["own_guesses"])
    assert first_guess(configured(tmp_path, "Always")) == 7


def test_scores_of_another_shape_are_refused(tmp_path: Path, module: Path) -> None:
    with pytest.raises(
        FormatError, match=r"own_guesses\.Wide\.scores: expected .* = \[\d+, 4, 16\], got"
    ):
        first_guess(configured(tmp_path, "Wide"))


def test_what_a_predictor_lacks_is_named(tmp_path: Path, module: Path) -> None:
    module.write_text(
        SOURCE.replace('needs, sees, score = (), "nothing", "rank"', 'score = "rank"')
    )
    with pytest.raises(ConfigError, match=r"own_guesses\.Always: has no needs, sees; a predictor"):
        first_guess(configured(tmp_path, "Always"))


def test_what_one_learnt_is_not_put_into_another(tmp_path: Path) -> None:
    trace = whole(random_trace(n_requests=6))
    save(Markov((1,)).fit(trace, trace), tmp_path, {}, 0.0)
    restored = Markov((1,))
    restore(restored, str(tmp_path))
    assert all(
        isinstance(value, np.ndarray)
        for name, value in vars(restored).items()
        if name.endswith("_")
    )
    with pytest.raises(
        FormatError, match=r"learnt by prefetch\.predict\.markov\.Markov, and cannot be put into"
    ):
        restore(Popularity((1,)), tmp_path)


@pytest.mark.parametrize("name", ["fit", "__class__", "horizons", "scores"])
def test_a_file_of_arrays_cannot_replace_what_a_predictor_is(tmp_path: Path, name: str) -> None:
    from safetensors.numpy import save_file

    trace = whole(random_trace(n_requests=6))
    save(Markov((1,)).fit(trace, trace), tmp_path, {}, 0.0)
    save_file({name: np.zeros(1)}, str(tmp_path / "state.safetensors"))
    with pytest.raises(FormatError, match="is no array that a predictor learns"):
        restore(Markov((1,)), tmp_path)
