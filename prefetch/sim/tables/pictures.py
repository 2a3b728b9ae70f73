"""The figures of `evaluate`: one function per picture, from tables to panels.

It counts nothing: every number comes from a table, and what a table lacks is not drawn. K kinds, N bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefetch.figures import (
    BLACK,
    BLUE,
    CATEGORIES,
    GREEN,
    GREY,
    NO_DATA,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Axis,
    Dash,
    Key,
    Line,
    Lines,
    Mark,
    draw,
)
from prefetch.sim.engines import recorder
from prefetch.sim.engines.recorder import LANES, Span
from prefetch.sim.tables.cell import CANNOT_RUN, CHEATS
from prefetch.sim.tables.panels import Lanes, Piece, Stacked, looks, share_axis, with_intervals
from prefetch.sim.tables.timeline import Timeline

CHOSEN, ALONE, LRU, CURVE = "chosen", "no prefetch", "lru", "curve"
WIDE, ALONE_WIDE = (4.4, 3.0), (6.4, 3.8)  # inches of a panel, of one that stands alone
Look = tuple[str, Dash]
WAYS: dict[str, Look] = {
    "optimum": (BLACK, ":"),
    "oracle prefetch": (GREY, "--"),
    "static split by layer": (ORANGE, "-"),
    "host compute": (PURPLE, "-"),
    "host compute and uploads": (SKY, "-"),
    "layer streaming": (ORANGE, "--"),
}
WITHOUT: Look = (BLUE, "-")
GUESSING = (VERMILLION, GREEN, YELLOW)  # predictors; the ways have the other colours
PARTS = {
    "compute_ms_per_token": Key("computes", BLUE, shape="bar"),
    "stall_ms_per_token": Key("waits for copies on demand", VERMILLION, shape="bar"),
    "late_stall_ms_per_token": Key("waits for guesses under way", ORANGE, shape="bar"),
    "host_stall_ms_per_token": Key("waits for the host", PURPLE, shape="bar"),
    "disk_stall_ms_per_token": Key("waits for the disk", SKY, shape="bar"),
}
MOST_BARS = 48  # of a capacity
NEAR, FEW = 1.5, 3  # times the time with all resident: so many cells have a panel of their own
DOES = {
    recorder.BEFORE: GREY,
    recorder.EXPERT: BLUE,
    **dict.fromkeys((recorder.STALLS["stall_ns"], recorder.STALLS["host_stall_ns"]), NO_DATA),
    recorder.STALLS["disk_stall_ns"]: GREY,
    recorder.STALLS["late_stall_ns"]: YELLOW,
    recorder.DEMAND: VERMILLION,
    recorder.AHEAD: GREEN,
    recorder.LATE_COPY: ORANGE,
    recorder.UPLOAD: VERMILLION,  # where there are uploads, nothing is copied on demand
    recorder.ASKS: BLACK,
    recorder.ASKS_AHEAD: SKY,
    recorder.COMPUTES: PURPLE,
}
OTHERS_CHEAT = f"other policies ({CHEATS})"
CLOSE_UP = 4  # layers
ASIDE = 0.35  # percent, so that intervals do not cover each other


def hit_rate_by_capacity(
    table: pd.DataFrame, curves: pd.DataFrame, folder: Path, note: str
) -> list[Path]:
    """A panel per predictor and horizon: every policy's points, and between which curves they would lie without."""
    y, band = Axis("hit rate (%)", low=0, high=102), list[Line]()
    if len(curves):
        x, low, high = (100 * curves[name] for name in ("share", "lru", "optimum"))
        band = [
            Line(x, low, "LRU, no guesses", GREY, dots=False, low=low, high=high),
            Line(x, high, f"optimum, no guesses ({CHEATS})", BLACK, ":", dots=False),
        ]
    panels = [
        Lines(title, share_axis(), y, [*band, *_policies(rows, "hit_rate", 100, table)])
        for title, rows in _by_guesses(table)
    ]
    said = f"Experts that an event finds, late hits not among them. {_intervals(table)}{note}"
    title = "How often an expert is there"
    return draw(folder / "hit_rate_by_capacity", title, panels, note=said, panel_size=WIDE)


