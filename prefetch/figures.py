"""How every figure of the project looks, and the only file that imports matplotlib: panels in, SVG and PNG out.

It knows no table and no stage: who draws says what the numbers are. The same panels give the same bytes, whatever the
user's own matplotlib settings. N lines, P points, E bars.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, PowerNorm, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, StepPatch
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from matplotlib.transforms import Bbox, ScaledTranslation
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's eight (2008): told apart by every kind of colour vision
BLACK, BLUE, VERMILLION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, YELLOW = "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
GREY, NO_DATA = "#6E6E6E", "#DDDDDD"
MAPS = {"sequential": "viridis", "signed": "PuOr_r", "ordered": "viridis"}
UNDER_LABELS = 0.42  # inches from the axes to a legend under them
MOST_CELLS = 256  # in a row; more are too thin for pixels, and their mean is shown
Dash = Literal["-", "--", ":", "none"]
DPI, PAD = 120, 0.08  # pixels in an inch; inches round what stands above and below the panels
BAND, FEW_POINTS = 0.18, 16  # opacity; so few are marked by dots
MOST_LABELS, LONGEST_NAME = 12, 15  # on one axis; characters
ROUND = (1, 2, 2.5, 5, 10)  # ticks are multiples of these
HOUSE = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7,
    "text.parse_math": False,  # names come from users and may hold a dollar sign
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # nothing stands above the axes, so nothing need be measured
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.dpi": DPI,
    "svg.fonttype": "none",
    "svg.hashsalt": "expert-prefetch",
}


@dataclass(frozen=True)
class Axis:
    label: str  # with its unit
    names: tuple[str, ...] = ()  # of the places 0, 1, 2, ...
    whole: bool = False  # only whole numbers mean something
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    colour: str
    dash: Dash = "-"
    shape: str = "line"  # line | band | dots | bar


@dataclass(frozen=True)
class Colours:
    """What a colour means; panels with equal ones share a colour bar."""

    label: str
    low: float
    high: float
    kind: str = "sequential"  # sequential | signed | ordered
    power: float = 1.0  # 0.5 shows small values beside large ones
    extend: str = "neither"  # max, both: values beyond the ends exist
    names: tuple[str, ...] = ()

    @property
    def norm(self) -> PowerNorm:
        return PowerNorm(self.power, self.low, max(self.high, self.low + 1e-9))

    @property
    def shades(self) -> Colormap:
        shades = matplotlib.colormaps[MAPS[self.kind]]
        if self.kind == "ordered":  # thin lines of the brightest yellow are hard to see on white
            shades = ListedColormap(shades(np.linspace(0, 0.9, 256)))
        return shades.with_extremes(bad=NO_DATA)


@dataclass(frozen=True)
class Mark:
    """A level that a reader compares with: a grey line across, or upright at a place."""

    value: float
    label: str
    dash: Dash = "--"
    upright: bool = False

    @property
    def key(self) -> Key:
        return Key(self.label, GREY, self.dash)


@dataclass(frozen=True, eq=False)
class Line:
    x: ArrayLike
    y: ArrayLike
    label: str
    colour: str = BLUE
    dash: Dash = "-"
    low: ArrayLike | None = None  # of a shaded band
    high: ArrayLike | None = None
    steps: bool = False
    dots: bool | None = None  # None: if there are few points
    width: float = 1.3
    alpha: float = 1.0  # of the line between the dots

    @property
    def key(self) -> Key:
        shape = "dots" if self.dash == "none" else "line" if self.low is None else "band"
        return Key(self.label, self.colour, self.dash, shape)


@dataclass(frozen=True, eq=False)
class Lines:
    """A panel: one pair of axes with lines and levels. Other panels put something of their own under them."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    colours: Colours | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        parts: list[Line | Mark] = [*self.lines, *self.marks]
        return tuple(dict.fromkeys(part.key for part in parts if part.label))

    def paint(self, axes: Axes) -> None:
        for mark in self.marks:
            level = axes.axvline if mark.upright else axes.axhline
            level(mark.value, color=GREY, linestyle=mark.dash, linewidth=0.9, zorder=1.5)
        for line in self.lines:
            _paint_line(axes, line)
        if self.y.low is not None:  # leaves air above the data, not only below
            axes.dataLim.update_from_data_y(np.array([self.y.low]), ignore=False)
            axes.autoscale_view()
        axes.set(title=plain(self.title), xlabel=plain(self.x.label), ylabel=plain(self.y.label))
        axes.set(xlim=(self.x.low, self.x.high), ylim=(self.y.low, self.y.high))
        _paint_ticks(axes.xaxis, self.x, upright=max(map(len, self.x.names), default=0) > 3)
        _paint_ticks(axes.yaxis, self.y)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bars(Lines):
    """A bar at each of the places 0, 1, 2, ..., coloured by its kind."""

    heights_E: NDArray[Any]
    kind_E: Sequence[str]
    kinds: Sequence[Key]

    @property
    def keys(self) -> tuple[Key, ...]:
        present = {kind for kind in self.kind_E if kind}
        return (*(kind for kind in self.kinds if kind.label in present), *super().keys)

    def paint(self, axes: Axes) -> None:
        kind_E, n = np.asarray(self.kind_E), len(self.heights_E)
        edges = (np.arange(n)[:, None] + [-0.4, 0.4]).ravel()
        for kind in self.kinds:  # one shape each: hundreds take long to draw
            steps = np.full(2 * n - 1, np.nan)
            steps[::2] = np.where(kind_E == kind.label, self.heights_E, np.nan)
            axes.add_artist(StepPatch(steps, edges, color=kind.colour, linewidth=0))
        axes.update_datalim([(-0.5, 0), (n - 0.5, np.nanmax(self.heights_E))])
        axes.autoscale_view()
        super().paint(axes)


