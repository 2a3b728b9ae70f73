"""The figures of a profile: time, parts, distance from the bound, memory, copies, use of experts.

They look as `prefetch.figures` says, and count nothing. Where values span decades an axis is logarithmic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefetch.engine.profiling import words
from prefetch.engine.profiling.copies import CopyFit
from prefetch.engine.profiling.operations import DENSE, GROUPED, LOOP, OURS, PRODUCT, TORCH
from prefetch.engine.profiling.rows import Rows
from prefetch.engine.profiling.told import Told, shares
from prefetch.engine.profiling.utilisation import Load
from prefetch.engine.profiling.work import (
    BACKWARD,
    COMBINE,
    DISPATCH,
    EXPERTS,
    FORWARD,
    LAYER,
    PARTS,
    ROUTER,
)
from prefetch.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Axis,
    Dash,
    Key,
    Line,
    Lines,
    Mark,
    draw,
)
from prefetch.sim.tables.panels import Stacked

LOOKS = {OURS: BLUE, LOOP: GREY, GROUPED: GREEN, DENSE: ORANGE, PRODUCT: VERMILLION, TORCH: PURPLE}
PART_LOOKS = {ROUTER: PURPLE, DISPATCH: ORANGE, EXPERTS: BLUE, COMBINE: GREEN, LAYER: BLACK}
SIZE, WIDE = (3.6, 2.8), (4.4, 2.8)  # inches
AIR = 1.6  # round the values of a logarithmic axis
MOST_TRACED = 3  # layers of a trace in a figure


@dataclass(frozen=True, eq=False, kw_only=True)
class LogLines(Lines):
    """Lines over decades. Numbers on its axes are said by `x_words` and `y_words`."""

    x_words: Any = None  # None: the axis has names
    y_words: Any = words.digits

    def paint(self, axes: Any) -> None:
        super().paint(axes)
        y = [*(line.y for line in self.lines), [mark.value for mark in self.marks]]
        _decades(axes, "y", y, self.y_words)
        if self.x_words is not None:
            _decades(axes, "x", [line.x for line in self.lines], self.x_words, base=2)


def _decades(axes: Any, which: str, values: Sequence[Any], say: Any, base: int = 10) -> None:
    """A logarithmic axis round all values; only whole powers are named."""
    found = np.concatenate([np.asarray(part, float) for part in values])
    found = found[np.isfinite(found) & (found > 0)]
    if not len(found):
        return
    getattr(axes, f"set_{which}scale")("log", base=base)
    getattr(axes, f"set_{which}lim")(found.min() / AIR, found.max() * AIR)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(lambda value, _: say(value))
    axis.set_minor_formatter(lambda value, _: "")


def draw_all(
    told: Told, loads: Sequence[Load], copies: pd.DataFrame, fits: dict[str, CopyFit], folder: Path
) -> list[Path]:
    """Every figure as SVG and PNG."""
    note = f"Measured on {told.device}; {told.rows.words}."
    return [
        *layer_time(told.rows, folder, note),
        *of_bound(told.rows, folder, note),
        *parts_of_layer(told.rows, folder, note),
        *memory(told, folder, note),
        *copy_time(copies, fits, folder, f"Measured on {told.device}."),
        *expert_load(told, loads, folder),
    ]


def layer_time(rows: Rows, folder: Path, note: str) -> list[Path]:
    """Forward, and backward where somebody has it, by tokens; the bound below them."""
    panels = []
    for direction in (FORWARD, BACKWARD):
        main = rows.main[(rows.main.part == LAYER) & (rows.main.direction == direction)]
        if main.empty:
            continue
        names, place = _places(main.tokens)
        lines = [
            _line(part, place, part.median_ns / 1e6, name, low=part.p25_ns, high=part.p75_ns)
            for name, part in _by(main)
        ]
        bound = main.drop_duplicates("tokens").sort_values("tokens")
        bound_ms = _sorted(bound, bound.bound_ns / 1e6)
        lines.append(Line(_at(bound, place), bound_ms, "roofline bound", BLACK, ":"))
        panels.append(
            LogLines(
                f"One layer, {direction}",
                Axis("tokens of a step", names=names),
                Axis("time (ms)"),
                lines,
            )
        )
    return draw(
        folder / "layer_time",
        "Time of one MoE layer",
        panels,
        columns=2,
        note=note,
        panel_size=SIZE,
    )


def of_bound(rows: Rows, folder: Path, note: str) -> list[Path]:
    """How near to the device's limits each part of ours comes, and each whole layer."""
    forward = rows.main[rows.main.direction == FORWARD]
    names, place = _places(forward.tokens)
    ours = forward[forward.implementation == OURS]
    parts = [
        Line(_at(part, place), _sorted(part, 100 * part.of_bound), name, PART_LOOKS[name], "--")
        for name, part in ((name, ours[ours.part == name]) for name in PARTS)
        if len(part)
    ]
    layers = [
        _line(part, place, 100 * part.of_bound, name)
        for name, part in _by(forward[forward.part == LAYER])
    ]
    full = (Mark(100.0, "the bound", ":"),)
    x = Axis("tokens of a step", names=names)
    y = Axis("bound / time (%)", low=0)
    panels = [
        Lines("Parts of our layer", x, y, parts, full),
        Lines("Whole layers", x, y, layers, full),
    ]
    return draw(
        folder / "of_bound",
        "How much of the roofline bound is reached",
        panels,
        columns=2,
        note=note,
        panel_size=SIZE,
    )


