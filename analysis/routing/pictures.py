"""The figures of `analyze`: one function per picture, from tables to files.

It counts nothing: every number comes from a table, and what a table lacks is not drawn. Of more layers than panels,
evenly spread ones are shown, the first and the last among them. E experts, L layers, D domains, S time slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
    Colours,
    HeatMap,
    Key,
    Line,
    Lines,
    Mark,
    draw,
    graded,
)

MOST_PANELS = 6  # layers of one picture
MOST_CUTS = 24  # more lines between clusters would hide them
PATH_TOKENS = 64  # of a sampled request
TOP_SHARE = (
    0.995  # of the cells lie within the colour scale, so that one expert does not hide the rest
)
LIFT_BITS = 3.0  # ends of the colour scale of log2 lift
PHASES = {"all": BLACK, "prefill": BLUE, "decode": VERMILLION}
PHASE_NAMES = {"all": "all tokens", "prefill": "prefill", "decode": "decode"}
HORIZONS = (GREY, GREEN, PURPLE, ORANGE, SKY)
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
SQUARE, WIDE = (3.4, 3.0), (4.2, 2.6)  # inches of a panel
RECALL = Axis("recall (share of choices)", low=0, high=1.02)


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
    rows = _pick(statistics, choices="all")
    layers = Layers.of(rows)
    panels = [
        Lines(title, layers.axis(), Axis(unit, whole=low is not None, low=low), lines)
        for column, title, unit, low in MEASURES
        if (lines := _by_phase(rows, layers, column))
    ]
    whole = _pick(rows, phase="all")
    coverage: list[Line] = []
    for percent, shade in ((95, GREEN), (90, PURPLE), (80, ORANGE), (50, SKY)):
        label = f"for {percent} % of choices"
        coverage += _line(layers, whole, f"coverage_{percent}", label, shade)
    if coverage:
        panels.append(
            Lines("Coverage", layers.axis(), Axis("fewest experts", whole=True, low=0), coverage)
        )
    title = "How evenly each layer uses its experts"
    return draw(folder / "comparative_layer_statistics", title, panels, note=note)


def expert_selection_traces(
    paths: pd.DataFrame, folder: Path, note: str, *, n_experts: int
) -> list[Path]:
    """A panel per layer with its own ids: expert 7 of one layer has nothing to do with expert 7 of another."""
    chosen = paths[paths["expert"] >= 0] if "expert" in paths else paths
    layers, shades = Layers.of(chosen), CATEGORIES[:4]
    margin = 0.02 * n_experts + 0.5
    expert = Axis("expert id of this layer", whole=True, low=-margin, high=n_experts - 1 + margin)
    panels: list[Lines] = []
    for i in layers.spread():
        lines = []
        for request, shade in zip(_values(chosen, "request"), shades, strict=False):
            part = _pick(layers.rows(chosen, i), request=request)[:PATH_TOKENS]
            x, y, label = part["position"], part["expert"], f"request {request}"
            lines.append(Line(x, y, label, shade, dots=True, width=0.6, alpha=0.4))
        position = Axis("position in the request (tokens)", whole=True)
        panels.append(Lines(layers.title(i), position, expert, lines))
    said = (
        f"At most {PATH_TOKENS} tokens each. Equal ids in two panels are different experts. {note}"
    )
    title = "First choice along sampled requests"
    return draw(folder / "expert_selection_traces", title, panels, note=said, panel_size=WIDE)


def expert_transition_heatmap(
    counts: Sequence[tuple[int | str, int | str, NDArray[Any]]], folder: Path, note: str
) -> list[Path]:
    """`counts`: layer, next layer, and how often [expert here, expert there] met."""
    shown = [counts[i] for i in _spread(len(counts)) if np.any(counts[i][2])]
    shares = [_shares(np.asarray(counts_EE, float), axis=1) for *_, counts_EE in shown]
    colours = _colours(shares, "P(expert at next layer | expert at this layer)")
    panels = []
    for (here, there, _), share_EE in zip(shown, shares, strict=True):
        one, next_one = _words(str(here)), _words(str(there))
        x, y = _experts(f" at layer {next_one}"), _experts(f" at layer {one}")
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
        counts_ES = _matrix(layers.rows(timeline, i), *size, "count", 0.0)
        shares.append(100 * _shares(counts_ES, axis=0))
    colours = _colours(shares, "share of slice's choices (%)")
    time = Axis("slice of the trace (in time)", whole=True)
    panels = [
        HeatMap(layers.title(i), time, _experts(), values=share_ES, colours=colours)
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
        here, after = _pick(statistics, phase=phase, choices="all"), _pick(next_token, phase=phase)
        above = _pick(transitions, phase=phase, horizon=1)
        lines = [
            *_line(layers, here, "entropy_bits", "entropy", BLACK),
            *_line(layers, above, CONDITIONAL, "given the layer before", BLUE, ahead=1),
            *_line(layers, after, CONDITIONAL, "given the token before", VERMILLION),
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
    means, column = _pick(recall, width=top_k), "recall"
    if summary is not None and len(summary):
        means, column = summary, "recall_at_k"
    panels = []
    for part in _values(means, "part"):
        if lines := _recall_lines(_pick(means, part=part), "horizon", column):
            ahead, name = Axis("horizon (layers ahead)", whole=True), PHASE_NAMES.get(part, part)
            panels.append(Lines(f"{top_k} guesses: {_words(name)}", ahead, RECALL, lines))
    first = _values(recall, "part")[:1]
    wider = [_pick(recall, part=part, horizon=1) for part in first]
    if lines := [line for rows in wider for line in _recall_lines(rows, "width", "recall")]:
        width, mark = (
            Axis("width (experts guessed)", whole=True),
            Mark(top_k, f"k = {top_k}", ":", True),
        )
        title = f"One layer ahead: {_words(PHASE_NAMES.get(first[0], first[0]))}"
        panels.append(Lines(title, width, RECALL, lines, (mark,)))
    said = f"Lines: mean over layer pairs; bands, where there are any: interval. {note}"
    title = "How much of a later layer's choices the counts can guess"
    return draw(folder / "recall_by_horizon", title, panels, note=said, panel_size=WIDE)


def _recall_lines(rows: pd.DataFrame, by: str, column: str) -> list[Line]:
    lines: list[Line] = []
    rows = rows if "low" in rows else rows.assign(low=np.nan, high=np.nan)
    for predictor in _values(rows, "predictor"):
        label, shade = _words(predictor), PREDICTORS.get(predictor, ORANGE)
        lines += _mean_line(
            _pick(rows, predictor=predictor), by, column, label, shade, "low", "high"
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
        rows = _pick(shown, phase=phase)
        lines = [
            *_mean_line(rows, "percent", "optimal_hit_rate", "optimum (Belady)", BLUE),
            *_mean_line(rows, "percent", "lru_hit_rate", "LRU", VERMILLION),
        ]
        if lines:
            panels.append(Lines(name.capitalize(), size, hits, lines, marks))
    said = f"One cache per layer. Lines: mean over layers; bands: from the lowest to the highest. {note}"
    title = "What a cache of every size would hold"
    return draw(folder / "cache_curves", title, panels, note=said, panel_size=WIDE)


def domain_usage(
    usage: pd.DataFrame,
    information: pd.DataFrame,
    transfer: pd.DataFrame,
    folder: Path,
    note: str,
    *,
    n_experts: int,
) -> list[Path]:
    domains, layers = _values(usage, "domain"), Layers.of(usage)
    colours = _signed("log2 (share / mean share)")
    panels: list[Lines] = []
    for i in layers.spread() if len(domains) > 1 else ():
        rows = layers.rows(usage, i)
        shares = [_vector(_pick(rows, domain=domain), "share", n_experts) for domain in domains]
        lift_DE = _log2(np.stack(shares), np.mean(shares, axis=0))
        names = Axis("", tuple(str(domain) for domain in domains))
        panels.append(HeatMap(layers.title(i), _experts(), names, values=lift_DE, colours=colours))
    layers = Layers.of(information)
    lines = [
        *_line(layers, information, INFORMATION, "domain and expert", BLUE),
        *_line(layers, information, "shuffled_bits", "domains shuffled", GREY, "--"),
    ]
    if lines:
        bits = Axis("mutual information (bits)")
        panels.append(Lines("What a choice tells of the domain", layers.axis(), bits, lines))
    panels += _transfer_panels(transfer)
    title = "Which experts each domain prefers, and how far guesses carry over"
    return draw(folder / "domain_usage", title, panels, note=note, panel_size=(4.0, 2.8))


def _transfer_panels(transfer: pd.DataFrame) -> list[Lines]:
    both = *_values(transfer, "train_domain"), *_values(transfer, "test_domain")
    place = {name: i for i, name in enumerate(dict.fromkeys(both))}
    names, panels = tuple(str(name) for name in place), list[Lines]()
    for measure in _values(transfer, "measure"):
        rows = _pick(transfer, measure=measure)
        recall_DD = np.full((len(place), len(place)), np.nan)
        cells = rows["train_domain"].map(place), rows["test_domain"].map(place)
        recall_DD[cells] = rows["recall"]
        colours = Colours("recall", 0.0, float(transfer["recall"].max()))
        x, y, title = (
            Axis("scored on", names),
            Axis("counted on", names),
            f"Transfer: {_words(measure)}",
        )
        panels.append(HeatMap(title, x, y, values=recall_DD, colours=colours))
    return panels


def coactivation(
    pairs: pd.DataFrame, clusters: pd.DataFrame, folder: Path, note: str, *, n_experts: int
) -> list[Path]:
    layers, panels = Layers.of(pairs), []
    axis, colours = (
        Axis("experts in order of cluster", whole=True),
        _signed("log2 (together / by chance)"),
    )
    for i in layers.spread():
        cluster_E = _vector(layers.rows(clusters, i), "cluster", n_experts, fill=-1.0)
        order_E = np.argsort(cluster_E, kind="stable")
        cuts = (np.flatnonzero(np.diff(cluster_E[order_E])) + 0.5).tolist()
        size = ("expert_a", n_experts), ("expert_b", n_experts)
        lift_EE = _matrix(layers.rows(pairs, i), *size, "lift", np.nan)
        bits_EE = _log2(np.fmax(lift_EE, lift_EE.T), np.ones(n_experts))[np.ix_(order_E, order_E)]
        cuts = cuts if len(cuts) <= MOST_CUTS else []
        panels.append(
            HeatMap(layers.title(i), axis, axis, values=bits_EE, colours=colours, cuts=cuts)
        )
    said = f"Grey: no such pair in the table. {note}"
    title = "Which experts of a layer are chosen together"
    return draw(folder / "coactivation", title, panels, note=said, panel_size=SQUARE)


def balance_overview(
    health: pd.DataFrame, capacity: pd.DataFrame, folder: Path, note: str
) -> list[Path]:
    layers, windows = Layers.of(health), "max_violation_windows"
    known = health.assign(busiest=1 + health[windows]) if windows in health else health
    busiest = [
        *_line(layers, health, "max_over_mean", "whole trace", BLACK),
        *_line(layers, known, "busiest", "mean over windows", BLUE, "--"),
    ]
    out = [
        *_line(layers, health, "overused", "overused", VERMILLION),
        *_line(layers, health, "underused", "underused", SKY),
        *_line(layers, health, "dead_experts", "dead", BLACK, ":"),
    ]
    even = _line(layers, health, "gini", "", BLACK)
    panels = [
        Lines(title, layers.axis(), Axis(unit, whole=low is not None, low=low), lines)
        for title, unit, low, lines in (
            ("Busiest expert", "use / mean use", None, busiest),
            ("Gini coefficient", "0 = even use", None, even),
            ("Experts out of balance", "experts", -0.5, out),
        )
        if lines
    ]
    shown = Layers.of(capacity)
    if shown.keys:
        places = capacity.assign(place=shown.places(capacity))
        dropped_LF = 100 * places.pivot(
            index="place", columns="capacity_factor", values="dropped_share"
        )
        lines = graded(dropped_LF.columns.to_numpy(float), dropped_LF.to_numpy(), shown.colours)
        x, y = Axis("capacity factor"), Axis("dropped choices (%)")
        panels.append(
            Lines(
                "If capacity were limited",
                x,
                y,
                lines,
                colours=shown.colours if len(lines) > 1 else None,
            )
        )
    title, stem = "Balance of the load", folder / "balance_overview"
    return draw(stem, title, panels, columns=2, note=note, panel_size=WIDE)


def gate_inputs(
    distances: pd.DataFrame, lookahead: pd.DataFrame, folder: Path, note: str
) -> list[Path]:
    layers, panels = Layers.of(distances), []
    for column in (str(name) for name in distances if str(name).endswith("_mean")):
        name = column.removesuffix("_mean")
        lines = _by_phase(distances, layers, column, f"{name}_std")
        if lines and name != "cosine_distance":  # the similarity says the same
            x, y = layers.axis("layer, compared with the next"), Axis("mean and one std")
            panels.append(Lines(_words(name).capitalize(), x, y, lines))
    ahead: list[Line] = []
    for phase, shade in PHASES.items():
        rows, label = _pick(lookahead, phase=phase), PHASE_NAMES[phase]
        ahead += _mean_line(rows, "horizon", "recall_at_k", label, shade)
    if ahead:
        reached, rows = Layers.of(lookahead), _pick(lookahead, phase=_values(lookahead, "phase")[0])
        each: list[Line] = []
        for horizon, shade in zip(_values(rows, "horizon"), HORIZONS, strict=False):
            label = f"{horizon} ahead" if horizon else "own gate (control)"
            each += _line(reached, _pick(rows, horizon=horizon), "recall_at_k", label, shade)
        x = Axis("layers ahead (0 = own gate, control)", whole=True)
        panels.append(Lines("Lookahead: mean, lowest to highest layer", x, RECALL, ahead))
        panels.append(Lines("Lookahead by layer", reached.axis(), RECALL, each))
    title = "How alike the inputs of consecutive gates are, and what a later gate makes of them"
    return draw(folder / "gate_inputs", title, panels, columns=4, note=note)


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
        return _spread(len(self.keys))

    def rows(self, table: pd.DataFrame, i: int) -> pd.DataFrame:
        stack, number = self.keys[i]
        return _pick(table, stack=stack, layer=number) if stack else _pick(table, layer=number)

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


def _spread(n: int) -> list[int]:
    """At most so many of n places, evenly spread, with both ends."""
    places = np.linspace(0, n - 1, min(n, MOST_PANELS)).round().astype(int)
    return np.unique(places).tolist()


def _pick(table: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    for column, value in equal.items():
        table = table[table[column] == value] if column in table else table[:0]
    return table


def _values(table: pd.DataFrame, column: str) -> list[Any]:
    return table[column].drop_duplicates().tolist() if column in table else []


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_drawable(rows: pd.DataFrame, column: str) -> bool:
    return column in rows and bool(rows[column].notna().any())


def _line(
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


def _by_phase(rows: pd.DataFrame, layers: Layers, column: str, around: str = "") -> list[Line]:
    """A line per phase, with a band as wide as the column `around` says."""
    lines: list[Line] = []
    for phase, shade in PHASES.items():
        chosen = _pick(rows, phase=phase)
        if _is_drawable(chosen, column):
            x, y = layers.places(chosen), chosen[column].to_numpy(float)
            off = chosen[around].to_numpy(float) if around in chosen else None
            band = (None, None) if off is None else (y - off, y + off)
            lines.append(Line(x, y, PHASE_NAMES[phase], shade, "-", *band))
    return lines


def _mean_line(
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


def _experts(of: str = "") -> Axis:
    return Axis(f"expert id{of}", whole=True)


def _vector(rows: pd.DataFrame, column: str, n_experts: int, fill: float = 0.0) -> NDArray[Any]:
    values_E = np.full(n_experts, fill)
    if len(rows):
        values_E[rows["expert"].to_numpy(int)] = rows[column].to_numpy(float)
    return values_E


def _matrix(
    rows: pd.DataFrame, down: tuple[str, int], across: tuple[str, int], column: str, fill: float
) -> NDArray[Any]:
    values = np.full((down[1], across[1]), fill)
    values[rows[down[0]].to_numpy(int), rows[across[0]].to_numpy(int)] = rows[column].to_numpy(
        float
    )
    return values


def _shares(counts: NDArray[Any], axis: int) -> NDArray[Any]:
    total = counts.sum(axis=axis, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def _log2(above: NDArray[Any], below: NDArray[Any]) -> NDArray[Any]:
    """Within the ends of the colour scale; NaN where there is nothing to compare with."""
    ratio = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return np.log2(np.clip(ratio, 2**-LIFT_BITS, 2**LIFT_BITS))


def _colours(shares: Sequence[NDArray[Any]], label: str) -> Colours:
    """From nothing to nearly the largest share; small ones are spread by their root."""
    finite = np.concatenate([share[np.isfinite(share)] for share in shares] or [np.ones(1)])
    top = float(np.quantile(finite, TOP_SHARE, method="higher"))
    return Colours(label, 0.0, top, power=0.5, extend="max" if finite.max() > top else "neither")


def _signed(label: str) -> Colours:
    return Colours(label, -LIFT_BITS, LIFT_BITS, "signed", extend="both")
