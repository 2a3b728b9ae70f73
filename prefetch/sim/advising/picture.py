"""The one figure of an advice: time per token against the GPU's memory, the best way of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from prefetch.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    Axis,
    Dash,
    Line,
    Lines,
    Mark,
    draw,
)
from prefetch.sim.advising.study import GIB, Study
from prefetch.sim.advising.ways import AHEAD, KINDS
from prefetch.sim.memory import bytes_of
from prefetch.sim.settings.placement import BOTH, CACHE, HOST
from prefetch.sim.tables.grid import SPLIT

LOOKS: dict[str, tuple[str, Dash]] = {
    SPLIT: (ORANGE, "-"),
    HOST: (PURPLE, "-"),
    BOTH: (SKY, "-"),
    CACHE: (BLUE, "-"),
    AHEAD: (GREEN, "--"),
}
SHAPE = (6.6, 3.8)  # inches
MARGIN = 1.15  # of the axis, beyond the slowest


def tpot_by_memory(study: Study, folder: Path, note: str) -> list[Path]:
    """A way may leave memory unused: its line never rises."""
    whole = study.bench.share(1.0).whole_model_bytes  # beyond it nothing changes
    most_bytes = min(whole, study.bench.hardware.device.memory_bytes)
    table = study.within(max(most_bytes, bytes_of(study.memory.amount)))
    lines, most = list[Line](), 0.0
    for kind in KINDS[1:]:  # with all experts resident no memory changes the time: that is a mark
        rows = _falling(table[table.way == kind])
        if not len(rows):
            continue
        shade, dash = LOOKS[kind]
        x, y = rows.memory_bytes / GIB, rows.tpot_ms
        low, high = rows.tpot_ms_low, rows.tpot_ms_high
        if not np.isfinite([low, high]).all():  # no interval: one request, or several at once
            low = high = y
        lines.append(Line(x, y, kind, shade, dash, dots=True, low=low, high=high))
        most = max(most, float(y.max()))
    mine = bytes_of(study.memory.amount) / GIB
    lines.append(
        Line([mine, mine], [0, most * MARGIN], f"your {mine:.4g} GiB", GREY, "--", dots=False)
    )
    full_ms = study.bench.full_ns / 1e6
    marks = (Mark(full_ms, "all experts resident", ":"),)
    y_axis = Axis("ms per token", low=0, high=most * MARGIN)
    panel = Lines(
        "Best way of each kind",
        Axis("memory of the GPU that may be used (GiB)"),
        y_axis,
        lines,
        marks,
    )
    title = f"{study.bench.card.name} on {study.bench.hardware.name}"
    return draw(folder / "tpot_by_memory", title, [panel], note=note, panel_size=SHAPE)


def _falling(rows: pd.DataFrame) -> pd.DataFrame:
    """By memory, each as fast as the fastest with no more."""
    best = rows.sort_values("tpot_ms").drop_duplicates("memory_bytes").sort_values("memory_bytes")
    columns = ["tpot_ms", "tpot_ms_low", "tpot_ms_high"]
    best = best[["memory_bytes", *columns]].reset_index(drop=True)
    for i in range(1, len(best)):
        if best.tpot_ms[i] > best.tpot_ms[i - 1]:
            best.loc[i, columns] = best.loc[i - 1, columns]
    return best
