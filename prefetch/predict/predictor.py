"""What a predictor is: settings in its constructor, `fit` on some requests, a score for every expert of a `Past`.

It knows no predictor by name. T tokens, L layers, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.trace.card import ModelCard

STATE, ABOUT, FIT = "state.safetensors", "predictor.json", "fit.json"
SCHEMA = "prefetch.predictor/1"
PROBABILITY = "probability"  # that the expert is among the chosen ones
NOT_GUESSED = -np.inf
LEARNT = re.compile(r"(?!__)\w+_")  # the name of an array that a fit leaves
NOTHING, ANSWER = "nothing", "the answer"
SEES = (  # joined by " + " where it is more than one
    NOTHING,
    "routing history",
    "weights",
    "token ids",
    "gate inputs",
    "attention inputs",
    ANSWER,
)
SCORES = (PROBABILITY, "logit", "similarity", "rank")


class Predictor(Protocol):
    """What the stage asks of a predictor. What it learnt stands in array attributes that end in an underscore.

    The first three belong to a class, or to an object where its settings decide.
    """

    horizons: tuple[int, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that the trace must have, beside the choices."""
        ...

    @property
    def sees(self) -> str:
        """Of `SEES`; for guesses of others, what their maker declares."""
        ...

    @property
    def score(self) -> str:
        """What a score means, of `SCORES`."""
        ...

    def fit(self, train: Part, validation: Part) -> Self: ...
    def scores(self, past: Past) -> NDArray[np.float32]:
        """[T, L, E]: larger = likelier; -inf = not guessed at all."""
        ...


@dataclass(frozen=True)
class Declared:
    """What the maker of guesses says of them: none of it can be measured here."""

    causality: str = "decode"
    trace: str | None = None  # key of the trace that they are about
    fitted_requests: tuple[int, ...] = ()
    fitted_trace: str | None = None  # that these are of; None = the same
    parameter_bytes: int = 0
    event_us: float | None = None
    event_us_p99: float | None = None


class Online(Protocol):
    """The same answers, one event at a time, for an engine."""

    def start(self) -> None:
        """A request begins: nothing of another one is known."""
        ...

    def observe(
        self, layer: int, ids: NDArray[Any], gate_input: NDArray[Any] | None = None
    ) -> None:
        """These experts were chosen at this layer; the last layer ends the token."""
        ...

    def guess(self, layer: int) -> NDArray[np.float32]:
        """[E]: scores of a layer of the token that runs, or that comes next; its distance is the horizon."""
        ...


def cheats(predictor: Predictor) -> bool:
    return predictor.sees == ANSWER


def declared(predictor: Predictor) -> Declared | None:
    """Of guesses that somebody else made; None for who guesses here."""
    return getattr(predictor, "declared", None)


def made_of(predictor: Predictor) -> Mapping[str, Predictor]:
    """The predictors that it asks, by name, which none but an ensemble has. Their state is saved with its own."""
    return getattr(predictor, "made_of", {})


def horizons_of(given: Iterable[int]) -> tuple[int, ...]:
    """Settings of every predictor: how far ahead it is asked, each at least 1, none twice."""
    horizons = tuple(int(horizon) for horizon in given)
    if not horizons or min(horizons) < 1 or len(set(horizons)) < len(horizons):
        raise ConfigError(
            f"horizons: expected different whole numbers from 1 on, got {list(horizons)}"
        )
    return horizons


def state_of(predictor: Predictor) -> dict[str, NDArray[Any]]:
    """What it learnt; what a member learnt is called `member.name_`."""
    state = {
        name: np.ascontiguousarray(value)
        for name, value in sorted(vars(predictor).items())
        if name.endswith("_") and isinstance(value, np.ndarray)
    }
    for member, one in made_of(predictor).items():
        state |= {f"{member}.{name}": array for name, array in state_of(one).items()}
    return state


def parameter_bytes(predictor: Predictor) -> int:
    """Of what it learnt, as it is saved."""
    return sum(array.nbytes for array in state_of(predictor).values())


def resident_bytes(predictor: Predictor) -> int:
    """What must be held in memory to guess: what was learnt, unless `resident_bytes()` says that it is more."""
    if said := declared(predictor):
        return said.parameter_bytes
    if hasattr(predictor, "resident_bytes"):
        return int(predictor.resident_bytes())
    members = made_of(predictor)
    own = parameter_bytes(predictor) - sum(parameter_bytes(one) for one in members.values())
    return own + sum(resident_bytes(one) for one in members.values())


def save(predictor: Predictor, folder: Path, about: dict[str, Any], fit_seconds: float) -> None:
    """The time of the fit is apart: it is not the same twice."""
    from safetensors.numpy import save_file

    save_file(state_of(predictor), str(folder / STATE))
    (folder / FIT).write_text(json.dumps({"seconds": fit_seconds}) + "\n")
    said = {"schema": SCHEMA, "class": _kind(predictor), **about}
    (folder / ABOUT).write_text(json.dumps(said, indent=1) + "\n")


def _kind(predictor: Predictor) -> str:
    return f"{type(predictor).__module__}.{type(predictor).__qualname__}"


def restore(predictor: Predictor, folder: Path | str) -> dict[str, Any]:
    """Puts back what was learnt; returns what was said about it."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    path = folder / ABOUT
    with reading(path, "the description of a fitted predictor"):
        about: dict[str, Any] = json.loads(path.read_text())
        if about.get("schema") != SCHEMA:
            raise FormatError(f"expected schema {SCHEMA}, found {about.get('schema')}")
    kind, learnt_by = _kind(predictor), about.get("class", _kind(predictor))
    if learnt_by != kind:
        raise FormatError(f"{path}: learnt by {learnt_by}, and cannot be put into {kind}")
    with reading(folder / STATE, "the arrays of a fitted predictor"):
        for name, array in load_file(folder / STATE).items():
            member, _, own = name.rpartition(".")
            if not LEARNT.fullmatch(own):
                raise FormatError(f"{name!r} is no array that a predictor learns: names end in _")
            setattr(made_of(predictor)[member] if member else predictor, own, array)
    return about


def check_same_shape(learnt: ModelCard, asked: ModelCard) -> None:
    """A predictor of another model is refused: its experts are not these."""
    for name in ("n_layers", "n_experts", "top_k"):
        here, there = getattr(learnt, name), getattr(asked, name)
        if here != there:
            raise FormatError(
                f"learnt on {learnt.name} with {name}={here}, asked about {asked.name} with {name}={there}: "
                "a predictor serves the model that it was learnt on"
            )
