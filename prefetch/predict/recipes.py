"""How a fitted predictor and its guesses are made, and found again. It knows no predictor by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.artifacts import BUILDING, UNFINISHED, Outside, Recipe
from prefetch.cluster.mapping import cluster_of
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.predict.guesses import write_guesses
from prefetch.predict.networks.interrupted import seconds_before
from prefetch.predict.part import Part, parts_of, survey_of
from prefetch.predict.predictor import (
    FIT,
    Predictor,
    check_same_shape,
    declared,
    made_of,
    parameter_bytes,
    resident_bytes,
    restore,
    save,
)
from prefetch.predict.scored.domains import only
from prefetch.predict.scored.timing import event_time
from prefetch.scoring import Fold
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader

RECIPE = 2  # raise it when folds, features or files change what is written
ASKED = ("horizons", "needs", "sees", "score", "fit", "scores")  # of whatever is a predictor
PREDICTIONS = (
    2  # raise it when only guesses, or what they say of themselves, change: nothing is fitted anew
)


def predictor_recipe(cfg: Config, fold: int = 0, trace: Recipe | Outside | None = None) -> Recipe:
    """Fitted on the training requests of one fold, tuned on its validation requests.

    What an ensemble is made of is fitted by recipes of its own, and found where it was fitted before.
    """
    settings = settings_of(cfg)
    name = name_of(cfg)
    predictor_at_rest = made(cfg)
    trace = trace or _fitted_trace(cfg, predictor_at_rest)

    def build(folder: Path, upstream: Mapping[str, Path]) -> None:
        predictor = made(cfg)
        reader = TraceReader(upstream["trace"])
        check_horizons(cfg, reader.card.n_layers)
        part = fold_of(reader, cfg.seed, fold, is_tested_elsewhere=cfg.train.test_trace is not None)
        train, validation, _ = parts_of(reader, part)
        train, validation = (only(one, cfg.train.domains) for one in (train, validation))
        train = dataclasses.replace(train, cluster=cluster_of(cfg))
        for needed in (train, validation):
            needed.require(*predictor.needs)
        unfinished = folder.with_name(f".{folder.name.removesuffix(BUILDING)}{UNFINISHED}")
        seconds = _restored(predictor, upstream)
        if hasattr(predictor, "resume"):
            predictor.resume = (
                unfinished  # beside what is built: that is removed when a run is interrupted
            )
            seconds += seconds_before(unfinished)
        started = time.perf_counter()
        if made_of(predictor):
            cast(Any, predictor).combine(validation)
        else:
            predictor.fit(train, validation)
        seconds += time.perf_counter() - started
        shutil.rmtree(unfinished, ignore_errors=True)
        about = {
            "predictor": name,
            "settings": settings,
            "fold": part.number,
            "split": part.kind,
            "fitted_requests": list(said.fitted_requests)
            if (said := declared(predictor))
            else sorted({*train.requests.tolist(), *validation.requests.tolist()}),
            "parameter_bytes": parameter_bytes(predictor),
            "card": reader.card.to_json(),
            "curve": getattr(predictor, "curve", []),
        }
        save(predictor, folder, about, seconds)

    kind = type(predictor_at_rest)
    members = {
        member: predictor_recipe(leaves.with_leaf(cfg, "predictor", leaf), fold, trace)
        for member, leaf in getattr(predictor_at_rest, "leaves", {}).items()
    }
    return Recipe(
        kind="predictor",
        version=RECIPE * 1000 + int(getattr(kind, "version", 1)),
        config={
            "predictor": name if is_ours(cfg) else str(cfg.predictor._target_),
            "settings": settings,
            "fold": fold,
            "seed": cfg.seed,
            "whole": cfg.train.test_trace is not None,
            **({} if cfg.train.domains is None else {"domains": sorted(cfg.train.domains)}),
        },
        build=build,
        upstream={"trace": trace, **members},
        libraries=("numpy", *getattr(kind, "libraries", ())),
        files={**getattr(predictor_at_rest, "files", {}), **_source(cfg, kind)},
    )


def _fitted_trace(cfg: Config, predictor: Predictor) -> Recipe | Outside:
    """Guesses of others are fitted on nothing here: they belong to the trace that is asked about."""
    is_asked = declared(predictor) is not None and cfg.train.test_trace is not None
    return test_recipe(cfg) if is_asked else trace_recipe(cfg)


def _restored(predictor: Predictor, upstream: Mapping[str, Path]) -> float:
    """Puts back what members learnt; the seconds that it took."""
    seconds = 0.0
    for member, one in made_of(predictor).items():
        restore(one, upstream[member])
        seconds += float(json.loads((upstream[member] / FIT).read_text())["seconds"])
    return seconds


def predictions_recipe(cfg: Config, fold: int = 0) -> Recipe:
    """Guesses about the test requests of one fold, or about all requests of `train.test_trace`."""
    is_elsewhere = cfg.train.test_trace is not None
    predictor_made = predictor_recipe(cfg, fold)
    fitted_trace = predictor_made.upstream["trace"]
    asked = tested_recipe(cfg) if is_elsewhere else fitted_trace

    def build(folder: Path, upstream: Mapping[str, Path]) -> None:
        predictor = made(cfg)
        about = restore(predictor, upstream["predictor"])
        reader = TraceReader(upstream["asked"])
        check_same_shape(ModelCard.from_json(about["card"], "predictor.json"), reader.card)
        part = asked_part(reader, cfg.seed, fold, is_elsewhere=is_elsewhere)
        part.require(*predictor.needs)
        said, fitted_elsewhere = declared(predictor), fitted_trace.key if is_elsewhere else None
        if said:
            fitted_elsewhere = said.fitted_trace
            known = _known_as(said.trace, asked, upstream["asked"])
            cast(Any, predictor).check_fits(known, part)
        write_guesses(
            predictor,
            part,
            folder,
            name=about["predictor"],
            trace=asked.key,
            width=width_of(cfg, reader),
            fitted=tuple(about["fitted_requests"]),
            fitted_trace=fitted_elsewhere,
            event_time=event_time(predictor, part),
            n_bytes=resident_bytes(predictor),  # after it was asked: it has made what it needs
        )

    return Recipe(
        kind="predictions",
        version=PREDICTIONS,
        config={"fold": fold, "seed": cfg.seed, "width": cfg.train.width},
        build=build,
        upstream={"predictor": predictor_made, "asked": asked},
    )


def trace_recipe(cfg: Config) -> Recipe | Outside:
    """The stage that collects is known by name only: the middle floor's rooms do not know each other."""
    return cast(Recipe | Outside, leaves.locate(cfg.makers["trace"])(cfg))


