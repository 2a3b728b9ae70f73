"""How a fitted predictor and its guesses are made, and found again. It knows no predictor by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

from prefetch import config
from prefetch.artifacts import BUILDING, UNFINISHED, Outside, Recipe
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.predict.guesses import write_guesses
from prefetch.predict.part import Part, parts_of, survey_of
from prefetch.predict.predictor import (
    FIT,
    Predictor,
    check_same_shape,
    made_of,
    parameter_bytes,
    restore,
    save,
)
from prefetch.predict.timing import event_microseconds
from prefetch.scoring import Fold
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader

RECIPE = 2  # raise it when folds, features or files change what is written


def predictor_recipe(cfg: Config, fold: int = 0, trace: Recipe | Outside | None = None) -> Recipe:
    """Fitted on the training requests of one fold, tuned on its validation requests.

    What an ensemble is made of is fitted by recipes of its own, and found where it was fitted before.
    """
    settings = settings_of(cfg)
    name = name_of(cfg)
    trace = trace or trace_recipe(cfg)

    def build(folder: Path, upstream: Mapping[str, Path]) -> None:
        predictor = made(cfg)
        reader = TraceReader(upstream["trace"])
        check_horizons(cfg, reader.card.n_layers)
        part = fold_of(reader, cfg.seed, fold, is_tested_elsewhere=cfg.train.test_trace is not None)
        train, validation, _ = parts_of(reader, part)
        for needed in (train, validation):
            needed.require(*predictor.needs)
        unfinished = folder.with_name(f".{folder.name.removesuffix(BUILDING)}{UNFINISHED}")
        if hasattr(predictor, "resume"):
            predictor.resume = (
                unfinished  # beside what is built: that is removed when a run is interrupted
            )
        seconds = _restored(predictor, upstream)
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
            "fitted_requests": sorted({*part.train.tolist(), *part.validation.tolist()}),
            "parameter_bytes": parameter_bytes(predictor),
            "card": reader.card.to_json(),
            "curve": getattr(predictor, "curve", []),
        }
        save(predictor, folder, about, seconds)

    predictor_at_rest = made(cfg)
    kind = type(predictor_at_rest)
    members = {
        member: predictor_recipe(_with_leaf(cfg, leaf), fold, trace)
        for member, leaf in getattr(predictor_at_rest, "leaves", {}).items()
    }
    return Recipe(
        kind="predictor",
        version=RECIPE * 1000 + int(getattr(kind, "version", 1)),
        config={
            "predictor": name,
            "settings": settings,
            "fold": fold,
            "seed": cfg.seed,
            "whole": cfg.train.test_trace is not None,
        },
        build=build,
        upstream={"trace": trace, **members},
        libraries=("numpy", *getattr(kind, "libraries", ())),
        files=getattr(predictor_at_rest, "files", {}),
    )


def _restored(predictor: Predictor, upstream: Mapping[str, Path]) -> float:
    """Puts back what members learnt; the seconds that it took."""
    seconds = 0.0
    for member, one in made_of(predictor).items():
        restore(one, upstream[member])
        seconds += float(json.loads((upstream[member] / FIT).read_text())["seconds"])
    return seconds


def predictions_recipe(cfg: Config, fold: int = 0) -> Recipe:
    """Guesses about the test requests of one fold, or about all requests of `train.test_trace`."""
    elsewhere = cfg.train.test_trace
    predictor_made = predictor_recipe(cfg, fold)
    asked = test_recipe(cfg) if elsewhere is not None else predictor_made.upstream["trace"]

    def build(folder: Path, upstream: Mapping[str, Path]) -> None:
        predictor = made(cfg)
        about = restore(predictor, upstream["predictor"])
        reader = TraceReader(upstream["asked"])
        check_same_shape(ModelCard.from_json(about["card"], "predictor.json"), reader.card)
        part = asked_part(reader, cfg.seed, fold, is_elsewhere=elsewhere is not None)
        part.require(*predictor.needs)
        write_guesses(
            predictor,
            part,
            folder,
            name=about["predictor"],
            trace=asked.key,
            width=width_of(cfg, reader),
            fitted=() if elsewhere is not None else tuple(about["fitted_requests"]),
            n_bytes=about["parameter_bytes"],
            event_us=event_microseconds(predictor, part),
        )

    return Recipe(
        kind="predictions",
        version=predictor_made.version,
        config={"fold": fold, "seed": cfg.seed, "width": cfg.train.width},
        build=build,
        upstream={"predictor": predictor_made, "asked": asked},
    )


def trace_recipe(cfg: Config) -> Recipe | Outside:
    """The stage that collects is known by name only: the middle floor's rooms do not know each other."""
    return cast(Recipe | Outside, config.locate(cfg.makers["trace"])(cfg))


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
    return _with_leaf(cfg, OmegaConf.load(config.CONFIGS / "predictor" / f"{name}.yaml"))


def _with_leaf(cfg: Config, leaf: Any) -> Config:
    whole = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cast(DictConfig, cfg))))
    whole.predictor = leaf
    return cast(Config, whole)


def made(cfg: Config) -> Predictor:
    return cast(Predictor, config.instantiate(cfg.predictor, "predictor"))


def settings_of(cfg: Config) -> dict[str, Any]:
    settings = OmegaConf.to_container(cfg.predictor, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items() if name != "_target_"}


def name_of(cfg: Config) -> str:
    """The module's name: what the user typed after predictor=."""
    return str(cfg.predictor._target_).split(".")[-2]


def width_of(cfg: Config, reader: TraceReader) -> int:
    return min(cfg.train.width or 2 * reader.card.top_k, reader.card.n_experts)


def check_horizons(cfg: Config, n_layers: int) -> None:
    far = [horizon for horizon in cfg.train.horizons if horizon >= n_layers]
    if far:
        raise ConfigError(
            f"train.horizons={list(cfg.train.horizons)}: the trace has {n_layers} layers, so that nothing is "
            f"{far[0]} layers ahead; pass train.horizons=[1]"
        )
