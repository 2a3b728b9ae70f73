"""The figures of a diagnosis: where the time goes, how near to the roofline, how long each passage took.

They look as `prefetch.figures` says, and count nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.device.diagnosis import Diagnosis
from analysis.device.operations import Operation
from analysis.device.plain_text import one_line
from analysis.device.roofline import COMPUTE, MEMORY, PRODUCTS, Peaks
from prefetch.figures import (
    BLACK,
    BLUE,
    CATEGORIES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Axis,
    Bars,
    Dash,
    Key,
    Line,
    Lines,
    Mark,
    draw,
)
from prefetch.sim.tables.panels import Stacked

LOOKS = {
    "up": BLUE, "down": SKY, "experts": BLUE, "gemm": SKY, "router": BLACK, "routing": ORANGE, "prepare": YELLOW,
    "permute": "#A6761D", "activation": PURPLE, "combine": GREEN, "dispatch": VERMILLION, "collect": "#8C2D04",
    "other": GREY,
}  # fmt: skip
REST = Key("not MoE", "#CFCFCF", shape="bar")
BOUNDS = [
    Key("memory bound", BLUE, shape="bar"),
    Key("compute bound", ORANGE, shape="bar"),
    Key("anomaly: over 100 %", VERMILLION, shape="bar"),
]
MOST_OPERATIONS = 8
AIR = 1.5  # round the values of a logarithmic axis
DASHES: tuple[Dash, ...] = ("-", "--", ":")


class Decades(Lines):
    """Both axes span decades."""

    def paint(self, axes: Any) -> None:
        super().paint(axes)
        for which in ("x", "y"):
            found = np.concatenate([np.asarray(getattr(line, which), float) for line in self.lines])
            getattr(axes, f"set_{which}scale")("log")
            getattr(axes, f"set_{which}lim")(found.min() / AIR, found.max() * AIR)
            axis = getattr(axes, f"{which}axis")
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(_some_digits)


def _some_digits(value: float, _: int) -> str:
    """Of the ticks between decades those at two and five: an axis of one decade has two labels more."""
    first = f"{value:e}"[0]
    return f"{value:g}" if first in "25" else ""


def draw_all(found: Diagnosis, folder: Path) -> list[Path]:
    """Those that have something to show."""
    drawn = list[Path]()
    if found.operations:
        drawn += time_by_role(found, folder)
        drawn += efficiency(found, folder)
    if len(found.layer_us) > 1:
        drawn += by_passage(found, folder)
    if found.peaks is not None:
        drawn += roofline(found.operations, found.peaks, folder)
    return drawn


def time_by_role(found: Diagnosis, folder: Path) -> list[Path]:
    """One bar: what is MoE of all kernel time, and what of the MoE time is what."""
    per_role: dict[str, float] = {}
    for op in found.operations:
        per_role[op.role] = per_role.get(op.role, 0.0) + op.time_ns / 1e6
    kinds = [Key(role, LOOKS.get(role, GREY), shape="bar") for role in per_role]
    parts = np.array([[ms] for ms in per_role.values()])
    if found.times is not None:
        kinds.append(REST)
        rest = (found.times.kernel_ns - found.times.moe_kernel_ns) / 1e6
        parts = np.vstack([parts, [[rest]]])
    panel = Stacked(
        found.times.sum_of.capitalize() if found.times is not None else "MoE kernel time",
        Axis("time (ms)", low=0),
        Axis(""),
        names=["profile"],
        parts_KN=parts,
        kinds=kinds,
    )
    return draw(
        folder / "time", "Where the time goes", [panel], note=note(found), panel_size=(6, 1.2)
    )


def efficiency(found: Diagnosis, folder: Path) -> list[Path]:
    """Roofline over measured time of the longest operations; over 100 % is an anomaly."""
    shown = [op for op in found.operations if op.judged is not None][:MOST_OPERATIONS]
    if not shown:
        return []
    judged = [op.judged for op in shown if op.judged is not None]
    looks = {MEMORY: BOUNDS[0].label, COMPUTE: BOUNDS[1].label}
    panel = Bars(
        "Operations, the longest first",
        Axis("", names=tuple(_short(op, shown) for op in shown)),
        Axis("roofline / time (%)", low=0),
        marks=(Mark(40.0, "40 %: a bottleneck below, if long", ":"), Mark(100.0, "the roofline")),
        heights_E=np.array([100 * one.efficiency for one in judged]),
        kind_E=[BOUNDS[2].label if one.is_anomaly else looks[one.bound] for one in judged],
        kinds=BOUNDS,
    )
    title = "How near to the hardware's limit"
    return draw(folder / "efficiency", title, [panel], note=note(found), panel_size=(6, 2.8))


def _short(op: Operation, shown: Sequence[Operation]) -> str:
    """The role, numbered where several operations have it."""
    same = [other for other in shown if other.role == op.role]
    return op.role if len(same) == 1 else f"{op.role} {same.index(op) + 1}"


def by_passage(found: Diagnosis, folder: Path) -> list[Path]:
    us = found.layer_us.time_us.to_numpy()
    panel = Lines(
        "MoE work of each passage",
        Axis("passage through a MoE layer, in order of time", whole=True),
        Axis("time (µs)", low=0),
        [Line(np.arange(len(us)), us, "", BLUE, dots=len(us) <= 64)],
        (Mark(float(np.median(us)), "median"),),
    )
    return draw(
        folder / "passages",
        "Time of each MoE layer",
        [panel],
        note=note(found),
        panel_size=(6, 2.6),
    )


def roofline(operations: Sequence[Operation], peaks: Peaks, folder: Path) -> list[Path]:
    """Achieved rate of the expert products by their intensity."""
    shown = [op for op in operations if op.role in PRODUCTS and _has_place(op)]
    if not shown:
        return []
    x = np.array([op.judged.cost.flops / op.judged.cost.n_bytes for op in shown if op.judged])
    ran = sorted({op.judged.ran_in for op in shown if op.judged})
    ridges = [rate[0] / peaks.bytes_per_s for kind in ran if (rate := peaks.rate(kind)) is not None]
    most = max(x.max() * 5, *(2 * ridge for ridge in ridges))  # where the roof is flat
    span = np.geomspace(x.min() / 5, most, 100)
    limits = [_limit(span, kind, peaks, dash) for kind, dash in zip(ran, DASHES, strict=False)]
    colours = itertools.cycle(CATEGORIES)  # several may have one role
    points = [
        _point(float(at), op, _short(op, shown), colour)
        for at, op, colour in zip(x, shown, colours, strict=False)
    ]
    axes = Axis("operations per byte"), Axis("TFLOP/s")
    panel = Decades(one_line(peaks.name), *axes, [*limits, *points])
    told = f"Peaks: {peaks.source}."
    return draw(folder / "roofline", "Roofline", [panel], note=told, panel_size=(5, 3.2))


def _has_place(op: Operation) -> bool:
    """Axes of decades have no nought."""
    return op.judged is not None and min(op.judged.cost.flops, op.judged.cost.n_bytes) > 0


def _limit(span: NDArray[np.float64], kind: str, peaks: Peaks, dash: Dash) -> Line:
    rate = peaks.rate(kind)
    assert rate is not None, "something ran in it"
    y = np.minimum(span * peaks.bytes_per_s, rate[0]) / 1e12
    return Line(span, y, f"limit, {kind}", GREY, dash, dots=False)


def _point(intensity: float, op: Operation, name: str, colour: str) -> Line:
    assert op.judged is not None
    at = [intensity], [op.judged.cost.flops / op.mean_ns / 1e3]
    return Line(*at, name, colour, "none", dots=True)


def note(found: Diagnosis) -> str:
    against = f" Peaks: {found.peaks.name}, {found.peaks.source}." if found.peaks else ""
    return one_line(f"{Path(found.source).name}, status {found.status}.{against}")
