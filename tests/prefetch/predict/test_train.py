"""The stage as a whole: tables, headline, folds found again, other traces, imported guesses, and clear errors."""

from __future__ import annotations

import json
import math
import os
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
from prefetch.artifacts import Outside, Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError, MissingData
from prefetch.predict.part import parts_of
from prefetch.predict.predictor import restore
from prefetch.predict.recipes import fold_of, made, predictions_recipe, predictor_recipe
from prefetch.predict.train import run
from prefetch.runs.outputs import Outputs
from prefetch.stock import drop_unfinished
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker

PROMISED = {
    "recall_at_k", "recall_at_2k", "recall_at_k_all_rows", "exact_match", "popularity_recall_at_k",
    "markov_recall_at_k", "gain_over_markov", "fit_seconds", "predict_us_per_event",
    "recall_at_k_h4", "recall_at_2k_h4", "miss_recall_h4", "useful_load_share_h4",
    "recall_at_k_h4_low", "recall_at_k_h4_high", "near_copies", "recall_at_k_with_near_copies", "requests",
}  # fmt: skip
CHAIN = (
    "source=synthetic", "source.n_requests=40", "source.prompt_tokens=8", "source.new_tokens=24",
    "source.n_layers=6", "source.n_experts=16", "train.figures=false",
)  # fmt: skip


RANKS = np.broadcast_to(np.arange(4), (1280, 6, 4))


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
        ({"ids": np.zeros((1280, 6, 4), np.int64)}, "layer slot 0: expert 0 is guessed twice"),
        ({"ids": RANKS, "request": np.zeros(1280, np.int64)}, "`request` alone names no row"),
        ({"ids": RANKS, "scores": np.full(RANKS.shape, np.inf)}, "row 0, .* guess 0: the score is inf"),
        (
            {"ids": RANKS, "request": np.full(1280, 3), "position": np.full(1280, 5)},
            "two rows for request 3, position 5",
        ),
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


def guessed(store: Store, name: str = "markov") -> Path:
    """The folder of a predictor's guesses."""
    (folder,) = (
        path.parent
        for path in store.root.glob("predictions/*/predictions.json")
        if json.loads(path.read_text())["card"]["predictor"] == name
    )
    return folder


def said(folder: Path, copy: Path, **card: Any) -> Path:
    """The same guesses, whose maker says something else of them."""
    shutil.copytree(folder, copy)
    about = json.loads((copy / "predictions.json").read_text())
    about["card"] |= card
    (copy / "predictions.json").write_text(json.dumps(about))
    return copy


FEW = ("train.figures=false", "train.folds=1", "train.horizons=[1]", "train.baselines=none")


def test_guesses_about_another_trace_are_refused(tmp_path: Path) -> None:
    """Two traces of one shape: nothing but the key tells them apart."""
    one = saved(random_trace(0, n_requests=10), tmp_path / "one")
    two = saved(random_trace(7, n_requests=10), tmp_path / "two")
    _, _, store = trained(tmp_path, f"trace={one}", *FEW)
    path = guessed(store)
    words = (f"trace={two}", *FEW, "predictor=imported", f"predictor.path={path}")
    theirs, ours = PredictionsReader(path).card.trace, Outside("trace", two).key
    with pytest.raises(FormatError, match=f"trace is {theirs}, expected {ours}"):
        trained(tmp_path, *words)


def test_a_trace_may_be_named_by_any_of_its_keys(tmp_path: Path) -> None:
    """By that of the store that made it, or by that of its folder."""
    own, _, store = trained(tmp_path, *CHAIN, *FEW[1:])
    (made_here,) = (path.parent for path in store.root.glob("trace/*/trace.json"))
    path = guessed(store)
    assert PredictionsReader(path).card.trace == made_here.name
    words = ("predictor=imported", *FEW)
    by_folder, _, _ = trained(tmp_path, *words, f"trace={made_here}", f"predictor.path={path}")
    renamed = said(path, tmp_path / "renamed", trace=Outside("trace", made_here).key)
    by_source, _, _ = trained(tmp_path, *CHAIN, *words[:1], *FEW[1:], f"predictor.path={renamed}")
    assert own["recall_at_k"] == by_folder["recall_at_k"] == by_source["recall_at_k"]


