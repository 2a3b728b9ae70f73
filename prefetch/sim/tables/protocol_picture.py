"""The picture of published protocols: hit rates over the cache's size, a panel per predictor. It computes nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prefetch.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILLION,
    Axis,
    Dash,
    Line,
    Lines,
    draw,
)
from prefetch.sim.tables import protocols
from prefetch.sim.tables.panels import share_axis

LOOKS: dict[str, tuple[str, Dash]] = {  # ours last, over the others
    protocols.BESIDE: (ORANGE, "-"),
    protocols.INSTANT: (VERMILLION, "-"),
    protocols.ONE_BY_ONE: (BLUE, "-"),
    protocols.TESTED: (PURPLE, "--"),
    protocols.TRAINED: (GREEN, "--"),
    protocols.OURS: (BLACK, ":"),
}


def published_protocols(table: pd.DataFrame, n_entries: int, folder: Path, note: str) -> list[Path]:
    """`n_entries`: all experts of all layers."""
    y, panels = Axis("hit rate (%)", low=0, high=102), list[Lines]()
    for predictor, rows in table.groupby("predictor", sort=False):
        lines = [
            Line(100 * part.experts / n_entries, 100 * part.hit_rate, name, *look, dots=True)
            for name, look in LOOKS.items()
            if len(part := rows[rows.protocol == name].sort_values("experts"))
        ]
        title = "No guesses" if predictor == "none" else f"Guesses of {predictor}"
        mark = rows[rows.protocol == protocols.OURS]["mark"].iloc[0]
        panels.append(Lines(f"{title} ({mark})" if mark else title, share_axis(), y, lines))
    said = f"LRU. Only the black line asks whether copies arrive. {note}"
    title = "The same guesses, by published protocols"
    return draw(folder / "published_protocols", title, panels, note=said, panel_size=(4.4, 3.0))