def tpot_by_capacity(table: pd.DataFrame, folder: Path, note: str, *, full_ms: float) -> list[Path]:
    """The ways side by side, with the first policy."""
    lines = _ways(table, "tpot_ms", 1)
    bound = table[table.tpot_bound_ms.notna() & table.way.isin((CHOSEN, ALONE, LRU, CURVE))]
    if len(bound):
        least = bound.groupby("percent").tpot_bound_ms.min()
        lines.append(Line(least.index, least, "bound, copies only", GREY))
    marks = (Mark(full_ms, "all experts resident", ":"),)
    name = f"Policy {_named(_first(table)['policy'], _cheating(table))}"
    panel = Lines(name, share_axis(), Axis("ms per token"), lines, marks)
    said = f"{_intervals(table)}{note}"
    title, shape = "Time per generated token", ALONE_WIDE
    return draw(folder / "tpot_by_capacity", title, [panel], note=said, panel_size=shape)


def tpot_by_policy(table: pd.DataFrame, folder: Path, note: str, *, full_ms: float) -> list[Path]:
    """The policies side by side, a panel per predictor and horizon."""
    x, y = Axis("cache (% of all experts)"), Axis("ms per token")
    marks, grid = (Mark(full_ms, "all experts resident", ":"),), table[table.way != CURVE]
    panels = [
        Lines(title, x, y, _policies(rows, "tpot_ms", 1, grid), marks)
        for title, rows in _by_guesses(table)
    ]
    said = f"{_intervals(table)}{note}"
    title = "Time per generated token, policy by policy"
    return draw(folder / "tpot_by_policy", title, panels, note=said, panel_size=WIDE)


