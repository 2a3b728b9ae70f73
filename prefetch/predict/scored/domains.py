"""Which requests are of which domain: to learn from some only, and to tell tested ones apart. It knows no predictor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.part import Part
from prefetch.scoring import Survey

UNKNOWN, SEVERAL = "unknown", "several"


def only(part: Part, domains: Sequence[str] | None) -> Part:
    """The requests of these domains; None = all."""
    if domains is None:
        return part
    if part.stop is not None or part.first:
        raise ConfigError(
            "train.domains: this trace has too few requests and is split in time, so that its domains cannot be "
            "kept apart; leave train.domains out"
        )
    known = part.survey.domains
    if missing := [name for name in domains if name not in known]:
        raise ConfigError(
            f"train.domains: {missing[0]!r} is no domain of this trace; it has {', '.join(known) or 'none'}"
        )
    survey = part.survey
    of_request = dict(zip(survey.request_R, _names(survey), strict=True))
    kept = [r for r in part.requests.tolist() if of_request[r] in set(domains)]
    if not kept:
        raise MissingData(
            f"train.domains={list(domains)}: no request of theirs is left to learn from in this fold"
        )
    return dataclasses.replace(part, requests=np.array(kept, np.int64))


def of_units(part: Part, unit_R: NDArray[np.int64]) -> tuple[str, ...]:
    """[U] the domain of what an interval draws together."""
    survey = part.survey
    of_request = dict(zip(survey.request_R, _names(survey), strict=True))
    found: dict[int, set[str]] = {}
    for request, unit in zip(part.requests.tolist(), unit_R.tolist(), strict=True):
        found.setdefault(unit, set()).add(of_request[request])
    return tuple(
        next(iter(names)) if len(names := found[unit]) == 1 else SEVERAL for unit in sorted(found)
    )


def _names(survey: Survey) -> list[str]:
    names = (*survey.domains, UNKNOWN)  # rows without a domain have the last number, or -1
    return [names[number] for number in survey.domain_R]