def test_recipe(cfg: Config) -> Recipe | Outside:
    """The other trace: a folder that holds one, or a path that the chosen source reads."""
    path = Path(str(cfg.train.test_trace))
    if (path / "trace.json").exists():
        changes: dict[str, Any] = {"trace": str(path)}
    elif "path" in cfg.source:
        changes = {"trace": None, "source": {"path": str(path)}}
    else:
        raise ConfigError(
            f"train.test_trace={path}: not the folder of a trace, and the chosen source reads no path"
        )
    return trace_recipe(cast(Config, OmegaConf.merge(cast(DictConfig, cfg), changes)))


def tested_recipe(cfg: Config) -> Recipe | Outside:
    """The other trace, which must not be the one that is fitted on."""
    tested = test_recipe(cfg)
    same = _keys(tested) & _keys(trace_recipe(cfg))
    if same:
        raise ConfigError(
            f"train.test_trace={cfg.train.test_trace}: is the trace that is fitted on (key {min(same)}); without "
            "train.test_trace it is tested on requests that were held out"
        )
    return tested


def _keys(trace: Recipe | Outside) -> set[str]:
    """A trace of a store that is named by its folder has two."""
    return {trace.key} | ({trace.content_key} if isinstance(trace, Outside) else set())


def _known_as(name: str | None, trace: Recipe | Outside, folder: Path) -> str:
    """The name itself, where it is a key of the trace; otherwise the key that was expected."""
    if name in _keys(trace) or name == Outside("trace", folder).content_key:
        return str(name)
    return trace.key


