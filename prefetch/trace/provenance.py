"""Where a trace comes from and what was done to it: all that a reader could doubt. Nothing depends on the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from prefetch.errors import FormatError

KINDS = ("real", "synthetic")
KINDS_OF_VALUES: dict[str, type | tuple[type, ...]] = {
    "versions": str,
    "inputs": str,
    "dropped_rows": int,
    "facts": (int, float),
}


@dataclass(frozen=True)
class Provenance:
    """`kind` says whether a model's router made these choices; nothing ever mixes the two."""

    kind: str
    source: str  # the name of the source that read or recorded it
    versions: Mapping[str, str] = field(default_factory=dict)  # tool -> version
    seed: int | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # file or corpus -> its digest
    dropped_rows: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    notes: tuple[str, ...] = ()  # what had to be assumed
    facts: Mapping[str, float] = field(
        default_factory=dict
    )  # measured while recording: own-gate agreement, ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))
        if self.kind not in KINDS:
            raise FormatError(f"provenance: kind must be one of {KINDS}, got {self.kind!r}")
        if not isinstance(self.source, str) or not all(isinstance(n, str) for n in self.notes):
            raise FormatError("provenance: source and notes must be texts")
        if not isinstance(self.seed, (int, type(None))):
            raise FormatError(f"provenance: seed must be a whole number or null, got {self.seed!r}")
        for name, kind in KINDS_OF_VALUES.items():
            if not isinstance(getattr(self, name), Mapping):
                raise FormatError(f"provenance: {name} must be an object")
            odd = {
                key: value
                for key, value in getattr(self, name).items()
                if not isinstance(value, kind)
            }
            if odd:
                raise FormatError(f"provenance: {name} holds {odd}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> Self:
        known = {item.name for item in dataclasses.fields(cls)}
        if not {"kind", "source"} <= set(fields) <= known:
            raise FormatError(
                f"{where}: provenance has the fields {sorted(known)}, got {sorted(fields)}"
            )
        return cls(**fields)
