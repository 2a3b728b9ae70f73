"""From rows of a table to the lines, matrices and colours of a panel; which layers a picture shows.

It knows no picture. E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prefetch.figures import BLACK, BLUE, VERMILLION, Axis, Colours, Line

MOST_PANELS = 6  # layers of one picture
TOP_SHARE = (
    0.995  # of the cells lie within the colour scale, so that one expert does not hide the rest
)
LIFT_BITS = 3.0  # ends of the colour scale of log2 lift
PHASES = {"all": BLACK, "prefill": BLUE, "decode": VERMILLION}
PHASE_NAMES = {"all": "all tokens", "prefill": "prefill", "decode": "decode"}
SQUARE, WIDE = (3.4, 3.0), (4.2, 2.6)  # inches of a panel
RECALL = Axis("recall (share of choices)", low=0, high=1.02)


@dataclass(frozen=True)
class Layers:
    """Layers in the model's order: (stack, number), the stack "" where there is one only."""

    keys: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, table: pd.DataFrame) -> Layers:
        keys = _layer_keys(table)
        return cls(tuple(keys if any(stack for stack, _ in keys) else sorted(keys)))

    @property
    def colours(self) -> Colours:
        names = self.axis().names
        return Colours("layer", 0, max(1, len(names) - 1), "ordered", names=names)

    def axis(self, label: str = "layer") -> Axis:
        """Names are short: 3, or e3 in an encoder."""
        names = tuple(f"{stack[:1]}{number}" for stack, number in self.keys)
        margin = max(0.5, 0.02 * len(names))
        return Axis(label, names, low=-margin, high=len(names) - 1 + margin)

    def title(self, i: int) -> str:
        return f"{self.keys[i][0]} layer {self.keys[i][1]}".strip().capitalize()

    def spread(self) -> list[int]:
        return spread(len(self.keys))

    def rows(self, table: pd.DataFrame, i: int) -> pd.DataFrame:
        stack, number = self.keys[i]
        return (
            rows_where(table, stack=stack, layer=number)
            if stack
            else rows_where(table, layer=number)
        )

    def places(self, table: pd.DataFrame) -> NDArray[np.float64]:
        place = {key: float(i) for i, key in enumerate(self.keys)}
        return np.array([place.get(key, np.nan) for key in _layer_keys(table, every=True)])


def _layer_keys(table: pd.DataFrame, every: bool = False) -> list[tuple[str, int]]:
    """Of every row, or the different ones in the order of the table."""
    if "layer" not in table:
        return []
    named = table[["layer"]].assign(stack=table["stack"].astype(str) if "stack" in table else "")
    shown = named if every else named.drop_duplicates()
    return [(stack, int(n)) for stack, n in zip(shown["stack"], shown["layer"], strict=True)]


def spread(n: int) -> list[int]:
    """At most so many of n places, evenly spread, with both ends."""
    places = np.linspace(0, n - 1, min(n, MOST_PANELS)).round().astype(int)
    return np.unique(places).tolist()


def rows_where(table: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    for column, value in equal.items():
        table = table[table[column] == value] if column in table else table[:0]
    return table


def values_of(table: pd.DataFrame, column: str) -> list[Any]:
    return table[column].drop_duplicates().tolist() if column in table else []


def in_words(name: str) -> str:
    return name.replace("_", " ")


def _is_drawable(rows: pd.DataFrame, column: str) -> bool:
    return column in rows and bool(rows[column].notna().any())


def line_of(
    layers: Layers,
    rows: pd.DataFrame,
    column: str,
    label: str,
    shade: str,
    dash: Any = "-",
    ahead: int = 0,
) -> list[Line]:
    """By layer, or `ahead` layers later; none where there is nothing to draw."""
    if not _is_drawable(rows, column):
        return []
    return [Line(layers.places(rows) + ahead, rows[column].to_numpy(float), label, shade, dash)]


def lines_by_phase(rows: pd.DataFrame, layers: Layers, column: str, around: str = "") -> list[Line]:
    """A line per phase, with a band as wide as the column `around` says."""
    lines: list[Line] = []
    for phase, shade in PHASES.items():
        chosen = rows_where(rows, phase=phase)
        if _is_drawable(chosen, column):
            x, y = layers.places(chosen), chosen[column].to_numpy(float)
            off = chosen[around].to_numpy(float) if around in chosen else None
            band = (None, None) if off is None else (y - off, y + off)
            lines.append(Line(x, y, PHASE_NAMES[phase], shade, "-", *band))
    return lines


def mean_line(
    rows: pd.DataFrame,
    by: str,
    column: str,
    label: str,
    shade: str,
    low: str = "",
    high: str = "",
) -> list[Line]:
    """The mean over layers, with a band: between the two columns, or from the lowest layer to the highest."""
    if not _is_drawable(rows, column):
        return []
    groups = rows.groupby(by)
    mean = groups[column].mean()
    below, above = groups[column].min(), groups[column].max()
    if low and high:
        below, above = groups[low].mean(), groups[high].mean()
    band = (below.to_numpy(float), above.to_numpy(float))
    return [
        Line(mean.index.to_numpy(float), mean.to_numpy(), label, shade, low=band[0], high=band[1])
    ]


def expert_axis(of: str = "") -> Axis:
    return Axis(f"expert id{of}", whole=True)


def vector_of(rows: pd.DataFrame, column: str, n_experts: int, fill: float = 0.0) -> NDArray[Any]:
    values_E = np.full(n_experts, fill)
    if len(rows):
        values_E[rows["expert"].to_numpy(int)] = rows[column].to_numpy(float)
    return values_E


def matrix_of(
    rows: pd.DataFrame, down: tuple[str, int], across: tuple[str, int], column: str, fill: float
) -> NDArray[Any]:
    values = np.full((down[1], across[1]), fill)
    values[rows[down[0]].to_numpy(int), rows[across[0]].to_numpy(int)] = rows[column].to_numpy(
        float
    )
    return values


def shares_along(counts: NDArray[Any], axis: int) -> NDArray[Any]:
    total = counts.sum(axis=axis, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def log2_ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[Any]:
    """Within the ends of the colour scale; NaN where there is nothing to compare with."""
    ratio = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return np.log2(np.clip(ratio, 2**-LIFT_BITS, 2**LIFT_BITS))


def colours_of(shares: Sequence[NDArray[Any]], label: str) -> Colours:
    """From nothing to nearly the largest share; small ones are spread by their root."""
    finite = np.concatenate([share[np.isfinite(share)] for share in shares] or [np.ones(1)])
    top = float(np.quantile(finite, TOP_SHARE, method="higher"))
    return Colours(label, 0.0, top, power=0.5, extend="max" if finite.max() > top else "neither")


def signed_colours(label: str) -> Colours:
    return Colours(label, -LIFT_BITS, LIFT_BITS, "signed", extend="both")