def parts_of_layer(rows: Rows, folder: Path, note: str) -> list[Path]:
    """Where the time of our layer goes."""
    tokens = sorted({int(n) for n in rows.main[rows.main.part == LAYER].tokens})
    found = {n: said for n in tokens if (said := shares(rows, n))}
    if not found:
        return []
    kinds = [Key(part, PART_LOOKS[part], shape="bar") for part in PARTS if part != LAYER]
    parts_KN = np.array(
        [[100 * said.get(kind.label, 0.0) for said in found.values()] for kind in kinds]
    )
    panel = Stacked(
        "Parts of our layer",
        Axis("of the whole layer's time (%)", low=0),
        Axis("tokens of a step"),
        marks=(Mark(100.0, "the layer in one call", ":", upright=True),),
        names=[f"{n:,}" for n in found],
        parts_KN=parts_KN,
        kinds=kinds,
    )
    extra = " Parts are timed one by one, each with cold caches: together they may take longer than the layer."
    return draw(
        folder / "parts_of_layer",
        "Where the time of a layer goes",
        [panel],
        note=note + extra,
        panel_size=(6, 2.8),
    )


def memory(told: Told, folder: Path, note: str) -> list[Path]:
    """Peaks as measured, predictions as dashes, and the memory that there is."""
    rows = told.rows.table
    is_main = (
        (rows.part == LAYER) & (rows.direction == FORWARD) & (rows.routing == told.rows.routing)
    )
    for name, value in told.rows.sizes.items():
        is_main &= rows[name] == value
    main = rows[is_main]
    names, place = _places(main.tokens)
    lines = list[Line]()
    for name, part in _by(main):
        ran, told_bytes = part[part.peak_bytes.notna()], part[part.predicted_bytes.notna()]
        lines.append(_line(ran, place, ran.peak_bytes / 2**20, name))
        if len(told_bytes):
            shade = LOOKS[name]
            y = _sorted(told_bytes, told_bytes.predicted_bytes / 2**20)
            lines.append(Line(_at(told_bytes, place), y, f"{name}, predicted", shade, "--"))
    free = (Mark(told.room_bytes / 2**20, "memory that may be used"),)
    panel = LogLines(
        "Beside experts and tokens",
        Axis("tokens of a step", names=names),
        Axis("peak memory (MiB)"),
        lines,
        free,
    )
    return draw(
        folder / "memory",
        "Memory of one MoE layer, forward",
        [panel],
        note=note,
        panel_size=(6, 3.4),
    )