@dataclass(frozen=True, eq=False, kw_only=True)
class HeatMap(Lines):
    """A matrix, its first row on top; NaN is grey."""

    values: NDArray[Any]
    colours: Colours
    cuts: Sequence[float] = ()  # between which places of both axes a line stands

    def paint(self, axes: Axes) -> None:
        blur = "nearest" if max(self.values.shape) <= MOST_CELLS else "auto"
        shades, norm = self.colours.shades, self.colours.norm
        axes.imshow(self.values, cmap=shades, norm=norm, interpolation=blur, aspect="auto")
        for cut, line in itertools.product(self.cuts, (axes.axvline, axes.axhline)):
            line(cut, color=BLACK, linewidth=0.6)
        axes.spines[:].set_visible(True)
        super().paint(axes)


def graded(x_P: ArrayLike, y_NP: NDArray[Any], colours: Colours) -> list[Line]:
    """Many lines of one kind, told apart by the shade of their place: a colour bar stands for their legend."""
    dots = None if len(y_NP) <= 8 else False
    shades = [to_hex(shade) for shade in colours.shades(np.linspace(0, 1, len(y_NP)))]
    return [Line(x_P, y, "", c, dots=dots, width=0.9) for y, c in zip(y_NP, shades, strict=True)]


def draw(
    stem: Path,
    title: str,
    panels: Sequence[Lines],
    *,
    columns: int = 3,
    note: str = "",
    panel_size: tuple[float, float] = (3.5, 2.6),
    widths: Sequence[float] | None = None,
) -> list[Path]:
    """Writes `stem`.svg and `stem`.png; nothing, where there are no panels. Sizes are in inches."""
    if not panels:
        return []
    with matplotlib.style.context(["default", HOUSE]):
        rows = -(-len(panels) // columns)
        columns = -(-len(panels) // rows)  # four panels stand two by two
        size = max(5.0, panel_size[0] * columns), panel_size[1] * rows
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)  # measures text
        grid = figure.add_gridspec(rows, columns, width_ratios=widths)
        places = [figure.add_subplot(grid[divmod(i, columns)]) for i in range(len(panels))]
        compose(figure, places, panels, title, note)
        return write(figure, stem)


def compose(
    figure: Figure, places: list[Axes], panels: Sequence[Lines], title: str, note: str
) -> None:
    """Title above, panels, then the shared legend and the note below, each in a strip of its own."""
    for axes, panel in zip(places, panels, strict=True):
        panel.paint(axes)
    _paint_colour_bars(figure, places, panels)
    legend = _paint_legends(figure, places, panels)
    width, height = figure.get_size_inches()
    heading = figure.text(0, 1, _wrap(title, width, 11), fontsize=11, va="top")
    foot = figure.text(0, 0, _wrap(note, width, 7), fontsize=7, color=GREY, va="bottom")
    above, key_height, below = (_inches(p) if p else 0.0 for p in (heading, legend, foot))
    whole = height + above + key_height + below
    figure.set_size_inches(width, whole)
    heading.set(x=PAD / width, y=1 - PAD / whole)
    foot.set(x=PAD / width, y=PAD / whole)
    if legend is not None:
        legend.set_bbox_to_anchor((0.5, (below + PAD) / whole), figure.transFigure)
    room = (0.0, (below + key_height) / whole, 1.0, height / whole)
    ConstrainedLayoutEngine(rect=room, w_pad=0.06, h_pad=0.06).execute(figure)
    for axes in figure.axes:  # the layout's last digits differ from run to run
        axes.set_position(Bbox(axes.get_position(original=True).get_points().round(6)))


def write(figure: Figure, stem: Path) -> list[Path]:
    """Nothing in the files depends on the clock."""
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    for image in figure.findobj(AxesImage):
        image.set_interpolation("none")  # the matrix itself, not what 72 dots per inch leave of it
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return [svg, png]


def plain(text: str) -> str:
    """One line, with a box for every character that the font lacks."""
    font, words = get_font(findfont("DejaVu Sans")), " ".join(text.split())
    has = {c: c.isprintable() and font.get_char_index(ord(c)) for c in set(words)}
    return "".join(c if has[c] else "\u25a1" for c in words)


def _inches(part: Any) -> float:
    """How high a strip it needs; the layout of the panels need not think of it."""
    part.set_in_layout(False)
    return float(part.get_window_extent().height / DPI + 1.5 * PAD)


def _paint_line(axes: Axes, line: Line) -> None:
    is_short = np.size(line.y) <= FEW_POINTS
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=BAND, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        color=to_rgba(line.colour, line.alpha),
        linestyle=line.dash,
        linewidth=line.width,
        drawstyle="steps-mid" if line.steps else "default",
        marker="o" if line.dots or (line.dots is None and is_short) else "none",
        markersize=3.0,
        markeredgewidth=0,
        markerfacecolor=line.colour,
    )


