"""The stage as a whole: tables, headline, folds found again, other traces, imported guesses, and clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from recorded_traces import SMALL, check_same_bytes, full_trace, on_disk
from routing_traces import random_trace

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError, MissingData
from prefetch.predict.part import parts_of
from prefetch.predict.predictor import restore
from prefetch.predict.recipes import fold_of, made, predictions_recipe, predictor_recipe
from prefetch.predict.train import run
from prefetch.stock import drop_unfinished
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker, Outputs

PROMISED = {
    "recall_at_k", "recall_at_2k", "recall_at_k_all_rows", "exact_match", "popularity_recall_at_k",
    "markov_recall_at_k", "gain_over_markov", "fit_seconds", "predict_us_per_event",
    "recall_at_k_h4", "recall_at_2k_h4", "miss_recall_h4", "useful_load_share_h4",
}  # fmt: skip
CHAIN = (
    "source=synthetic", "source.n_requests=40", "source.prompt_tokens=8", "source.new_tokens=24",
    "source.n_layers=6", "source.n_experts=16", "train.figures=false",
)  # fmt: skip


def configured(tmp_path: Path, *words: str) -> Config:
    if not any(word.startswith("predictor=") for word in words):
        words = ("predictor=markov", *words)
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["stage=train", f"store={tmp_path / 'store'}", *words])
    config.check_values(cast(Config, cfg))
    return cast(Config, cfg)


def trained(tmp_path: Path, *words: str) -> tuple[dict[str, float], Path, Store]:
    cfg = configured(tmp_path, *words)
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    store = Store(cfg.store, makers=cfg.makers)
    return run(cfg, store, Outputs(folder, NoTracker())), folder, store


def saved(trace: RoutingTrace, folder: Path) -> Path:
    folder.mkdir()
    writer = TraceWriter(folder, Provenance("synthetic", "test"), max_dropped=0.5)
    writer.begin(trace.card)
    writer.append(trace)
    writer.close()
    return folder


def test_every_number_that_is_promised(tmp_path: Path) -> None:
    metrics, folder, _ = trained(tmp_path, *CHAIN, "predictor=markov2")
    assert metrics.keys() >= PROMISED
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    table = pd.read_parquet(folder / "predictors.parquet")
    assert table.predictor.unique().tolist() == [
        "markov2",
        "popularity",
        "previous_token",
        "markov",
    ]
    assert set(table.requests) == {40}
    tested = pd.read_parquet(folder / "by_fold.parquet")
    assert tested[tested.predictor == "markov"].groupby("horizon").size().tolist() == [5, 5]
    assert not (folder / "left_out.parquet").exists()


def test_the_second_time_everything_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, _, _ = trained(tmp_path, *CHAIN, "train.folds=2")
    assert "making predictor" in caplog.text
    caplog.clear()
    second, _, _ = trained(tmp_path, *CHAIN, "train.folds=2")
    assert "making" not in caplog.text and first == second


def test_same_seed_same_guesses(tmp_path: Path) -> None:
    guesses = []
    for name in ("one", "two"):
        cfg = configured(tmp_path / name, *CHAIN, "predictor=random")
        reader = PredictionsReader(Store(cfg.store).make(predictions_recipe(cfg)).folder)
        guesses.append(np.concatenate([block.ids_THLP for block in reader.batches()]))
    np.testing.assert_array_equal(*guesses)


def test_predictions_say_what_was_learnt_from(tmp_path: Path) -> None:
    cfg = configured(tmp_path, *CHAIN)
    card = PredictionsReader(Store(cfg.store).make(predictions_recipe(cfg)).folder).card
    assert not set(card.requests) & set(card.fitted_requests)
    assert sorted({*card.requests, *card.fitted_requests}) == list(range(40))
    assert (card.width, card.horizons, card.causality) == (4, (1, 4), "decode")


def test_cheats_are_marked(tmp_path: Path) -> None:
    words = (*CHAIN, "predictor=noisy_oracle", "predictor.recall=0.6", "train.folds=1")
    metrics, folder, store = trained(tmp_path, *words)
    table = pd.read_parquet(folder / "predictors.parquet")
    assert set(table[table.predictor == "noisy_oracle"].mark) == {"cheats"}
    assert set(table[table.predictor == "markov"].mark) == {""}
    assert metrics["recall_at_k"] == pytest.approx(0.6, abs=0.03)
    kinds = {
        json.loads(path.read_text())["card"]["predictor"]: json.loads(path.read_text())["card"][
            "causality"
        ]
        for path in store.root.glob("predictions/*/predictions.json")
    }
    assert kinds["noisy_oracle"] == "cheats" and kinds["markov"] == "decode"


def test_guesses_of_others_get_the_same_scores(tmp_path: Path) -> None:
    """Our own predictions folder, and the same as an npz, score as the predictor that made them."""
    own, _, store = trained(tmp_path, *CHAIN, "train.folds=1")
    folders = {
        json.loads(path.read_text())["card"]["predictor"]: path.parent
        for path in store.root.glob("predictions/*/predictions.json")
    }
    words = (*CHAIN, "train.folds=1", "predictor=imported")
    as_folder, _, _ = trained(tmp_path, *words, f"predictor.path={folders['markov']}")
    blocks = list(PredictionsReader(folders["markov"]).batches())
    arrays = {
        "ids": np.concatenate([block.ids_THLP for block in blocks]).astype(np.int64),
        "request": np.concatenate([block.request_T for block in blocks]),
        "position": np.concatenate([block.position_T for block in blocks]),
        "horizons": np.array([1, 4]),
    }
    np.savez(tmp_path / "guesses.npz", **arrays)
    as_npz, folder, _ = trained(tmp_path, *words, f"predictor.path={tmp_path / 'guesses.npz'}")
    for name in ("recall_at_k", "recall_at_2k_h4", "exact_match", "miss_recall_h4"):
        assert own[name] == as_folder[name] == as_npz[name]
    table = pd.read_parquet(folder / "predictors.parquet")
    assert set(table[table.predictor == "imported"].sees) == {"as declared: decode"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((3, 6, 4), np.int64)}, "3 rows of ids, expected 1280"),
        ({"ids": np.full((1280, 6, 4), 77)}, "expert id 77 is out of range for 16 experts"),
        ({"ids": np.zeros((1280, 5, 4), np.int64)}, "guesses for 5 layers, the trace has 6"),
        ({"other": np.zeros(3)}, "expected an array `ids`"),
        ({"ids": np.zeros((1280, 6, 4), np.int64), "horizons": np.array([2])}, r"not for \[1\]"),
    ],
)  # fmt: skip
def test_guesses_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "guesses.npz", **change)
    words = (*CHAIN, "predictor=imported", f"predictor.path={tmp_path / 'guesses.npz'}")
    with pytest.raises((FormatError, ConfigError), match=message):
        trained(tmp_path, *words, "train.horizons=[1]")
    assert not list((tmp_path / "store").glob("pred*/*.building"))


def test_a_chain_is_guessed_as_well_as_it_can_be(tmp_path: Path) -> None:
    """First-order synthetic routing: counts reach the best possible recall, and nobody passes it."""
    words = (*CHAIN, "source.n_requests=150", "source.new_tokens=64", "train.horizons=[1]")
    metrics, folder, store = trained(tmp_path, *words, "predictor=markov2")
    (trace,) = store.root.glob("trace/*/trace.json")
    facts = TraceReader(trace.parent).provenance.facts
    best = facts["best_recall_at_k"]
    assert metrics["markov_recall_at_k"] == pytest.approx(best, abs=0.005)
    table = pd.read_parquet(folder / "predictors.parquet")
    assert (table[table["rows"] == "new_text"].low <= best + 1e-9).all()


def test_another_trace_is_scored_without_fitting_again(tmp_path: Path) -> None:
    one = saved(random_trace(0, n_requests=20), tmp_path / "one")
    two = saved(random_trace(1, n_requests=12), tmp_path / "two")
    words = (f"trace={one}", "predictor=popularity", "train.horizons=[1]", "train.figures=false")
    metrics, folder, store = trained(tmp_path, *words, f"train.test_trace={two}")
    assert len(list(store.root.glob("predictor/*/predictor.json"))) == 3
    (about,) = (
        json.loads(path.read_text())
        for path in store.root.glob("predictor/*/predictor.json")
        if json.loads(path.read_text())["predictor"] == "popularity"
    )
    assert about["fitted_requests"] == list(range(20))
    assert set(pd.read_parquet(folder / "predictors.parquet").requests) == {12}
    by_layer = random_trace(0, n_requests=20).ids_TLK.transpose(1, 0, 2)
    used_LE = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in by_layer])
    best_LK = np.argsort(-used_LE, axis=1, kind="stable")[:, :3]
    ids_TLK = random_trace(1, n_requests=12).ids_TLK
    hits = (ids_TLK[..., None] == best_LK[None, :, None, :]).any(axis=3)[:, 1:].mean()
    assert metrics["recall_at_k"] == pytest.approx(hits, abs=1e-12)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    one = saved(random_trace(0), tmp_path / "one")
    two = saved(random_trace(1, n_layers=5), tmp_path / "two")
    with pytest.raises(FormatError, match=r"n_layers=4, asked about random with n_layers=5"):
        trained(tmp_path, f"trace={one}", f"train.test_trace={two}", "train.horizons=[1]")


def test_what_a_trace_lacks_is_refused_by_name(tmp_path: Path) -> None:
    one = saved(random_trace(0), tmp_path / "one")
    words = (f"trace={one}", "train.horizons=[1]", "train.figures=false")
    with pytest.raises(MissingData, match="predictor=token_table: needs token ids"):
        trained(tmp_path, *words, "predictor=token_table")
    _, folder, _ = trained(tmp_path, *words, "train.baselines=all", "train.folds=1")
    left_out = pd.read_parquet(folder / "left_out.parquet")
    assert "token_table" in left_out.predictor.tolist()


@pytest.mark.parametrize("name", [n for n in config.choices("predictor") if n != "imported"])
def test_every_predictor_runs_as_a_stage(name: str, tmp_path: Path) -> None:
    trace = on_disk(full_trace(n_requests=12), tmp_path / "trace").folder
    settings = [f"predictor.{key}={_word(value)}" for key, value in SMALL.get(name, {}).items()]
    words = (f"trace={trace}", f"predictor={name}", "train.horizons=[1,2]", "train.folds=1")
    metrics, folder, _ = trained(tmp_path, *words, "train.figures=false", *settings)
    table = pd.read_parquet(folder / "predictors.parquet")
    assert table.predictor[0] == name and {"recall_at_k", "markov_recall_at_k"} <= metrics.keys()
    marked = set(table[table.predictor == name].mark)
    assert marked == ({"cheats"} if "oracle" in name or name == "encoder" else {""})


def _word(value: Any) -> str:
    """As one types it: keys of mappings have no quotes."""
    return str(value).replace("'", "")


def test_the_stage_fits_what_fit_fits(tmp_path: Path) -> None:
    """The folder for interrupted fits changes nothing: no horizon goes on from another one's network."""
    words = (*CHAIN, "predictor=mlp", "predictor.hidden=8", "predictor.epochs=2",
             "train.horizons=[1,2,4]")  # fmt: skip
    cfg = configured(tmp_path, *words)
    store, recipe = Store(cfg.store), predictor_recipe(cfg)
    reader = TraceReader(store.make(recipe.upstream["trace"]).folder)
    train, validation, _ = parts_of(reader, fold_of(reader, cfg.seed, 0))
    stored = made(cfg)
    restore(stored, store.make(recipe).folder)
    check_same_bytes(stored, made(cfg).fit(train, validation))