def copy_time(
    copies: pd.DataFrame, fits: dict[str, CopyFit], folder: Path, note: str
) -> list[Path]:
    """As measured, with quartiles, and what the fit says."""
    time_lines, rate_lines = list[Line](), list[Line]()
    for (kind, rows), shade in zip(
        copies.groupby("kind", sort=False), (BLUE, VERMILLION), strict=False
    ):
        fit, x = fits[str(kind)], rows.bytes.to_numpy()
        fine = np.geomspace(x.min(), x.max(), 200)
        fitted_us = np.array([fit.ns(round(n)) for n in fine]) / 1e3
        measured_us = rows.median_ns.astype(float) / 1e3
        time_lines += [
            Line(
                x,
                measured_us,
                f"{kind}, measured",
                shade,
                "none",
                low=rows.p25_ns / 1e3,
                high=rows.p75_ns / 1e3,
            ),
            Line(fine, fitted_us, f"{kind}, fitted", shade, "-", dots=False),
        ]
        rate_lines += [
            Line(x, x / measured_us / 1e3, f"{kind}, measured", shade, "none"),
            Line(fine, fine / fitted_us / 1e3, f"{kind}, fitted", shade, "-", dots=False),
        ]
    x_axis = Axis("size of the copy")
    panels = [
        LogLines("Time", x_axis, Axis("time (us)"), time_lines, x_words=words.size),
        LogLines("Rate", x_axis, Axis("rate (GB/s)"), rate_lines, x_words=words.size),
    ]
    return draw(
        folder / "copies", "Copies to the device", panels, columns=2, note=note, panel_size=WIDE
    )


def expert_load(told: Told, loads: Sequence[Load], folder: Path) -> list[Path]:
    """Shares of the choices, the most used expert first: what was drawn, and layers of the trace."""
    sizes, large = told.rows.sizes, told.rows.large
    drawn = [
        load
        for load in loads
        if load.layer is None
        and (len(load.counts_E), load.top_k, load.tokens)
        == (sizes["experts"], sizes["top_k"], large)
    ]
    traced = [load for load in loads if load.layer is not None]
    panels = [
        _loads(f"Drawn, {words.tokens(large)}", drawn, [load.source for load in drawn], "-"),
        _loads("Trace", few := _few(traced), [f"layer {load.layer}" for load in few], "--"),
    ]
    shown = [panel for panel in panels if panel is not None]
    note = (
        f"Trace of {traced[0].source}, {words.tokens(traced[0].tokens)}."
        if traced
        else "No trace in the store."
    )
    return draw(
        folder / "expert_load",
        "How evenly experts are used",
        shown,
        columns=2,
        note=note,
        panel_size=SIZE,
    )


def _loads(title: str, loads: Sequence[Load], names: Sequence[str], dash: Dash) -> Lines | None:
    if not loads:
        return None
    lines = [
        Line(np.arange(1, len(load.shares_E) + 1), 100 * load.shares_E, name, shade, dash)
        for load, name, shade in zip(loads, names, (BLUE, VERMILLION, GREEN), strict=False)
    ]
    even = Mark(100 / len(loads[0].counts_E), "even use", ":")
    return Lines(
        title,
        Axis("experts, the most used first", whole=True),
        Axis("of the choices (%)", low=0),
        lines,
        (even,),
    )


def _few(loads: Sequence[Load]) -> list[Load]:
    """The first, the middle and the last layer."""
    if len(loads) <= MOST_TRACED:
        return list(loads)
    return [loads[0], loads[len(loads) // 2], loads[-1]]


def _places(tokens: pd.Series) -> tuple[tuple[str, ...], dict[int, int]]:
    found = sorted({int(n) for n in tokens})
    return tuple(map(_short, found)), {n: i for i, n in enumerate(found)}


def _short(n: int) -> str:
    """4k for 4096: three characters stand upright under an axis."""
    return f"{n // 1024}k" if n and n % 1024 == 0 else str(n)


def _sorted(rows: pd.DataFrame, y: pd.Series) -> Any:
    """By tokens, as plain numbers."""
    return y.astype(float).iloc[rows.tokens.argsort()].to_numpy()


def _at(rows: pd.DataFrame, place: dict[int, int]) -> Any:
    return rows.sort_values("tokens").tokens.map(place).to_numpy()


def _line(rows: pd.DataFrame, place: dict[int, int], y: pd.Series, name: str, **band: Any) -> Line:
    ends = {end: _sorted(rows, of / 1e6) for end, of in band.items()}
    return Line(_at(rows, place), _sorted(rows, y), name, LOOKS[name], **ends)


def _by(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Implementations in the order of their looks."""
    there = set(rows.implementation)
    return [(name, rows[rows.implementation == name]) for name in LOOKS if name in there]