def test_guesses_fitted_on_tested_requests_are_refused(tmp_path: Path) -> None:
    one = saved(random_trace(0, n_requests=10), tmp_path / "one")
    _, _, store = trained(tmp_path, f"trace={one}", *FEW)
    path = guessed(store)
    asked = PredictionsReader(path).card.requests
    words = (f"trace={one}", *FEW, "predictor=imported")
    copy = said(path, tmp_path / "copy", fitted_requests=asked[:1])
    with pytest.raises(FormatError, match=f"fitted on 1 of the {len(asked)} requests"):
        trained(tmp_path, *words, f"predictor.path={copy}")
    copy = said(path, tmp_path / "third", fitted_requests=asked[:1], fitted_trace="elsewhere")
    trained(tmp_path, *words, f"predictor.path={copy}")


def test_what_others_say_of_their_guesses_is_kept(tmp_path: Path) -> None:
    """In the new card and the table: what they knew, were fitted on, weigh and cost."""
    one = saved(random_trace(0, n_requests=10), tmp_path / "one")
    _, _, store = trained(tmp_path, f"trace={one}", *FEW)
    told = {"causality": "prefill", "parameter_bytes": 123, "event_us": 50.0, "event_us_p99": 80.0}
    fitted = PredictionsReader(guessed(store)).card.fitted_requests[:3]
    path = said(guessed(store), tmp_path / "copy", **told, fitted_requests=fitted)
    words = (f"trace={one}", *FEW, "predictor=imported", f"predictor.path={path}")
    metrics, folder, _ = trained(tmp_path, *words)
    card = PredictionsReader(guessed(store, "imported")).card
    assert {name: getattr(card, name) for name in told} == told
    assert card.fitted_requests == fitted and card.event_us_from == "declared"
    assert (metrics["parameter_bytes"], metrics["predict_us_per_event"]) == (123, 50)
    row = pd.read_parquet(folder / "predictors.parquet").iloc[0]
    assert (row.mark, row.predict_us_from, row.predict_us_p99) == ("prefill", "declared", 80)


def test_a_table_of_guesses_is_not_timed(tmp_path: Path) -> None:
    np.savez(tmp_path / "guesses.npz", ids=np.zeros((1280, 6, 1), np.int64))
    words = (*CHAIN, *FEW[1:], "predictor=imported", f"predictor.path={tmp_path / 'guesses.npz'}")
    metrics, folder, _ = trained(tmp_path, *words)
    assert "predict_us_per_event" not in metrics
    assert set(pd.read_parquet(folder / "predictors.parquet").predict_us_from) == {""}


def test_how_a_time_was_found_stands_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*CHAIN, "predictor=route_memory", "train.folds=1", "train.horizons=[1]")
    _, folder, _ = trained(tmp_path, *words)
    table = pd.read_parquet(folder / "predictors.parquet").drop_duplicates("predictor")
    table = table.set_index("predictor")
    assert table.predict_us_from.to_dict() == {
        "route_memory": "online", "popularity": "block", "previous_token": "block", "markov": "block",
    }  # fmt: skip
    assert table.predict_us_p99["route_memory"] >= table.predict_us_per_event["route_memory"]
    assert math.isnan(table.predict_us_p99["markov"])
    printed = capsys.readouterr().out
    assert f"{table.predict_us_per_event['markov']:.1f} block" in printed
    assert f"{table.predict_us_per_event['route_memory']:.1f} online" not in printed


def test_a_baseline_with_other_settings_is_not_the_baseline(tmp_path: Path) -> None:
    plain, _, _ = trained(tmp_path, *CHAIN, "train.folds=1")
    words = (*CHAIN, "train.folds=1", "predictor.chained=true")
    metrics, folder, _ = trained(tmp_path, *words)
    table = pd.read_parquet(folder / "predictors.parquet")
    names = ["markov (chained=true)", "popularity", "previous_token", "markov"]
    assert table.predictor.unique().tolist() == names
    assert metrics["markov_recall_at_k_h4"] == plain["markov_recall_at_k_h4"]
    assert metrics["markov_recall_at_k_h4"] == plain["recall_at_k_h4"] != metrics["recall_at_k_h4"]
    assert metrics["gain_over_markov_h4"] < 0
    alone, _, _ = trained(tmp_path, *words, "train.baselines=none")
    assert "markov_recall_at_k" not in alone


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


