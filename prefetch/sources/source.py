"""What `collect` asks of a source. A source is a frozen dataclass of settings; making it reads nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefetch.artifacts import Recipe
from prefetch.errors import ConfigError

if TYPE_CHECKING:  # a trace that is found again must not wait for the libraries that would make it
    from prefetch.trace.counts import ExpertCounts
    from prefetch.trace.provenance import Provenance
    from prefetch.trace.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class Source:
    """Settings are the fields (a source that draws random numbers has a `seed`); they determine the content."""

    real: ClassVar[bool] = True  # did a model's router make these choices?
    gives: ClassVar[str] = "trace"  # or "counts": then it has `count` in the place of `record`
    version: ClassVar[int] = (
        1  # of the reading code; raise it when the same input gives another trace
    )
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)  # whose version can change the content

    def files(self) -> dict[str, Path]:
        """Outside files by the name that stands for them; their content counts, their place does not."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What else determines the content, as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def refuse(self, claims: Mapping[str, bool]) -> None:
        """The first claim that does not hold, with what the settings that it names were set to."""
        for claim, holds in claims.items():
            if not holds:
                fields = (field.name for field in dataclasses.fields(self))
                named = [name for name in fields if re.search(rf"\b{name}\b", claim)]
                got = ", ".join(f"{name}={getattr(self, name)}" for name in named)
                raise ConfigError(f"{claim}; got {got}" if got else claim)

    def upstream(self) -> Mapping[str, Recipe]:
        """What must be made first (a trained model); the folders are handed to `record`."""
        return {}

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        """Writes the trace: `writer.begin(card)`, then blocks of whole requests."""
        raise TypeError(
            f"{type(self).__name__} gives a trace, and has no record(self, writer, upstream)"
        )

    def count(self, provenance: Provenance) -> ExpertCounts:
        """Reads counts, where that is all there is."""
        raise TypeError(f"{type(self).__name__} gives counts, and has no count(self, provenance)")
