"""Panels that only the simulator's figures have: bars in parts, lanes of time, points with intervals.

They look as `prefetch.figures` says, and count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefetch.figures import Axis, Dash, Key, Line, Lines, plain

Piece = tuple[float, float]  # where it begins, how long it is
EDGE = 0.5  # points


@dataclass(frozen=True, eq=False, kw_only=True)
class Stacked(Lines):
    """A bar across for every name, from above, with its parts one behind the other."""

    names: Sequence[str]
    parts_KN: NDArray[Any]  # of every kind, in every bar
    kinds: Sequence[Key]

    @property
    def keys(self) -> tuple[Key, ...]:
        there = zip(self.kinds, self.parts_KN, strict=True)
        return (*(kind for kind, part_N in there if part_N.any()), *super().keys)

    def paint(self, axes: Any) -> None:
        places, behind_N = np.arange(len(self.names)), np.zeros(len(self.names))
        for kind, part_N in zip(self.kinds, self.parts_KN, strict=True):
            axes.barh(places, part_N, 0.7, left=behind_N, color=kind.colour, linewidth=0)
            behind_N = behind_N + part_N
        super().paint(axes)
        axes.set_yticks(places, [plain(name) for name in self.names])
        axes.set_ylim(len(self.names) - 0.4, -0.6)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lanes(Lines):
    """What each lane does when; the first lane stands on top."""

    lanes: Sequence[str]
    pieces: Sequence[tuple[int, Key, Sequence[Piece]]]  # lane, what it does, when
    edged: float = np.inf  # pieces at least so long stand apart by a thin white line

    @property
    def keys(self) -> tuple[Key, ...]:
        return (*dict.fromkeys(key for _, key, pieces in self.pieces if pieces), *super().keys)

    def paint(self, axes: Any) -> None:
        for lane, key, pieces in self.pieces:
            widths = [EDGE if took >= self.edged else 0.0 for _, took in pieces]
            place = lane - 0.38, 0.76
            axes.broken_barh(
                pieces, place, facecolors=key.colour, edgecolors="white", linewidths=widths
            )
        super().paint(axes)
        axes.set_yticks(range(len(self.lanes)), [plain(lane) for lane in self.lanes])
        axes.set_ylim(len(self.lanes) - 0.45, -0.55)


def with_intervals(
    x: ArrayLike, y: ArrayLike, low: ArrayLike, high: ArrayLike, label: str, **look: Any
) -> list[Line]:
    """Points, joined where there are several, each with a line from the low to the high end of its interval."""
    ends = zip(np.atleast_1d(x), np.atleast_1d(low), np.atleast_1d(high), strict=True)
    bars = [
        Line([at, at], [a, b], "", look["colour"], dots=False, width=0.8)
        for at, a, b in ends
        if np.isfinite(a) and np.isfinite(b)
    ]
    return [*bars, Line(x, y, label, dots=True, **look)]


def looks(n: int, colours: Sequence[str]) -> list[tuple[str, Dash]]:
    """So many that can be told apart: every colour solid, then dashed, then dotted, and then again."""
    dashes: tuple[Dash, ...] = ("-", "--", ":")
    return [(colours[i % len(colours)], dashes[i // len(colours) % len(dashes)]) for i in range(n)]


def share_axis(label: str = "cache (% of all experts)") -> Axis:
    return Axis(label, low=0, high=102)