def test_what_was_fitted_elsewhere_is_said(tmp_path: Path) -> None:
    """The requests, and of which trace they are: none of those that are asked."""
    one = saved(random_trace(0, n_requests=20), tmp_path / "one")
    two = saved(random_trace(1, n_requests=12), tmp_path / "two")
    _, _, store = trained(tmp_path, f"trace={one}", *FEW, f"train.test_trace={two}")
    reader = PredictionsReader(guessed(store))
    assert reader.card.fitted_requests == tuple(range(20))
    assert reader.card.fitted_trace == Outside("trace", one).key != reader.card.trace
    asked = list(reader.card.requests)
    reader.check_fits(trace=Outside("trace", two).key, n_experts=16, n_layers=4, requests=asked)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_the_trace_that_is_fitted_on_is_no_test_trace(tmp_path: Path, is_sealed: bool) -> None:
    """Nor is its copy, nor the folder of the store that it was collected into."""
    if is_sealed:
        words: tuple[str, ...] = (*CHAIN, *FEW[1:])
        store = trained(tmp_path, *words)[2]
        (other,) = (path.parent for path in store.root.glob("trace/*/trace.json"))
    else:
        one = saved(random_trace(0, n_requests=20), tmp_path / "one")
        words, other = (f"trace={one}", *FEW), tmp_path / "copy"
        shutil.copytree(one, other)
    with pytest.raises(ConfigError, match="is the trace that is fitted on"):
        trained(tmp_path, *words, f"train.test_trace={other}")


def test_an_npz_is_about_the_trace_that_is_asked(tmp_path: Path) -> None:
    """Rows without names are those of `train.test_trace`, not of the trace that others are fitted on."""
    one = saved(random_trace(0, n_requests=20), tmp_path / "one")
    asked = random_trace(1, n_requests=12)
    two = saved(asked, tmp_path / "two")
    np.savez(tmp_path / "guesses.npz", ids=asked.ids_TLK.astype(np.int64))
    words = (f"trace={one}", *FEW, f"train.test_trace={two}", "predictor=imported",
             f"predictor.path={tmp_path / 'guesses.npz'}")  # fmt: skip
    metrics, _, _ = trained(tmp_path, *words)
    assert metrics["recall_at_k"] == 1


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
    from prefetch.predict.networks import learner

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
    from prefetch.predict.networks import learner

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


def test_time_before_an_interruption_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the checkpoint that the fit went on from, even if it was killed and could not write its end."""
    from prefetch.predict.networks import learner

    words = (*CHAIN, "predictor=mlp", "predictor.hidden=8", "predictor.epochs=2", *FEW[1:])
    original = learner.Learner.on_train_epoch_start

    def interrupted(self: learner.Learner) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Learner, "on_train_epoch_start", interrupted)
        trained(tmp_path, *words)
    (checkpoint,) = (tmp_path / "store" / "predictor").glob(".*.unfinished/*.ckpt")
    written = checkpoint.stat().st_mtime + 1000
    os.utime(checkpoint, (written, written))
    metrics, _, _ = trained(tmp_path, *words)
    assert 1000 < metrics["fit_seconds"] < 1600


def _near_copies(trace: RoutingTrace) -> RoutingTrace:
    """Every request again, with one other choice in its first row: no digest of its start is the same."""
    again = trace.ids_TLK.astype(int)
    for start in trace.starts_R:
        again[start, 0, 0] = np.setdiff1d(np.arange(16), again[start, 0])[0]
    n = int(trace.request_T.max()) + 1
    request_T = np.concatenate([trace.request_T, trace.request_T + n])
    return trace_of(trace.card, np.concatenate([trace.ids_TLK, again]), request_T=request_T)


def test_near_copies_are_no_new_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fifteen requests of their own, and fifteen twice: a memory of routing must gain nothing from those."""
    own, twice = random_trace(0, n_requests=15, skew=0.3), random_trace(1, n_requests=10, skew=0.3)
    twice = _near_copies(twice)
    ids = np.concatenate([own.ids_TLK, twice.ids_TLK])
    request_T = np.concatenate([own.request_T, twice.request_T + 15])
    one = saved(trace_of(own.card, ids, request_T=request_T), tmp_path / "one")
    words = (f"trace={one}", "predictor=route_memory", "train.horizons=[1]", "train.figures=false",
             "train.baselines=none")  # fmt: skip
    metrics, folder, _ = trained(tmp_path, *words)
    assert metrics["near_copies"] + metrics["requests"] == 35
    assert metrics["near_copies"] >= 12 and metrics["requests"] >= 15  # some pairs are in one part
    assert metrics["recall_at_k"] < 0.3 < 0.4 < metrics["recall_at_k_with_near_copies"]
    assert metrics["recall_at_k_all_rows"] == metrics["recall_at_k_with_near_copies"]
    assert "are near copies of requests in the part to learn from" in caplog.text
    table = pd.read_parquet(folder / "predictors.parquet")
    assert table.requests.tolist() == [metrics["requests"], 35]


