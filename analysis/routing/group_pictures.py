"""The figures of `analyze` about experts beside each other: domains, clusters, balance, gates.

One function per picture, from tables to files; it counts nothing. E experts, D domains, F capacity factors, L layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.routing.panels import (
    PHASE_NAMES,
    PHASES,
    RECALL,
    SQUARE,
    WIDE,
    Layers,
    expert_axis,
    in_words,
    line_of,
    lines_by_phase,
    log2_ratio,
    matrix_of,
    mean_line,
    rows_where,
    signed_colours,
    values_of,
    vector_of,
)
from prefetch.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Axis,
    Colours,
    HeatMap,
    Line,
    Lines,
    draw,
    graded,
)

MOST_CUTS = 24  # more lines between clusters would hide them
HORIZONS = (GREY, GREEN, PURPLE, ORANGE, SKY)
INFORMATION = "mutual_information_bits"


def domain_usage(
    usage: pd.DataFrame,
    information: pd.DataFrame,
    transfer: pd.DataFrame,
    folder: Path,
    note: str,
    *,
    n_experts: int,
) -> list[Path]:
    domains, layers = values_of(usage, "domain"), Layers.of(usage)
    colours = signed_colours("log2 (share / mean share)")
    panels: list[Lines] = []
    for i in layers.spread() if len(domains) > 1 else ():
        rows = layers.rows(usage, i)
        shares = [
            vector_of(rows_where(rows, domain=domain), "share", n_experts) for domain in domains
        ]
        lift_DE = log2_ratio(np.stack(shares), np.mean(shares, axis=0))
        names = Axis("", tuple(str(domain) for domain in domains))
        panels.append(
            HeatMap(layers.title(i), expert_axis(), names, values=lift_DE, colours=colours)
        )
    layers = Layers.of(information)
    lines = [
        *line_of(layers, information, INFORMATION, "domain and expert", BLUE),
        *line_of(layers, information, "shuffled_bits", "domains shuffled", GREY, "--"),
    ]
    if lines:
        bits = Axis("mutual information (bits)")
        panels.append(Lines("What a choice tells of the domain", layers.axis(), bits, lines))
    panels += _transfer_panels(transfer)
    title = "Which experts each domain prefers, and how far guesses carry over"
    return draw(folder / "domain_usage", title, panels, note=note, panel_size=(4.0, 2.8))


def _transfer_panels(transfer: pd.DataFrame) -> list[Lines]:
    both = *values_of(transfer, "train_domain"), *values_of(transfer, "test_domain")
    place = {name: i for i, name in enumerate(dict.fromkeys(both))}
    names, panels = tuple(str(name) for name in place), list[Lines]()
    for measure in values_of(transfer, "measure"):
        rows = rows_where(transfer, measure=measure)
        recall_DD = np.full((len(place), len(place)), np.nan)
        cells = rows["train_domain"].map(place), rows["test_domain"].map(place)
        recall_DD[cells] = rows["recall"]
        colours = Colours("recall", 0.0, float(transfer["recall"].max()))
        x, y, title = (
            Axis("scored on", names),
            Axis("counted on", names),
            f"Transfer: {in_words(measure)}",
        )
        panels.append(HeatMap(title, x, y, values=recall_DD, colours=colours))
    return panels


def coactivation(
    pairs: pd.DataFrame, clusters: pd.DataFrame, folder: Path, note: str, *, n_experts: int
) -> list[Path]:
    layers, panels = Layers.of(pairs), []
    axis, colours = (
        Axis("experts in order of cluster", whole=True),
        signed_colours("log2 (together / by chance)"),
    )
    for i in layers.spread():
        cluster_E = vector_of(layers.rows(clusters, i), "cluster", n_experts, fill=-1.0)
        order_E = np.argsort(cluster_E, kind="stable")
        cuts = (np.flatnonzero(np.diff(cluster_E[order_E])) + 0.5).tolist()
        size = ("expert_a", n_experts), ("expert_b", n_experts)
        lift_EE = matrix_of(layers.rows(pairs, i), *size, "lift", np.nan)
        bits_EE = log2_ratio(np.fmax(lift_EE, lift_EE.T), np.ones(n_experts))[
            np.ix_(order_E, order_E)
        ]
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
        *line_of(layers, health, "max_over_mean", "whole trace", BLACK),
        *line_of(layers, known, "busiest", "mean over windows", BLUE, "--"),
    ]
    out = [
        *line_of(layers, health, "overused", "overused", VERMILLION),
        *line_of(layers, health, "underused", "underused", SKY),
        *line_of(layers, health, "dead_experts", "dead", BLACK, ":"),
    ]
    even = line_of(layers, health, "gini", "", BLACK)
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
        lines = lines_by_phase(distances, layers, column, f"{name}_std")
        if lines and name != "cosine_distance":  # the similarity says the same
            x, y = layers.axis("layer, compared with the next"), Axis("mean and one std")
            panels.append(Lines(in_words(name).capitalize(), x, y, lines))
    ahead: list[Line] = []
    for phase, shade in PHASES.items():
        rows, label = rows_where(lookahead, phase=phase), PHASE_NAMES[phase]
        ahead += mean_line(rows, "horizon", "recall_at_k", label, shade)
    if ahead:
        reached, rows = (
            Layers.of(lookahead),
            rows_where(lookahead, phase=values_of(lookahead, "phase")[0]),
        )
        each: list[Line] = []
        for horizon, shade in zip(values_of(rows, "horizon"), HORIZONS, strict=False):
            label = f"{horizon} ahead" if horizon else "own gate (control)"
            each += line_of(reached, rows_where(rows, horizon=horizon), "recall_at_k", label, shade)
        x = Axis("layers ahead (0 = own gate, control)", whole=True)
        panels.append(Lines("Lookahead: mean, lowest to highest layer", x, RECALL, ahead))
        panels.append(Lines("Lookahead by layer", reached.axis(), RECALL, each))
    title = "How alike the inputs of consecutive gates are, and what a later gate makes of them"
    return draw(folder / "gate_inputs", title, panels, columns=4, note=note)
