"""Which requests, rows and layers of a trace are meant, in a user's words. It reads small columns and writes nothing.

R requests; ranges are inclusive at both ends, as they are written: 0-99 are a hundred requests.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.trace.card import STACKS, ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import PHASES

Ranges = tuple[tuple[int, int], ...]
RANGE = re.compile(r"(\d+)(?:-(\d+))?")
MOST_NAMED = 200  # characters of a note that lists requests


@dataclass(frozen=True)
class Selection:
    """None = all. First domains, requests and the phase say what may stay; then it is thinned, in the order below."""

    domains: Any = None  # names, or one
    requests: Any = None  # numbers and ranges: [3, "7-9"], or "0-99"
    phase: str | None = None  # prefill | decode
    layers: Any = None  # the model's own numbers, written like requests; "encoder:3" where both stacks have it
    first: int | None = None  # requests
    drawn: int | None = None  # requests, by `seed`, in their old order
    tokens: int | None = None  # at most: whole requests from the front, as long as they fit
    seed: int = 0

    def __post_init__(self) -> None:
        if self.domains is not None:
            names = [self.domains] if isinstance(self.domains, str) else self.domains
            object.__setattr__(self, "domains", tuple(str(name) for name in names))
        if self.phase not in (None, *PHASES):
            raise ConfigError(f"phase: expected one of {PHASES}, got {self.phase!r}")
        for name in ("first", "drawn", "tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        ranges_of(self.requests, "requests")

    def told(self) -> str:
        """What was asked, as one line for the provenance."""
        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.drawn is None:
            del asked["seed"]
        words = []
        for name, value in asked.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words += [f"{name}={text[:MOST_NAMED]}"] if value is not None else []
        return ", ".join(words) or "everything"


def words_of(asked: Any) -> list[str]:
    """A list, or text with commas, as words."""
    parts = asked if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]
    return [word.strip() for part in parts for word in str(part).split(",")]


def ranges_of(asked: Any, what: str) -> Ranges:
    """Numbers and ranges as (first, last) pairs."""
    ranges = []
    for word in [] if asked is None else words_of(asked):
        found = RANGE.fullmatch(word)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"{what}: expected numbers and ranges such as [3, 7-9], got {word!r}")
        ranges.append((int(found[1]), int(found[2] or found[1])))
    return tuple(ranges)


def layer_slots(card: ModelCard, asked: Any) -> list[int]:
    """Where on the L axis the layers stand that were asked for, in the order of the card."""
    if asked is None:
        return list(range(card.n_layers))
    chosen: set[int] = set()
    for word in words_of(asked):
        stack, _, numbers = word.rpartition(":")
        if stack not in ("", *STACKS):
            raise ConfigError(f"layers: expected decoder:N or encoder:N, got {word!r}")
        for low, high in ranges_of(numbers, "layers"):
            found = {
                slot
                for slot, number in enumerate(card.layer_numbers)
                if low <= number <= high and stack in ("", card.layer_stacks[slot])
            }
            if not found:
                raise ConfigError(
                    f"layers: {word} is none of this trace; its layers are {list(card.layer_numbers)}"
                )
            chosen |= found
    return sorted(chosen)


def beyond(reader: TraceReader, asked: Selection) -> list[str]:
    """Ranges that reach past what there is: what is in them is taken, and that there is no more is said."""
    said, own = [], reader.card.layer_numbers
    for word in [] if asked.layers is None else words_of(asked.layers):
        [(low, high)] = ranges_of(word.rpartition(":")[2], "layers")
        if low < min(own) or high > max(own):
            said.append(f"layers {word}: the trace has {min(own)} to {max(own)}")
    for low, high in ranges_of(asked.requests, "requests"):
        if high >= reader.n_requests:
            said.append(f"requests {low}-{high}: the trace has 0 to {reader.n_requests - 1}")
    return said


def domain_codes(reader: TraceReader, names: tuple[str, ...] | None) -> NDArray[np.int32] | None:
    if names is None:
        return None
    if unknown := [name for name in names if name not in reader.domains]:
        raise ConfigError(
            f"domains: {unknown} are none of this trace; it has {list(reader.domains) or 'no domains'}"
        )
    return np.array([reader.domains.index(name) for name in names], np.int32)


def rows_kept(
    small: Mapping[str, NDArray[Any]], codes: NDArray[np.int32] | None, phase: str | None
) -> NDArray[np.bool_]:
    """[T] the rows of these domains and this phase."""
    kept_T = np.ones(len(small["request_T"]), bool)
    if codes is not None:
        kept_T &= np.isin(small["domain_T"], codes)
    if phase is not None:
        kept_T &= small["phase_T"] == PHASES.index(phase)
    return kept_T


def chosen_requests(reader: TraceReader, asked: Selection) -> NDArray[np.int32]:
    """The numbers of the requests that stay, ascending."""
    request_R, rows_R = _kept_rows(reader, asked)
    if asked.requests is not None:
        wanted_R = np.zeros(len(request_R), bool)
        for low, high in ranges_of(asked.requests, "requests"):
            if low >= reader.n_requests:
                raise ConfigError(
                    f"requests: {low} is none of this trace; it has {reader.n_requests}, from 0 on"
                )
            wanted_R |= (request_R >= low) & (request_R <= high)
        request_R, rows_R = request_R[wanted_R], rows_R[wanted_R]
    at_R = _thinned(rows_R, asked)
    if not len(at_R):
        raise ConfigError(f"{reader.folder}: nothing is left of {asked.told()}")
    return request_R[at_R]


def _kept_rows(
    reader: TraceReader, asked: Selection
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(request_R, rows_R) of requests that keep a row."""
    codes = domain_codes(reader, asked.domains)
    numbers, rows = [], []
    for small in reader.small():
        kept_T = small["request_T"][rows_kept(small, codes, asked.phase)]
        number_R, rows_R = np.unique(kept_T, return_counts=True)
        numbers.append(number_R)
        rows.append(rows_R)
    if not numbers:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    both = np.concatenate(numbers)
    request_R, at_N = np.unique(both, return_inverse=True)  # a request may span row groups
    counted = np.bincount(at_N, np.concatenate(rows), len(request_R))
    return request_R, counted.astype(np.int64)


def _thinned(rows_R: NDArray[np.int64], asked: Selection) -> NDArray[np.int64]:
    at_R = np.arange(len(rows_R))[: asked.first]
    if asked.drawn is not None:
        if asked.drawn > len(at_R):
            raise ConfigError(
                f"drawn={asked.drawn}: only {len(at_R)} requests are left to draw from"
            )
        rng = np.random.default_rng(asked.seed)
        at_R = np.sort(rng.choice(at_R, asked.drawn, replace=False))
    if asked.tokens is not None and len(at_R):
        fits_R = np.cumsum(rows_R[at_R]) <= asked.tokens
        if not fits_R[0]:
            raise ConfigError(
                f"tokens={asked.tokens}: the first request that is left has {rows_R[at_R[0]]} rows already"
            )
        at_R = at_R[fits_R]
    return at_R