def _paint_ticks(axis: Any, wanted: Axis, upright: bool = False) -> None:
    if wanted.names:
        places = thinned(wanted.names)
        axis.set_ticks(places, [_shortened(wanted.names[i]) for i in places])
        axis.set_tick_params(rotation=90 if upright else 0)
    else:
        axis.set_major_locator(MaxNLocator(7, steps=ROUND, integer=wanted.whole, min_n_ticks=1))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.get_major_formatter().set_scientific(False)


def thinned(names: Sequence[str], most: int = MOST_LABELS) -> list[int]:
    """The places that carry a label: each, or every second, fifth, tenth, ..., at round numbers where there are any."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    step = next(step for step in steps if len(names) <= step * most)
    is_round = (name.isdecimal() and int(name) % step == 0 for name in names[:step])
    first = next((place for place, is_one in enumerate(is_round) if is_one), 0)
    return list(range(first, len(names), step))


def _shortened(name: str) -> str:
    """Cut in the middle: names of one kind often begin alike."""
    if len(name) <= LONGEST_NAME:
        return plain(name)
    half = LONGEST_NAME // 2
    return plain(f"{name[: LONGEST_NAME - half - 1]}…{name[-half:]}")


def _paint_colour_bars(figure: Figure, places: Sequence[Axes], panels: Sequence[Lines]) -> None:
    """One for all panels of a meaning that lie together; else one each."""
    together: dict[Colours, list[Axes]] = {}
    for axes, panel in zip(places, panels, strict=True):
        if panel.colours is not None:
            together.setdefault(panel.colours, []).append(axes)
    for colours, group in together.items():
        for part in [group] if _lie_together(group, places) else [[axes] for axes in group]:
            meaning = ScalarMappable(colours.norm, colours.shades)
            bar = figure.colorbar(meaning, ax=part, extend=colours.extend, pad=0.02, aspect=30)
            bar.set_label(textwrap.fill(plain(colours.label), 30))
            bar.outline.set_linewidth(0)
            if colours.names:
                shown = thinned(colours.names)
                bar.set_ticks(shown, labels=[_shortened(colours.names[i]) for i in shown])


def _lie_together(group: Sequence[Axes], places: Sequence[Axes]) -> bool:
    """No other panel stands in the rectangle round the group."""
    specs = [axes.get_subplotspec() for axes in places]
    cells = np.array([(spec.rowspan.start, spec.colspan.start) for spec in specs if spec])
    own = cells[[axes in group for axes in places]]
    within = (cells >= own.min(axis=0)) & (cells <= own.max(axis=0))
    return int(within.all(axis=1).sum()) == len(group)


def _paint_legends(figure: Figure, places: Sequence[Axes], panels: Sequence[Lines]) -> Any:
    """One under all panels; where one look means two things, what only one panel has stands under that one."""
    often = Counter(key for panel in panels for key in panel.keys)
    looks = {(key.colour, key.dash, key.shape == "bar") for key in often}
    shared = [key for key in often if often[key] > 1 or len(looks) == len(often)]
    for axes, panel in zip(places, panels, strict=True):
        if own := [key for key in panel.keys if key not in shared]:
            under = axes.transAxes + ScaledTranslation(0, -UNDER_LABELS, figure.dpi_scale_trans)
            anchor = {"bbox_to_anchor": (0.5, 0.0), "bbox_transform": under}
            _legend(axes, own, axes.bbox.width, loc="upper center", **anchor)
    return _legend(figure, shared, 0.98 * figure.bbox.width, loc="lower center") if shared else None


def _legend(where: Axes | Figure, keys: Sequence[Key], room: float, **how: Any) -> Legend:
    """As many entries side by side as there is room for, in pixels."""
    handles = [_handle(key) for key in keys]
    for columns in range(len(keys), 0, -1):
        legend = where.legend(handles, ["-"] * len(keys), ncols=columns, borderaxespad=0, **how)
        for text, key in zip(legend.get_texts(), keys, strict=True):
            text.set_text(plain(key.label))  # as a label, a leading underscore would hide it
        if columns == 1 or legend.get_window_extent().width < room:
            break
        legend.remove()
    return legend


def _handle(key: Key) -> Any:
    marker = "o" if key.shape == "dots" else "none"
    line = Line2D([], [], color=key.colour, linestyle=key.dash, marker=marker, markersize=4.0)
    patch = Patch(facecolor=key.colour, linewidth=0, alpha=1.0 if key.shape == "bar" else BAND)
    return {"bar": patch, "band": (patch, line)}.get(key.shape, line)


def _wrap(text: str, width: float, size: float) -> str:
    """Lines that fit the width in inches: a character of the font is at most 0.68 of its size wide, by and large."""
    return "\n".join(textwrap.wrap(plain(text), max(20, int(width * 72 / (0.68 * size)))))
