"""The figures of `analyze` about choices in their order, and what follows from it: one function per picture.

It counts nothing: every number comes from a table, and what a table lacks is not drawn. Of more layers than panels,
evenly spread ones are shown, the first and the last among them. E experts, L layers, D domains, S time slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.panels import (
    PHASE_NAMES,
    RECALL,
    SQUARE,
    WIDE,
    Layers,
    colours_of,
    expert_axis,
    in_words,
    line_of,
    lines_by_phase,
    matrix_of,
    mean_line,
    rows_where,
    shares_along,
    spread,
    values_of,
)
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
    Axis,
    Bars,
    HeatMap,
    Key,
    Line,
    Lines,
    Mark,
    draw,
)

PATH_TOKENS = 64  # of a sampled request
PARTS = {"all": "all test rows", "prefill": "prefill test rows", "decode": "decode test rows"}
PREDICTORS = {
    "popularity": BLUE,
    "previous_token": GREEN,
    "markov": VERMILLION,
    "markov_shuffled": GREY,
}
STATES = {"balanced": BLUE, "overused": VERMILLION, "underused": SKY}
MEASURES = (
    ("normalized_entropy", "Normalised entropy", "entropy / log2 E", None),
    ("effective_experts", "Effective experts", "2^entropy (experts)", 0.0),
    ("active_experts", "Active experts", "experts used at all", 0.0),
    ("coefficient_of_variation", "Coefficient of variation", "std / mean", None),
    ("gini", "Gini coefficient", "0 = even use", None),
    ("max_over_mean", "Busiest expert", "use / mean use", None),
    ("skewness", "Skewness of use", "symmetric = 0", None),
    ("kurtosis", "Excess kurtosis of use", "normal = 0", None),
)
CONDITIONAL, INFORMATION = "conditional_entropy_bits", "mutual_information_bits"
SHUFFLED = "mutual_information_shuffled_bits"


def layer_expert_frequency(load: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    """One picture per layer: use by id, the same by rank, and how much the most used hold."""
    files: list[Path] = []
    layers = Layers.of(load)
    for i in range(len(layers.keys)):
        rows = layers.rows(load, i).sort_values("expert")
        if rows["count"].sum() > 0:
            stem = folder / f"{layers.title(i).lower().replace(' ', '_')}_expert_frequency"
            title, shape = f"{layers.title(i)}: how often each expert is chosen", (4.6, 2.5)
            panels = _frequency_panels(rows)
            files += draw(stem, title, panels, note=note, widths=(2.2, 1), panel_size=shape)
    return files


def _frequency_panels(rows: pd.DataFrame) -> list[Lines]:
    share_E, states = 100 * rows["share"].to_numpy(float), [str(state) for state in rows["state"]]
    falling_E, n, never_E = -np.sort(-share_E), len(rows), np.flatnonzero(rows["count"] == 0)
    never = Line(never_E, np.zeros(len(never_E)), "never chosen", BLACK, "none", dots=True)
    by_rank = Line(range(n), falling_E, "by rank", BLACK, dots=False, steps=True, width=0.8)
    others = [state for state in dict.fromkeys(states) if state not in STATES]
    shades = STATES | dict(zip(others, (PURPLE, ORANGE, GREEN) * len(others), strict=False))
    bars = Bars(
        "By expert",
        Axis("expert id (bars), rank (line)", whole=True, low=-0.7, high=n - 0.3),
        Axis("share of choices (%)", low=-0.02 * falling_E[0], high=1.05 * falling_E[0]),
        (by_rank, never) if len(never_E) else (by_rank,),
        (Mark(100 / n, "uniform use"),),
        heights_E=share_E,
        kind_E=["" if share == 0 else state for share, state in zip(share_E, states, strict=True)],
        kinds=[Key(state, shade, shape="bar") for state, shade in {**shades, "": GREY}.items()],
    )
    x, y = (
        Axis("most used experts", whole=True, low=0, high=n),
        Axis("share held (%)", low=0, high=102),
    )
    held = Line(range(n + 1), [0, *falling_E.cumsum()], "", BLACK, dots=False)
    even = Line([0, n], [0, 100], "uniform use", GREY, "--", dots=False)
    return [bars, Lines("Cumulative share", x, y, (held, even))]


def comparative_layer_statistics(statistics: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    rows = rows_where(statistics, choices="all")
    layers = Layers.of(rows)
    panels = [
        Lines(title, layers.axis(), Axis(unit, whole=low is not None, low=low), lines)
        for column, title, unit, low in MEASURES
        if (lines := lines_by_phase(rows, layers, column))
    ]
    whole = rows_where(rows, phase="all")
    coverage: list[Line] = []
    for percent, shade in ((95, GREEN), (90, PURPLE), (80, ORANGE), (50, SKY)):
        label = f"for {percent} % of choices"
        coverage += line_of(layers, whole, f"coverage_{percent}", label, shade)
    if coverage:
        panels.append(
            Lines("Coverage", layers.axis(), Axis("fewest experts", whole=True, low=0), coverage)
        )
    title = "How evenly each layer uses its experts"
    return draw(folder / "comparative_layer_statistics", title, panels, note=note)


def expert_selection_traces(
    paths: pd.DataFrame, folder: Path, note: str, *, n_experts: int, is_ranked: bool = True
) -> list[Path]:
    """A panel per layer with its own ids: expert 7 of one layer has nothing to do with expert 7 of another.

    is_ranked: weights say which choice is the first; without them it is the one that the source listed first.
    """
    chosen = paths[paths["expert"] >= 0] if "expert" in paths else paths
    layers, shades = Layers.of(chosen), CATEGORIES[:4]
    margin = 0.02 * n_experts + 0.5
    expert = Axis("expert id of this layer", whole=True, low=-margin, high=n_experts - 1 + margin)
    panels: list[Lines] = []
    for i in layers.spread():
        lines = []
        for request, shade in zip(values_of(chosen, "request"), shades, strict=False):
            part = rows_where(layers.rows(chosen, i), request=request)[:PATH_TOKENS]
            x, y, label = part["position"], part["expert"], f"request {request}"
            lines.append(Line(x, y, label, shade, dots=True, width=0.6, alpha=0.4))
        position = Axis("position in the request (tokens)", whole=True)
        panels.append(Lines(layers.title(i), position, expert, lines))
    said = (
        f"At most {PATH_TOKENS} tokens each. Equal ids in two panels are different experts. {note}"
    )
    title = "First choice along sampled requests"
    if not is_ranked:
        said = f"No weights were recorded: the choice that is listed first. {said}"
    return draw(folder / "expert_selection_traces", title, panels, note=said, panel_size=WIDE)


def expert_transition_heatmap(
    counts: Sequence[tuple[int | str, int | str, NDArray[Any]]], folder: Path, note: str
) -> list[Path]:
    """`counts`: layer, next layer, and how often [expert here, expert there] met."""
    shown = [counts[i] for i in spread(len(counts)) if np.any(counts[i][2])]
    shares = [shares_along(np.asarray(counts_EE, float), axis=1) for *_, counts_EE in shown]
    colours = colours_of(shares, "P(expert at next layer | expert at this layer)")
    panels = []
    for (here, there, _), share_EE in zip(shown, shares, strict=True):
        one, next_one = in_words(str(here)), in_words(str(there))
        x, y = expert_axis(f" at layer {next_one}"), expert_axis(f" at layer {one}")
        title = f"Layer {one} to {next_one}"
        panels.append(HeatMap(title, x, y, values=share_EE, colours=colours))
    said = f"Grey rows: experts never chosen. {note}"
    title = "Where choices go from one layer to the next"
    return draw(folder / "expert_transition_heatmap", title, panels, note=said, panel_size=SQUARE)


def expert_usage_timeline(
    timeline: pd.DataFrame, folder: Path, note: str, *, n_experts: int
) -> list[Path]:
    layers, shares = Layers.of(timeline), []
    for i in layers.spread():
        size = ("expert", n_experts), ("slice", int(timeline["slice"].max()) + 1)
        counts_ES = matrix_of(layers.rows(timeline, i), *size, "count", 0.0)
        shares.append(100 * shares_along(counts_ES, axis=0))
    colours = colours_of(shares, "share of slice's choices (%)")
    time = Axis("slice of the trace (in its order)", whole=True)
    panels = [
        HeatMap(layers.title(i), time, expert_axis(), values=share_ES, colours=colours)
        for i, share_ES in zip(layers.spread(), shares, strict=True)
    ]
    title = "Use of every expert over the course of the trace"
    return draw(folder / "expert_usage_timeline", title, panels, note=note, panel_size=SQUARE)


def entropy_by_layer(
    statistics: pd.DataFrame,
    transitions: pd.DataFrame,
    next_token: pd.DataFrame,
    folder: Path,
    note: str,
    *,
    n_experts: int,
    top_k: int,
) -> list[Path]:
    layers, top = Layers.of(statistics), float(np.log2(n_experts))
    marks = (
        Mark(top, f"log2 of {n_experts} experts"),
        Mark(np.log2(top_k), f"log2 of k = {top_k}", ":"),
    )
    panels = []
    for phase, name in PHASE_NAMES.items():
        here, after = (
            rows_where(statistics, phase=phase, choices="all"),
            rows_where(next_token, phase=phase),
        )
        above = rows_where(transitions, phase=phase, horizon=1)
        if len(above):
            control = above[CONDITIONAL] + above[INFORMATION] - above[SHUFFLED]
            above = above.assign(told_nothing=control)
        lines = [
            *line_of(layers, here, "entropy_bits", "entropy", BLACK),
            *line_of(layers, above, CONDITIONAL, "given the layer before", BLUE, ahead=1),
            *line_of(layers, above, "told_nothing", "given it, shuffled", BLUE, "--", ahead=1),
            *line_of(layers, after, CONDITIONAL, "given the token before", VERMILLION),
        ]
        if lines:
            bits = Axis("bits per choice", low=-0.2, high=1.06 * max(1.0, top))
            panels.append(Lines(name.capitalize(), layers.axis(), bits, lines, marks))
    title = "Entropy of a choice: alone, given the layer before, given the token before"
    return draw(folder / "entropy_by_layer", title, panels, note=note, panel_size=WIDE)


def recall_by_horizon(
    recall: pd.DataFrame,
    folder: Path,
    note: str,
    *,
    top_k: int,
    summary: pd.DataFrame | None = None,
) -> list[Path]:
    """`summary`, where there is one: means over layer pairs as `recall_at_k`, with their interval `low` to `high`."""
    means, column = rows_where(recall, width=top_k), "recall"
    if summary is not None and len(summary):
        means, column = summary, "recall_at_k"
    panels = []
    for part in values_of(means, "part"):
        if lines := _recall_lines(rows_where(means, part=part), "horizon", column):
            ahead, name = Axis("horizon (layers ahead)", whole=True), PARTS.get(part, part)
            panels.append(Lines(f"{top_k} guesses: {in_words(name)}", ahead, RECALL, lines))
    first = values_of(recall, "part")[:1]
    wider = [rows_where(recall, part=part, horizon=1) for part in first]
    if lines := [line for rows in wider for line in _recall_lines(rows, "width", "recall")]:
        width, mark = (
            Axis("width (experts guessed)", whole=True),
            Mark(top_k, f"k = {top_k}", ":", True),
        )
        title = f"One layer ahead: {in_words(PARTS.get(first[0], first[0]))}"
        panels.append(Lines(title, width, RECALL, lines, (mark,)))
    said = f"Lines: mean over layer pairs; bands, where there are any: interval. {note}"
    title = "How much of a later layer's choices the counts can guess"
    return draw(folder / "recall_by_horizon", title, panels, note=said, panel_size=WIDE)


def _recall_lines(rows: pd.DataFrame, by: str, column: str) -> list[Line]:
    lines: list[Line] = []
    rows = rows if "low" in rows else rows.assign(low=np.nan, high=np.nan)
    for predictor in values_of(rows, "predictor"):
        label, shade = in_words(predictor), PREDICTORS.get(predictor, ORANGE)
        lines += mean_line(
            rows_where(rows, predictor=predictor), by, column, label, shade, "low", "high"
        )
    return lines


def cache_curves(
    cache: pd.DataFrame, folder: Path, note: str, *, n_experts: int, top_k: int
) -> list[Path]:
    shown = cache.assign(percent=100 * cache["share"]) if "share" in cache else cache
    marks = (
        Mark(100 * top_k / n_experts, f"k = {top_k} of {n_experts} experts", upright=True),
        Mark(25, "a quarter of the experts", ":", upright=True),
    )
    size = Axis("capacity (% of a layer's experts)", low=0, high=101)
    hits = Axis("hit rate (share of accesses)", low=0, high=1.02)
    panels = []
    for phase, name in PHASE_NAMES.items():
        rows = rows_where(shown, phase=phase)
        lines = [
            *mean_line(rows, "percent", "optimal_hit_rate", "optimum (Belady)", BLUE),
            *mean_line(rows, "percent", "lru_hit_rate", "LRU", VERMILLION),
        ]
        if lines:
            panels.append(Lines(name.capitalize(), size, hits, lines, marks))
    said = f"One cache per layer. Lines: mean over layers; bands: from the lowest to the highest. {note}"
    title = "What a cache of every size would hold"
    return draw(folder / "cache_curves", title, panels, note=said, panel_size=WIDE)
