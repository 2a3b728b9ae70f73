"""Stage `train`: fits the chosen predictor and the baselines, fold by fold, and scores them on the same requests."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.artifacts import Store
from prefetch.config import Config, choices
from prefetch.errors import ConfigError, MissingData
from prefetch.predict import export
from prefetch.predict.predictor import ABOUT, FIT, PROBABILITY, cheats, declared, restore
from prefetch.predict.recipes import (
    asked_part,
    is_ours,
    label_of,
    made,
    n_folds,
    name_of,
    predictions_recipe,
    predictor_recipe,
    tested_recipe,
    trace_recipe,
    with_predictor,
)
from prefetch.predict.scored import cards, results, shift
from prefetch.predict.scored.estimates import ENOUGH_UNITS
from prefetch.predict.scored.held_out import HeldOut, held_out_elsewhere, held_out_folds
from prefetch.predict.scored.measures import Counts, count
from prefetch.predict.scored.results import Scored
from prefetch.runs.outputs import Outputs
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsCard, PredictionsReader

log = logging.getLogger(__name__)
FAST = ("popularity", "previous_token", "markov")  # what every table shows
LEARNED = (
    "linear",
    "hidden_mlp",
    "pre_attention",
    "mlp",
    "memory_mlp",
    "recurrent",
    "transformer",
    "encoder",
)
NO_BASELINES = ("none", "imported", "ensemble", *LEARNED)  # chosen by name, never run by the way


def run(cfg: Config, store: Store, outputs: Outputs) -> dict[str, float]:
    """The chosen predictor first, then the baselines; tables, figures, and the headline numbers out."""
    _check_predictor(cfg)
    elsewhere = tested_recipe(cfg) if cfg.train.test_trace is not None else None
    reader = TraceReader(store.make(trace_recipe(cfg)).folder)
    tested = reader
    if elsewhere is not None:
        tested = TraceReader(store.make(elsewhere).folder)
    chosen = _label(cfg)
    _check_width(cfg, reader.card)
    runs = {
        chosen: cfg,
        **{name: with_predictor(cfg, name) for name in baselines(cfg, reader, chosen)},
    }
    folds, scored, left_out = _held_out(cfg, reader, tested), list[Scored](), dict[str, str]()
    said: dict[str, list[PredictionsCard]] = {}
    for name, one in runs.items():
        try:
            result, said[name] = _score(name, one, store, folds)
            scored.append(result)
        except MissingData as error:
            if name == chosen:
                raise MissingData(f"predictor={name_of(cfg)}: {error}") from error
            left_out[name] = str(error)
    if cfg.train.export:
        _export(cfg, store, outputs.folder / "exported")
    return _write(cfg, reader, tested, scored, said, left_out, outputs)


def _check_predictor(cfg: Config) -> None:
    """A wrong setting is said before anything is made."""
    predictor = made(cfg)
    if cfg.train.export:
        export.check_exportable(predictor, name_of(cfg))


def _export(cfg: Config, store: Store, folder: Path) -> None:
    """The predictor of the first fold, which the simulator asks as well."""
    recipe, predictor = predictor_recipe(cfg), made(cfg)
    about = restore(predictor, store.make(recipe).folder)
    path = export.write(predictor, about, recipe.upstream["trace"].key, folder)
    log.info("exported: %s (%.1f MB)", path, path.stat().st_size / 1e6)


def _label(cfg: Config) -> str:
    """A baseline with other settings is called by them, because the baseline itself stands beside it."""
    name = name_of(cfg)
    is_baseline = name in FAST or (cfg.train.baselines == "all" and name not in NO_BASELINES)
    return label_of(cfg) if is_baseline else name


def _check_width(cfg: Config, card: ModelCard) -> None:
    if cfg.train.width is not None and cfg.train.width > card.n_experts:
        raise ConfigError(
            f"train.width={cfg.train.width}: the model has {card.n_experts} experts per layer"
        )
    if cfg.train.width is not None and cfg.train.width < card.top_k:
        raise ConfigError(
            f"train.width={cfg.train.width}: fewer guesses than the k = {card.top_k} experts of a token tell no "
            f"recall; pass train.width={card.top_k} or more"
        )


def _held_out(cfg: Config, reader: TraceReader, tested: TraceReader) -> list[HeldOut]:
    """What is scored, fold by fold, the same for all predictors."""
    if cfg.train.test_trace is None:
        return held_out_folds(reader, cfg.seed, n_folds(reader, cfg))
    part = asked_part(tested, cfg.seed, 0, is_elsewhere=True)
    return [held_out_elsewhere(reader, tested, part)]


def baselines(cfg: Config, reader: TraceReader, chosen: str) -> Iterator[str]:
    """The names of what stands beside the chosen predictor, which may be one of them with other settings."""
    if cfg.train.baselines == "none":
        return
    for name in FAST if cfg.train.baselines == "fast" else choices("predictor"):
        if name == chosen or name in NO_BASELINES:
            continue
        one = with_predictor(cfg, name)
        if is_ours(one) and set(made(one).needs) <= set(reader.columns):
            yield name


def _score(
    name: str, cfg: Config, store: Store, folds: list[HeldOut]
) -> tuple[Scored, list[PredictionsCard]]:
    predictor, said = made(cfg), list[PredictionsCard]()
    counts, seconds = list[Counts](), list[float]()
    curve: list[dict[str, float]] = []
    for fold, held_out in enumerate(folds):
        recipe = predictions_recipe(cfg, fold)
        predictions = store.make(recipe)
        fitted = store.make(recipe.upstream["predictor"])
        guesses = PredictionsReader(predictions.folder)
        counts.append(count(guesses, held_out, is_foreign=declared(predictor) is not None))
        seconds.append(json.loads((fitted.folder / FIT).read_text())["seconds"])
        about = json.loads((fitted.folder / ABOUT).read_text())
        curve += [{"fold": fold, **row} for row in about.get("curve", ())]
        said.append(guesses.card)
        if fitted.was_made:
            log.info("%s: fold %d of %d fitted in %.1f s", name, fold + 1, len(folds), seconds[-1])
    scored = Scored(
        name=name,
        sees=predictor.sees,
        is_probability=predictor.score == PROBABILITY and not cheats(predictor),
        folds=tuple(counts),
        parameter_bytes=said[-1].parameter_bytes,
        fit_seconds=sum(seconds) / len(seconds),
        event_us=cards.mean_event_us(said),
        curve=tuple(curve),
    )
    return scored, said


def _write(
    cfg: Config,
    reader: TraceReader,
    tested: TraceReader,
    scored: list[Scored],
    said: dict[str, list[PredictionsCard]],
    left_out: dict[str, str],
    outputs: Outputs,
) -> dict[str, float]:
    tables = {
        "predictors": results.summary(scored, cfg.seed),
        "by_layer": results.by_layer(scored, tested.card),
        "by_width": results.by_width(scored),
        "by_domain": (shifted := shift.by_domain(scored, cfg.train.domains)),
        "by_fold": results.by_fold(scored),
        "reliability": results.reliability(scored),
        "differences": results.differences(scored, cfg.seed),
        "curve": pd.DataFrame(scored[0].curve),
    }
    cards.add_to(tables["predictors"], said)
    for name, frame in tables.items():
        if len(frame):
            outputs.table(name, frame)
    if len(curve := tables["curve"]):
        recall = curve.rename(columns={"score": "recall"})
        outputs.curve("fit", recall, x="epoch", by=("horizon", "fold"))
    if left_out:
        rows = [{"predictor": name, "why": why} for name, why in left_out.items()]
        outputs.table("left_out", pd.DataFrame(rows))
    metrics = results.headline(tables["predictors"], scored[0].name)
    metrics |= shift.headline(shifted, scored[0].name)
    outputs.metrics(metrics)
    if cfg.train.figures:
        from prefetch.predict.scored.pictures import (
            draw_all,  # matplotlib: slow, and not everyone draws
        )

        for path in draw_all(
            tables, outputs.folder, _note(reader, tested), top_k=tested.card.top_k
        ):
            if path.suffix == ".png":
                outputs.figure(path)
    _print(tables["predictors"], tested, left_out, len(scored[0].folds))
    return metrics


def _note(reader: TraceReader, tested: TraceReader) -> str:
    """What a figure says of where it comes from."""
    said = (
        f"{tested.card.name}: {tested.provenance.kind} routing, source {tested.provenance.source}"
    )
    if tested.folder != reader.folder:
        said += f"; fitted on {reader.card.name}, source {reader.provenance.source}"
    return f"{said}, teacher-forced decode"


COLUMNS = {
    "recall_at_k": "recall@k [95 %]",
    "recall_at_2k": "recall@2k",
    "exact_match": "exact set",
    "first_layers_recall_at_k": "first layers",
    "miss_recall": "on LRU misses",
    "useful_load_share": "useful loads",
}


def _print(table: pd.DataFrame, tested: TraceReader, left_out: dict[str, str], folds: int) -> None:
    rows = table[table["rows"] == "new_text"]
    title = f"{results.said_of_rows(table, folds)}; k = {tested.card.top_k}"
    shown = Table(title=Text(title), title_justify="left")
    for name in ("predictor", "sees", "ahead"):
        shown.add_column(name)
    for name in (*COLUMNS.values(), "µs/event", "fit s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        cells = [_number(row[name]) for name in COLUMNS]
        cells[0] += "" if math.isnan(row["low"]) else f" [{row['low']:.3f} {row['high']:.3f}]"
        name = f"{row['predictor']} ({row['mark']})" if row["mark"] else str(row["predictor"])
        times = [_event_time(row), _number(row["fit_seconds"], 1)]
        shown.add_row(Text(name), Text(str(row["sees"])), str(row["horizon"]), *cells, *times)
    console = Console(width=max(160, Console().width))
    console.print(shown)
    if rows.low.isna().all():
        console.print(Text(f"no intervals: they need {ENOUGH_UNITS} tested requests"))
    if warning := results.warning_of_copies(table):
        log.warning(warning)
    for name, why in left_out.items():
        console.print(Text(f"{name}: left out, {why}"))


def _event_time(row: Mapping[Any, Any]) -> str:
    """Only single events are a plain number: a share of a block is no time that an engine sees."""
    how = row["predict_us_from"]
    return _number(row["predict_us_per_event"], 1) + ("" if how in ("", "online") else f" {how}")


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