def test_copies_in_the_other_trace_are_no_new_text(tmp_path: Path) -> None:
    one, other = random_trace(0, n_requests=20), random_trace(1, n_requests=3)
    other.ids_TLK[40:80] = one.ids_TLK[80:120]  # to the last choice
    words = (f"trace={saved(one, tmp_path / 'one')}", "train.horizons=[1]", "train.figures=false",
             f"train.test_trace={saved(other, tmp_path / 'other')}")  # fmt: skip
    metrics, folder, _ = trained(tmp_path, *words)
    assert (metrics["near_copies"], metrics["requests"]) == (1, 2)
    assert set(pd.read_parquet(folder / "predictors.parquet").split) == {"whole"}


@pytest.mark.parametrize(
    ("n_requests", "elsewhere", "said"),
    [
        (20, False, "20 requests tested, 5 folds; k = 3"),
        (3, False, "the last part of too few requests tested (1 request), split in time; k = 3"),
        (20, True, "3 requests tested, all of another trace; k = 3"),
    ],
)
def test_what_is_said_of_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], n_requests: int, elsewhere: bool, said: str
) -> None:
    words = [f"trace={saved(random_trace(n_requests=n_requests), tmp_path / 'one')}"]
    if elsewhere:
        words.append(f"train.test_trace={saved(random_trace(5, n_requests=3), tmp_path / 'other')}")
    metrics, folder, _ = trained(tmp_path, *words, "train.horizons=[1]", "train.figures=false")
    assert said in capsys.readouterr().out
    kind = "whole" if elsewhere else "time" if n_requests == 3 else "requests"
    table = pd.read_parquet(folder / "predictors.parquet")
    assert set(table.split) == {kind} and metrics["is_split_in_time"] == (kind == "time")
    assert set(table.requests) == {metrics["requests"]}


def test_a_list_too_short_for_k_is_refused(tmp_path: Path) -> None:
    one = saved(random_trace(0), tmp_path / "one")
    with pytest.raises(ConfigError, match=r"train\.width=2: fewer guesses than the k = 3 experts"):
        trained(tmp_path, f"trace={one}", "train.horizons=[1]", "train.width=2")
    metrics, _, _ = trained(
        tmp_path, f"trace={one}", "train.horizons=[1]", "train.width=3", "train.figures=false"
    )
    assert "recall_at_k" in metrics and "recall_at_2k" not in metrics


def test_k_guesses_of_others_tell_no_recall_at_2k(tmp_path: Path) -> None:
    trace = random_trace(0, n_requests=20)
    one = saved(trace, tmp_path / "one")
    np.savez(tmp_path / "guesses.npz", ids=np.tile(np.arange(3), (800, 4, 1)))
    words = (f"trace={one}", "predictor=imported", f"predictor.path={tmp_path / 'guesses.npz'}")
    metrics, folder, _ = trained(tmp_path, *words, "train.horizons=[1]", "train.figures=false")
    assert "recall_at_k" in metrics and "recall_at_2k" not in metrics
    table = pd.read_parquet(folder / "by_width.parquet")
    assert table[table.predictor == "imported"].width.max() == 3
