"""Stage `train`: fits the chosen predictor and the baselines, fold by fold, and scores them on the same requests."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.artifacts import Store
from prefetch.config import Config, choices
from prefetch.errors import MissingData
from prefetch.predict import results
from prefetch.predict.measures import Counts, count
from prefetch.predict.predictor import ABOUT, FIT, PROBABILITY, cheats
from prefetch.predict.recipes import (
    asked_part,
    made,
    n_folds,
    name_of,
    predictions_recipe,
    test_recipe,
    trace_recipe,
    with_predictor,
)
from prefetch.predict.results import Scored
from prefetch.scoring import SMALLEST_SPLIT
from prefetch.trace.parquet import TraceReader
from prefetch.trace.predictions import PredictionsReader
from prefetch.tracking import Outputs

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
    made(cfg)  # a wrong setting is said before anything is made
    reader = TraceReader(store.make(trace_recipe(cfg)).folder)
    tested = reader
    if cfg.train.test_trace is not None:
        tested = TraceReader(store.make(test_recipe(cfg)).folder)
    chosen = name_of(cfg)
    runs = {
        chosen: cfg,
        **{name: with_predictor(cfg, name) for name in baselines(cfg, reader, chosen)},
    }
    folds, scored, left_out = n_folds(reader, cfg), list[Scored](), dict[str, str]()
    for name, one in runs.items():
        try:
            scored.append(_score(one, store, tested, folds))
        except MissingData as error:
            if name == chosen:
                raise MissingData(f"predictor={name}: {error}") from error
            left_out[name] = str(error)
    return _write(cfg, reader, tested, scored, left_out, outputs)


def baselines(cfg: Config, reader: TraceReader, chosen: str) -> Iterator[str]:
    """The names of what stands beside the chosen predictor."""
    if cfg.train.baselines == "none":
        return
    for name in FAST if cfg.train.baselines == "fast" else choices("predictor"):
        needs = made(with_predictor(cfg, name)).needs if name not in NO_BASELINES else ("nothing",)
        if name != chosen and set(needs) <= set(reader.columns):
            yield name


def _score(cfg: Config, store: Store, tested: TraceReader, folds: int) -> Scored:
    name, predictor = name_of(cfg), made(cfg)
    is_template_DP = None
    counts, seconds, n_bytes, event_us = list[Counts](), list[float](), 0, list[float]()
    curve: list[dict[str, float]] = []
    for fold in range(folds):
        recipe = predictions_recipe(cfg, fold)
        predictions = store.make(recipe)
        fitted = store.make(recipe.upstream["predictor"])
        guesses = PredictionsReader(predictions.folder)
        part = asked_part(tested, cfg.seed, fold, is_elsewhere=cfg.train.test_trace is not None)
        if is_template_DP is None:
            is_template_DP = part.survey.template()
        counts.append(count(guesses, part, is_template_DP))
        seconds.append(json.loads((fitted.folder / FIT).read_text())["seconds"])
        about = json.loads((fitted.folder / ABOUT).read_text())
        curve += [{"fold": fold, **row} for row in about.get("curve", ())]
        n_bytes = guesses.card.parameter_bytes
        if guesses.card.event_us is not None:
            event_us.append(guesses.card.event_us)
        if fitted.was_made:
            log.info("%s: fold %d of %d fitted in %.1f s", name, fold + 1, folds, seconds[-1])
    return Scored(
        name=name,
        sees=predictor.sees,
        is_probability=predictor.score == PROBABILITY and not cheats(predictor),
        folds=tuple(counts),
        parameter_bytes=n_bytes,
        fit_seconds=sum(seconds) / len(seconds),
        event_us=sum(event_us) / len(event_us) if event_us else None,
        curve=tuple(curve),
    )


def _write(
    cfg: Config,
    reader: TraceReader,
    tested: TraceReader,
    scored: list[Scored],
    left_out: dict[str, str],
    outputs: Outputs,
) -> dict[str, float]:
    tables = {
        "predictors": results.summary(scored, cfg.seed),
        "by_layer": results.by_layer(scored, tested.card),
        "by_width": results.by_width(scored),
        "by_fold": results.by_fold(scored),
        "reliability": results.reliability(scored),
        "differences": results.differences(scored, cfg.seed),
        "curve": pd.DataFrame(scored[0].curve),
    }
    for name, frame in tables.items():
        if len(frame):
            outputs.table(name, frame)
    if left_out:
        rows = [{"predictor": name, "why": why} for name, why in left_out.items()]
        outputs.table("left_out", pd.DataFrame(rows))
    metrics = results.headline(tables["predictors"], scored[0].name)
    outputs.metrics(metrics)
    if cfg.train.figures:
        from prefetch.predict.pictures import draw_all  # matplotlib: slow, and not everyone draws

        for path in draw_all(
            tables, outputs.folder, _note(reader, tested), top_k=tested.card.top_k
        ):
            if path.suffix == ".png":
                outputs.figure(path)
    _print(tables["predictors"], scored, tested, left_out, len(scored[0].folds))
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


def _print(
    table: pd.DataFrame,
    scored: list[Scored],
    tested: TraceReader,
    left_out: dict[str, str],
    folds: int,
) -> None:
    rows = table[table["rows"] == "new_text"]
    requests = int(rows.requests.iloc[0])
    kind = (
        "requests" if tested.n_requests >= SMALLEST_SPLIT else "the last part of too few requests"
    )
    title = f"{requests:,} {kind} tested, {folds} fold{'s' if folds > 1 else ''}; k = {tested.card.top_k}"
    shown = Table(title=Text(title), title_justify="left")
    for name in ("predictor", "sees", "ahead"):
        shown.add_column(name)
    for name in (*COLUMNS.values(), "µs/event", "fit s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        cells = [_number(row[name]) for name in COLUMNS]
        cells[0] += "" if math.isnan(row["low"]) else f" [{row['low']:.3f} {row['high']:.3f}]"
        name = f"{row['predictor']} ({row['mark']})" if row["mark"] else str(row["predictor"])
        times = [_number(row["predict_us_per_event"], 1), _number(row["fit_seconds"], 1)]
        shown.add_row(Text(name), Text(str(row["sees"])), str(row["horizon"]), *cells, *times)
    console = Console(width=max(160, Console().width))
    console.print(shown)
    for name, why in left_out.items():
        console.print(Text(f"{name}: left out, {why}"))


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
