"""The one figure of a validation: predicted against measured time per token, a point per cell."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prefetch.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Axis,
    Line,
    Lines,
    draw,
)

SHADES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
SHAPE = (4.2, 4.2)  # inches
MARGIN = 1.1  # of the axes, beyond the slowest


def predicted_and_measured(table: pd.DataFrame, folder: Path, machine: str) -> list[Path]:
    """Panels by model card, colours by batch; on the line the simulator is right."""
    panels = []
    for name, part in table.groupby("model_card", sort=False):
        high = float(max(part.predicted_ms.max(), part.measured_ms.max())) * MARGIN
        lines = [Line([0, high], [0, high], "equal", GREY, "--", dots=False)]
        for shade, (batch, cells) in zip(SHADES, part.groupby("batch"), strict=False):
            x, y = cells.measured_ms.to_numpy(), cells.predicted_ms.to_numpy()
            lines.append(Line(x, y, f"batch {batch}", shade, "none", dots=True))
        x_axis = Axis("measured ms per token", low=0, high=high)
        y_axis = Axis("predicted ms per token", low=0, high=high)
        panels.append(Lines(str(name), x_axis, y_axis, lines))
    apart = f"runs of a cell {table.engine_spread.median():.1%} apart (median)"
    note = f"{machine}, drawn weights; predictions were written before the runs; {apart}."
    title = "Simulated against measured time per token"
    return draw(folder / "predicted_and_measured", title, panels, note=note, panel_size=SHAPE)