def fold_of(
    reader: TraceReader, seed: int, fold: int, *, is_tested_elsewhere: bool = False
) -> Fold:
    """One fold; where another trace is the test, its test requests are trained on as well."""
    folds = survey_of(reader).folds(seed)
    chosen = folds[min(fold, len(folds) - 1)]
    if is_tested_elsewhere and chosen.kind == "requests":
        everything = sorted({*chosen.train.tolist(), *chosen.test.tolist()})
        return Fold(0, "requests", _array(everything), chosen.validation, chosen.test[:0], (0, 0))
    return chosen


def asked_part(reader: TraceReader, seed: int, fold: int, *, is_elsewhere: bool) -> Part:
    """The requests that are guessed and scored."""
    if not is_elsewhere:
        return parts_of(reader, fold_of(reader, seed, fold)).test
    folds = survey_of(reader).folds(seed)
    return Part(reader, _array(sorted({r for part in folds for r in part.test.tolist()})))


def n_folds(reader: TraceReader, cfg: Config) -> int:
    if cfg.train.test_trace is not None:
        return 1
    return min(cfg.train.folds, len(survey_of(reader).folds(cfg.seed)))


def _array(values: list[int]) -> Any:

    return np.array(values, np.int64)


def with_predictor(cfg: Config, name: str) -> Config:
    """The same configuration with another predictor, at its default settings."""
    return leaves.with_choice(cfg, "predictor", name)


def made(cfg: Config) -> Predictor:
    predictor = leaves.instantiate(cfg.predictor, "predictor")
    if lacking := [name for name in ASKED if not hasattr(predictor, name)]:
        raise ConfigError(
            f"predictor={cfg.predictor._target_}: has no {', '.join(lacking)}; a predictor has {', '.join(ASKED)} "
            "(docs/predict.md)"
        )
    return cast(Predictor, predictor)


def settings_of(cfg: Config) -> dict[str, Any]:
    settings = OmegaConf.to_container(cfg.predictor, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items() if name != "_target_"}


def name_of(cfg: Config) -> str:
    """What the user typed after predictor=: the module's name; of a class of one's own, the file that names it."""
    target = str(cfg.predictor._target_)
    if is_ours(cfg):
        return target.split(".")[-2]
    files = (config.CONFIGS / "predictor").glob("*.yaml")
    names = [
        path.stem for path in files if OmegaConf.select(OmegaConf.load(path), "_target_") == target
    ]
    return min(names, default=target)


def is_ours(cfg: Config) -> bool:
    return str(cfg.predictor._target_).startswith("prefetch.predict.")


def _source(cfg: Config, kind: type) -> dict[str, Path]:
    """The file of a class of one's own: whoever changes it gets new guesses."""
    if is_ours(cfg):
        return {}
    try:
        return {"source": Path(inspect.getfile(kind))}
    except (TypeError, OSError):
        return {}  # typed into a notebook


def label_of(cfg: Config) -> str:
    """The name, with the settings that are not the default ones: `markov` alone is the baseline of every table."""
    if name_of(cfg) not in config.choices("predictor"):
        return name_of(cfg)
    settings, usual = settings_of(cfg), settings_of(with_predictor(cfg, name_of(cfg)))
    said = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
        if value != usual.get(key)
    ]
    return f"{name_of(cfg)} ({', '.join(said)})" if said else name_of(cfg)


def width_of(cfg: Config, reader: TraceReader) -> int:
    return min(cfg.train.width or 2 * reader.card.top_k, reader.card.n_experts)


def check_horizons(cfg: Config, n_layers: int) -> None:
    far = [horizon for horizon in cfg.train.horizons if horizon >= n_layers]
    if far:
        raise ConfigError(
            f"train.horizons={list(cfg.train.horizons)}: the trace has {n_layers} layers, so that nothing is "
            f"{far[0]} layers ahead; pass train.horizons=[1]"
        )
