"""What is scored in one fold: its requests, which of them copy what was learnt from, and what intervals draw.

It knows no predictor. R requests, U units.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prefetch.predict.part import Part, parts_of, survey_of
from prefetch.predict.scored.copies import MOST_REQUESTS, Sketches, has_near_copy, sketches_of
from prefetch.predict.scored.domains import of_units
from prefetch.scoring import Fold, SharedText, Survey
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace

log = logging.getLogger(__name__)
MOST_UNITS = 2_000  # of a fold: where there are more, units are bundled by chance, which leaves intervals as they are
BUNDLING_SEED = 0  # the same bundles for every predictor: differences are paired


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The tested requests of one fold; arrays are aligned with `part.requests`."""

    part: Part
    split: str  # requests | time | whole: all of another trace
    shared: SharedText
    unit_R: NDArray[np.int64]
    is_copy_R: NDArray[np.bool_]

    @property
    def n_units(self) -> int:
        return int(self.unit_R.max(initial=-1)) + 1

    @cached_property
    def domain_U(self) -> tuple[str, ...]:
        return of_units(self.part, self.unit_R)


def held_out_in(part: Part, split: str = "requests") -> HeldOut:
    """Nothing was learnt from this trace that could be copied; for a notebook, and for tests."""
    survey, none = part.survey, np.zeros(len(part.requests), bool)
    return HeldOut(part, split, survey.shared_text(), units_of(survey, part.requests), none)


def held_out_folds(reader: TraceReader | RoutingTrace, seed: int, n_folds: int) -> list[HeldOut]:
    """The first folds of a trace."""
    survey = survey_of(reader)
    shared = survey.shared_text()
    sketches = sketches_of(reader, shared, survey.domains)
    _warn_of_many(sketches)
    found = []
    for fold in survey.folds(seed)[:n_folds]:
        part = parts_of(reader, fold).test
        known, n_layers = _learnt_from(reader, fold), reader.card.n_layers
        is_copy_R = has_near_copy(sketches, part.requests, sketches, known, n_layers)
        units = units_of(survey, part.requests)
        found.append(HeldOut(part, fold.kind, shared, units, is_copy_R))
    return found


def held_out_elsewhere(reader: TraceReader, other: TraceReader, part: Part) -> HeldOut:
    """All of another trace; what the first one holds as well is not new text."""
    survey, surveyed = survey_of(reader), survey_of(other)
    lined_up = survey.shared_text()
    known = sketches_of(reader, lined_up, survey.domains)
    asked = sketches_of(other, lined_up, survey.domains)
    for sketches in (known, asked):
        _warn_of_many(sketches)
    is_copy_R = has_near_copy(asked, part.requests, known, known.request_R, other.card.n_layers)
    units = units_of(surveyed, part.requests)
    return HeldOut(part, "whole", surveyed.shared_text(), units, is_copy_R)


def _learnt_from(reader: TraceReader | RoutingTrace, fold: Fold) -> NDArray[np.int64]:
    if fold.kind == "time":
        return Part(reader, fold.train, 0, fold.cuts[1]).asked()
    return np.concatenate([fold.train, fold.validation])


def units_of(survey: Survey, requests: NDArray[np.int64]) -> NDArray[np.int64]:
    """[R] what is drawn together: the turns of a conversation, and beyond `MOST_UNITS` bundles of such groups."""
    place_R = np.searchsorted(np.array(survey.request_R, np.int64), requests)
    group_R = survey.parted(survey.kept())[place_R]
    unit_R = np.unique(group_R, return_inverse=True)[1].astype(np.int64)
    n = int(unit_R.max(initial=-1)) + 1
    if n <= MOST_UNITS:
        return unit_R
    return np.random.default_rng(BUNDLING_SEED).permutation(n)[unit_R] % MOST_UNITS


def _warn_of_many(sketches: Sketches) -> None:
    if sketches.of_requests > MOST_REQUESTS:
        log.warning(
            "near copies are looked for among %s requests, drawn of %s: there are more than are found",
            f"{MOST_REQUESTS:,}", f"{sketches.of_requests:,}",
        )  # fmt: skip
