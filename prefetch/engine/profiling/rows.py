"""The table of a profile: its columns, what stands beside every time, and how sentences find a row in it.

It measures nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from prefetch.engine.profiling.grid import UNIFORM, Cell
from prefetch.engine.profiling.operations import LOOP, OURS
from prefetch.engine.profiling.work import BACKWARD, FORWARD, LAYER

CELL = [entry.name for entry in dataclasses.fields(Cell)]
SIZES = [name for name in CELL if name not in ("tokens", "routing")]
NUMBERS = (
    "distinct_experts", "median_ns", "p25_ns", "p75_ns", "fastest_ns", "calls", "bytes", "flops", "bound_ns",
    "peak_bytes", "predicted_bytes",
)  # fmt: skip
OTHERS = ("place", "path", "busiest_share", "bound_by", "dropped_share", "deviation")


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Beside every time: which part of it the bound is, and how many times the reference of its cell it is. Ours is
    the reference; backward, where there is no ours, the loop."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *NUMBERS, *OTHERS])))
    table = table.astype(dict.fromkeys(NUMBERS, "Int64"))
    table["of_bound"] = (table.bound_ns / table.median_ns).astype("Float64")
    is_reference = (table.implementation == OURS) & (table.direction == FORWARD)
    is_reference |= (table.implementation == LOOP) & (table.direction == BACKWARD)
    keys = [*CELL, "part", "direction"]
    reference = table[is_reference][[*keys, "implementation", "median_ns"]]
    names = {"implementation": "reference", "median_ns": "reference_ns"}
    table = table.merge(reference.rename(columns=names), on=keys, how="left")
    table["times_reference"] = (table.median_ns / table.reference_ns).astype("Float64")
    return table.drop(columns="reference_ns")


def most(rows: pd.DataFrame, column: str) -> pd.Series:
    """The row with the largest value; of equals the first."""
    return rows.iloc[int(np.nanargmax(rows[column].to_numpy(float, na_value=np.nan)))]


def least(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.iloc[int(np.nanargmin(rows[column].to_numpy(float, na_value=np.nan)))]


class Rows:
    """The rows that ran. `main` are those of the headline: most experts, then most choices, largest sizes, uniform."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.ran = table[table.median_ns.notna()]
        layers = self.of(LAYER, OURS)
        if layers.empty:
            reasons = table[(table.part == LAYER) & (table.implementation == OURS)].status
            raise LookupError(
                f"no layer of ours ran: {reasons.iloc[0] if len(reasons) else 'none was asked for'}"
            )
        order = ["experts", "top_k", "hidden", "inner"]
        best = layers.sort_values(order, kind="stable").iloc[-1]
        self.sizes = {name: best[name] for name in SIZES}
        routings = layers.routing.unique()
        self.routing = UNIFORM if UNIFORM in routings else str(routings[0])
        self.main = self._same(self.ran)
        tokens = self._same(layers).tokens
        self.small, self.large = int(tokens.min()), int(tokens.max())

    def of(self, part: str, implementation: str, direction: str = FORWARD) -> pd.DataFrame:
        """Every row that ran of this operation."""
        rows = self.ran
        is_one = (rows.part == part) & (rows.implementation == implementation)
        return rows[is_one & (rows.direction == direction)]

    def one(
        self, part: str, tokens: int, implementation: str = OURS, direction: str = FORWARD
    ) -> pd.Series | None:
        """The headline's row of an operation at a number of tokens; None = it did not run."""
        rows = self._same(self.of(part, implementation, direction))
        rows = rows[rows.tokens == tokens]
        return rows.iloc[0] if len(rows) else None

    @property
    def spread(self) -> pd.Series:
        """Of every row that ran: how far its quartiles are apart, as a share of its median."""
        return ((self.ran.p75_ns - self.ran.p25_ns) / self.ran.median_ns).astype(float)

    @property
    def ends(self) -> list[int]:
        """The fewest and the most tokens."""
        return list(dict.fromkeys([self.small, self.large]))

    @property
    def words(self) -> str:
        """Which layer the headline is about."""
        sizes = self.sizes
        return (
            f"{sizes['experts']} experts, k={sizes['top_k']}, hidden {sizes['hidden']}, inner {sizes['inner']}, "
            f"{sizes['dtype']}, {self.routing} routing"
        )

    def _same(self, rows: pd.DataFrame) -> pd.DataFrame:
        is_same = rows.routing == self.routing
        for name, value in self.sizes.items():
            is_same &= rows[name] == value
        return rows[is_same]