def savings_and_slowdown(table: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    """What memory buys: all cells, and those near full speed in a panel of their own."""
    marks = (Mark(1.05, "5 % slower", "-"), Mark(1.25, "25 % slower", ":"))
    x, most = Axis("memory saved (% of all experts)", high=102), float(table.slowdown.max())
    lines = [_front(table), *_ways(table, "slowdown", 1, by="saved")]
    grid = table[(table.way == CHOSEN) & (table.policy != _first(table)["policy"])]
    for is_cheat, name, shade in ((False, "other policies", GREY), (True, OTHERS_CHEAT, BLACK)):
        own = grid[(grid["mark"] == CHEATS) == is_cheat]
        if len(own):
            lines.append(Line(own.saved, own.slowdown, name, shade, "none", dots=True))
    least = float(
        table.slowdown.min()
    )  # of a device, whose runs spread, or whose host saves a step
    y = Axis("slowdown (x all resident)", low=min(0.95, least - 0.05 * (most - least)))
    panels = [Lines("All cells", x, y, lines, marks)]
    if (table.slowdown <= NEAR).sum() >= FEW and most > NEAR:
        low = min(0.98, least - 0.05 * (NEAR - least))
        near = Axis("slowdown (x all resident)", low=low, high=NEAR)
        panels.append(Lines(f"Up to {NEAR:g} x", x, near, lines, marks))
    said = f"Saved: what cache, staging and predictor leave of the experts' memory. {note}"
    title, shape = "Memory saved against slowdown", WIDE if len(panels) > 1 else ALONE_WIDE
    return draw(folder / "savings_and_slowdown", title, panels, note=said, panel_size=shape)


def stall_breakdown(table: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    """A panel per capacity, a bar per way: where the time of a token goes."""
    panels, most = list[Lines](), 1
    for capacity in table[table.way == CHOSEN].capacity.unique():
        rows = _bars(table[(table.capacity == capacity) & (table.way != CURVE)])
        most = max(most, len(rows))
        panels.append(
            Stacked(
                f"Cache {capacity}",
                Axis("ms per generated token", low=0),
                Axis(""),
                names=[name for name, _ in rows],
                parts_KN=np.array([[row[part] for _, row in rows] for part in PARTS]),
                kinds=list(PARTS.values()),
            )
        )
    said = "Of the whole run, prompts included. "
    if most == MOST_BARS:
        said += f"At most {MOST_BARS} cells of a capacity; all stand in the table. "
    title, shape = "Where the time goes", (4.4, 0.9 + 0.17 * most)
    return draw(
        folder / "stall_breakdown", title, panels, columns=2, note=said + note, panel_size=shape
    )


def required_recall(needed: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    """Time against the recall of guesses, a line per bandwidth: as it is, and beside its level without guesses."""
    guessing, alone, even, beside = list[Line](), list[Line](), list[Line](), list[Line]()
    factors = sorted(needed.bandwidth_factor.unique())
    for factor, shade in zip(factors, (VERMILLION, BLUE, GREEN), strict=False):
        rows = needed[needed.bandwidth_factor == factor]
        without, least = rows.no_prefetch_tpot_ms.iloc[0], 100 * rows.break_even_recall.iloc[0]
        name = "this link" if factor == 1 else f"{factor:g} x its bandwidth"
        recall, longer = 100 * rows.recall, 100 * (rows.tpot_ms / without - 1)
        guessing.append(Line(recall, rows.tpot_ms, name, shade, dots=True))
        alone.append(Line([0, 100], [without] * 2, f"{name}, no guesses", shade, "--", dots=False))
        beside.append(Line(recall, longer, name, shade, dots=True))
        if np.isfinite(least):
            even.append(Line([least], [without], "break-even", BLACK, "none", dots=True))
            beside.append(Line([least], [0.0], "break-even", BLACK, "none", dots=True))
    x, y = Axis("recall of the guesses (%)", low=-2, high=102), Axis("ms per token")
    longer_axis, one = Axis("ms per token, % over no guesses"), needed.iloc[0]
    panels = [
        Lines("Time per token", x, y, [*guessing, *alone, *even]),
        Lines("Beside no guesses", x, longer_axis, beside, (Mark(0.0, "no guesses"),)),
    ]
    said = f"Policy {one.policy}, cache {one.capacity}, {one.horizon} layers ahead; "
    said += "every true expert is guessed with this chance, else a wrong one. "
    if one.steps < one.of_steps:
        said += f"The first {one.steps} of {one.of_steps} steps. "
    title = "How good guesses must be before they pay"
    return draw(folder / "required_recall", title, panels, note=said + note, panel_size=WIDE)


def timeline(shown: Timeline, folder: Path, note: str) -> list[Path]:
    """Some tokens as a whole, and a few layers of the last one from near."""
    begins, what = np.array(shown.begins_ns) / 1e6, "tokens" if shown.request >= 0 else "steps"
    marks = tuple(Mark(at, f"{what[:-1]} begins", upright=True) for at in begins[:-1])
    low, high, words = _close_up(shown)
    time, near = Axis("ms", low=0, high=float(begins[-1])), Axis("ms", low=low, high=high)
    lanes: dict[str, Any] = {"lanes": LANES, "pieces": _pieces(shown.spans)}
    panels = [
        Lanes(f"{len(begins) - 1} {what}", time, Axis(""), (), marks, **lanes),
        Lanes(f"From near: {words}", near, Axis(""), **lanes, edged=(high - low) / 200),
    ]
    said = f"{shown.warm_steps} steps after {shown.start}. "
    said = f"Request {shown.request}, {said}" if shown.request >= 0 else said
    title, shape = "What GPU, link and host do", (9.0, 1.7)
    stem = folder / "timeline"
    return draw(stem, title, panels, columns=1, note=said + note, panel_size=shape)


def _close_up(shown: Timeline) -> tuple[float, float, str]:
    """From when to when, in milliseconds, and what runs then."""
    since = shown.begins_ns[-2]
    last = [one for one in shown.spans if one.lane == LANES[0] and one.begin_ns >= since]
    layers = sorted({span.layer for span in last})[:CLOSE_UP]
    close = [span for span in last if span.layer in layers]
    words = f"the first {len(layers)} layers of the last"
    return close[0].begin_ns / 1e6, close[-1].end_ns / 1e6, words


def _pieces(spans: Sequence[Span]) -> list[tuple[int, Key, Sequence[Piece]]]:
    """Of every lane and kind; chunks of one copy that follow on each other are one piece."""
    found: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        found.setdefault((span.lane, span.kind), []).append(span)
    in_order = sorted(found, key=lambda key: (LANES.index(key[0]), list(DOES).index(key[1])))
    return [
        (
            LANES.index(lane),
            Key(f"{lane}: {kind}", DOES[kind], shape="bar"),
            _joined(found[lane, kind]),
        )
        for lane, kind in in_order
    ]


def _joined(spans: Sequence[Span]) -> list[Piece]:
    pieces, before = list[Piece](), None
    for span in spans:
        begin, took = span.begin_ns / 1e6, span.took_ns / 1e6
        if before and (before.layer, before.expert, before.end_ns) == (
            span.layer,
            span.expert,
            span.begin_ns,
        ):
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + took)
        else:
            pieces.append((begin, took))
        before = span
    return pieces


def prepared(table: pd.DataFrame, n_all: int) -> pd.DataFrame:
    """What ran, with the columns that only pictures need. `n_all`: experts of all layers."""
    table = table[~table["mark"].str.startswith(CANNOT_RUN)]
    percent = 100 * table.capacity_experts / n_all
    return table.assign(percent=percent, saved=100 * table.memory_savings)


def _intervals(table: pd.DataFrame) -> str:
    over = str(_first(table)["interval_over"])
    return "No intervals. " if over.startswith("none") else f"Bars: 95 % over {over}. "


def _first(table: pd.DataFrame) -> Any:
    return table[table.way == CHOSEN].iloc[0]


def _by_guesses(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Cells of the grid, those without guesses first."""
    rows = table[table.way.isin((CHOSEN, ALONE))]
    cheating = _cheating(rows)
    parts = [(_guesses_of(row, cheating), row) for row in rows.to_dict("records")]
    names = sorted(dict.fromkeys(name for name, _ in parts), key=lambda name: name != ALONE)
    return [(name, pd.DataFrame([row for own, row in parts if own == name])) for name in names]


def _cheating(table: pd.DataFrame) -> set[str]:
    """Policies that cheat whoever guesses, and predictors that do whatever the policy."""
    rows = table[table.way.isin((CHOSEN, ALONE))]
    cheats, is_alone = rows["mark"] == CHEATS, rows.predictor == "none"
    policies = set(rows.policy[cheats & is_alone])
    fair = rows[~rows.policy.isin(policies)]
    return policies | set(fair.predictor[(fair["mark"] == CHEATS) & (fair.predictor != "none")])


def _named(name: str, cheating: set[str]) -> str:
    return f"{name} ({CHEATS})" if name in cheating else name


def _guesses_of(row: Any, cheating: set[str]) -> str:
    if row["predictor"] == "none":
        return ALONE
    ahead = f"{row['predictor']}, {row['horizon']} ahead"
    return f"{ahead} ({CHEATS})" if row["predictor"] in cheating else ahead


def _with_curve(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The curve of sizes belongs to one cell of the grid, or to its row without guesses."""
    one, curve = rows.iloc[0], table[table.way == CURVE]
    for name in ("policy", "predictor", "horizon"):
        curve = curve[curve[name] == one[name]]
    rows = pd.concat([rows, curve]) if len(curve) else rows
    return rows.drop_duplicates("percent").sort_values("percent")


def _policies(rows: pd.DataFrame, column: str, times: float, table: pd.DataFrame) -> list[Line]:
    """A line per policy, moved aside a little, so that intervals do not cover each other."""
    everyone = table[table.way == CHOSEN].policy.unique().tolist()
    look, lines = dict(zip(everyone, looks(len(everyone), CATEGORIES), strict=True)), list[Line]()
    cheating = _cheating(table)
    for i, policy in enumerate(everyone):
        own = rows[rows.policy == policy]
        if len(own):
            aside = ASIDE * (i - (len(everyone) - 1) / 2)
            lines += _joined_points(
                _with_curve(own, table),
                column,
                times,
                _named(policy, cheating),
                look[policy],
                aside=aside,
            )
    return lines


def _joined_points(
    rows: pd.DataFrame,
    column: str,
    times: float,
    label: str,
    look: Look,
    *,
    by: str = "percent",
    aside: float = 0.0,
) -> list[Line]:
    ends = (f"{column}_low", f"{column}_high")
    low, high = (times * rows[end] if end in rows else np.full(len(rows), np.nan) for end in ends)
    x, y = rows[by] + aside, times * rows[column]
    return with_intervals(x, y, low, high, label, colour=look[0], dash=look[1])


def _ways(table: pd.DataFrame, column: str, times: float, by: str = "percent") -> list[Line]:
    """The first policy with every predictor, and what stands beside it, each moved aside a little."""
    grid = table[(table.policy == _first(table)["policy"]) & table.way.isin((CHOSEN, ALONE))]
    parts = [(name, _with_curve(rows, table)) for name, rows in _by_guesses(grid)]
    guessing = [name for name, _ in parts if name != ALONE]
    look = dict(zip(guessing, looks(len(guessing), GUESSING), strict=True)) | {ALONE: WITHOUT}
    look |= {_told(way, table): shade for way, shade in WAYS.items()}
    for way in WAYS:
        rows = table[table.way == way].sort_values("percent")
        parts += [(_told(way, table), rows)] if len(rows) else []
    lines = list[Line]()
    for i, (name, rows) in enumerate(parts):
        aside = ASIDE * (i - (len(parts) - 1) / 2) if by == "percent" else 0.0
        lines += _joined_points(rows, column, times, name, look[name], by=by, aside=aside)
    return lines


def _told(way: str, table: pd.DataFrame) -> str:
    cheats = (table[table.way == way]["mark"] == CHEATS).any()
    return f"{way} ({CHEATS})" if cheats else way


def _front(table: pd.DataFrame) -> Line:
    """Cells that no other saves more than at the same speed; whoever cheats is not among them."""
    fair = table[(table["mark"] != CHEATS) & table.slowdown.notna()]
    fair = fair.sort_values(["saved", "slowdown"], ascending=[False, True])
    best = fair[fair.slowdown < fair.slowdown.cummin().shift(fill_value=np.inf)]
    return Line(best.saved, best.slowdown, "fastest at that size", NO_DATA, dots=False, width=4.0)


def _bars(rows: pd.DataFrame) -> list[tuple[str, Any]]:
    """Names and rows, the ways last; LRU without guesses only where the grid has not got it."""
    grid, ways = dict[str, Any](), dict[str, Any]()
    for row in rows.to_dict("records"):
        if row["way"] in WAYS:
            ways[f"{row['way']} ({CHEATS})" if row["mark"] == CHEATS else row["way"]] = row
        else:
            guesses = "" if row["predictor"] == "none" else f" + {_guesses_of(row, set())}"
            mark = f" ({CHEATS})" if row["mark"] == CHEATS else ""
            grid.setdefault(f"{row['policy']}{guesses}{mark}", row)
    return [*[*grid.items()][: MOST_BARS - len(ways)], *ways.items()]