def test_members_are_found_where_they_were_fitted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ensemble fits nothing twice, and is another one when a member is."""
    caplog.set_level("INFO")
    words = (*CHAIN, "train.horizons=[1,4]", "train.folds=1", "train.baselines=none")
    small = ("epochs=2", "hidden=8")
    trained(tmp_path, *words, "predictor=mlp", *(f"predictor.{word}" for word in small))
    caplog.clear()
    ensemble = (
        *words,
        "predictor=ensemble",
        "predictor.members=[{mlp:{epochs:2,hidden:8}},markov]",
    )
    metrics, _, store = trained(tmp_path, *ensemble)
    assert caplog.text.count("making predictor ") == 2, "markov and the ensemble"
    assert {"recall_at_k", "calibration_error"} <= metrics.keys()
    cfg = configured(tmp_path, *ensemble)
    key = predictor_recipe(cfg).key
    assert (store.root / "predictor" / key).is_dir()
    monkeypatch.setattr("prefetch.predict.mlp.Mlp.version", 77)
    assert predictor_recipe(cfg).key != key


def test_an_interrupted_member_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefetch.predict import learner

    words = (*CHAIN, "train.folds=1", "train.horizons=[1]", "train.baselines=none",
             "predictor=ensemble", "predictor.members=[{mlp:{epochs:3,hidden:8}}]")  # fmt: skip
    epochs: list[int] = []
    original = learner.Learner.on_train_epoch_start

    def interrupted(self: learner.Learner) -> None:
        epochs.append(self.current_epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(learner.Learner, "on_train_epoch_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, *words)
    trained(tmp_path, *words)
    assert epochs == [0, 1, 1, 2]


def test_a_member_that_lacks_a_column_is_refused_by_name(tmp_path: Path) -> None:
    one = saved(random_trace(0), tmp_path / "one")
    words = (f"trace={one}", "predictor=ensemble", "predictor.members=[hidden_mlp]")
    with pytest.raises(MissingData, match="predictor=ensemble: needs gate_inputs, which this"):
        trained(tmp_path, *words, "train.horizons=[1]")


def test_one_request_is_split_in_time(tmp_path: Path) -> None:
    one = saved(random_trace(0, n_requests=1, tokens=200), tmp_path / "one")
    metrics, folder, store = trained(
        tmp_path, f"trace={one}", "train.horizons=[1]", "train.figures=false"
    )
    assert "recall_at_k" in metrics and "recall_at_k_low" not in metrics
    about = json.loads(next(store.root.glob("predictor/*/predictor.json")).read_text())
    assert about["split"] == "time"
    assert set(pd.read_parquet(folder / "by_fold.parquet").fold) == {0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.horizons=[6]", "nothing is 6 layers ahead"),
        ("train.horizons=[]", "expected different numbers"),
        ("train.folds=6", "from 1 to 5"),
        ("train.baselines=some", "expected all, fast or none"),
        ("train.width=0", "at least 1"),
    ],
)
def test_nonsense_is_one_clear_line(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, *CHAIN, word)


def test_an_interrupted_fit_goes_on_and_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third epoch: the next run starts there, and nothing is left behind."""
    from prefetch.predict import learner

    words = (*CHAIN, "predictor=mlp", "predictor.hidden=8", "predictor.epochs=4", "train.folds=1",
             "train.horizons=[1]", "train.baselines=none")  # fmt: skip
    plain, undisturbed, _ = trained(tmp_path / "plain", *words)
    epochs: list[int] = []
    original = learner.Learner.on_train_epoch_start

    def interrupted(self: learner.Learner) -> None:
        epochs.append(self.current_epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(learner.Learner, "on_train_epoch_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "other", *words)
    assert list((tmp_path / "other" / "store" / "predictor").glob(".*.unfinished/*"))
    shutil.copytree(tmp_path / "other", tmp_path / "third")
    resumed, again, _ = trained(tmp_path / "other", *words)
    assert epochs == [0, 1, 2, 2, 3]
    for name in ("recall_at_k", "recall_at_2k", "exact_match", "calibration_error"):
        assert resumed[name] == plain[name]
    curve, expected = (pd.read_parquet(folder / "curve.parquet") for folder in (again, undisturbed))
    assert curve.epoch.tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(curve, expected)
    assert not list((tmp_path / "other" / "store" / "predictor").glob(".*.unfinished"))
    store = Store(tmp_path / "third" / "store")
    assert len(drop_unfinished(store)) == 1 and not drop_unfinished(store)
