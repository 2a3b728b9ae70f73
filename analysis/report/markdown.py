"""`report.md`: the same tables as the page, for a paper or a pull request. Names are escaped; nothing is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from analysis.report.charts import times_are
from analysis.report.commands import command
from analysis.report.comparing import SEED
from analysis.report.contents import Column, Contents
from analysis.report.labels import CHEATS
from analysis.report.listing import group_mark, group_name, group_row, problems
from analysis.report.series import Chart

MOST_ROWS = 200  # of one table; the page and the CSV hold all
MOST_COMMON = 400
OF_SEEDS = "Rows of several seeds are means, and in brackets Student's 95 % interval over seeds."
AT_AN_EDGE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # inside a word it is no mark


def markdown(of: Contents) -> str:
    parts = [f"# {escaped(of.title)}", escaped(of.summary())]
    for stage in dict.fromkeys(run.stage for run in of.runs):
        parts += [f"## {escaped(stage)}", _stage(of, stage)]
    for chart in of.charts:
        parts += [_heading(of, chart), escaped(chart.note), *_chart(chart)]
    if wrong := problems(of):
        rows = [[one["place"], one["why"]] for one in wrong]
        parts += ["## Problems", table(["what", "why"], rows)]
    parts += ["## Settings that all runs share", table(["setting", "value"], _common(of))]
    parts += ["## To make them again", *_commands(of)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [
        _line(columns),
        _line(["---"] * len(columns), is_rule=True),
        *map(_line, rows[:MOST_ROWS]),
    ]
    if len(rows) > MOST_ROWS:
        lines += ["", f"The first {MOST_ROWS} of {len(rows):,} rows."]
    return "\n".join(lines)


def escaped(value: Any) -> str:
    """A cell that stays a cell, and text that stays text."""
    text = (
        " ".join(str(value).split())
        .replace("\\", "\\\\")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )
    text = AT_AN_EDGE.sub(r"\\_", text)
    for sign in "|`*[]~$":  # the last begins a formula where GitHub shows it
        text = text.replace(sign, f"\\{sign}")
    return text


def number(value: Any) -> str:
    """Four digits, as papers have them."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return escaped(value)


def _line(cells: Iterable[Any], *, is_rule: bool = False) -> str:
    return f"| {' | '.join(str(cell) if is_rule else number(cell) for cell in cells)} |"


def _stage(of: Contents, stage: str) -> str:
    """A row per group of seeds; only columns that say something about this stage."""
    groups = [group for group in of.groups if of.runs[group.runs[0]].stage == stage]
    rows = [(group, *group_row(of, group)) for group in groups]
    asked = [
        at
        for at, column in enumerate(of.columns)
        if _says_something(column, [v[at] for _, v, *_ in rows])
    ]
    body = []
    for group, values, low, high in rows:
        newest = of.runs[group.runs[-1]]
        states = " and ".join(dict.fromkeys(of.runs[at].state for at in group.runs))
        mark = f" ({CHEATS})" if group_mark(of, group) else ""
        cells = [_with_interval(values[at], low[at], high[at]) for at in asked]
        body.append([f"{group_name(of, group, newest)}{mark}", states, *cells])
    told = table(["run", "state", *(_head(of.columns[at]) for at in asked)], body)
    return f"{told}\n\n{OF_SEEDS}" if any(len(group.seeds) > 1 for group in groups) else told


def _says_something(column: Column, values: Sequence[Any]) -> bool:
    """A setting only where it differs between these rows."""
    known = {repr(value) for value in values if value is not None}
    least = 2 if column.kind == "setting" and len(values) > 1 else 1
    return column.shown and len(known) >= least


def _head(column: Column) -> str:
    return f"{column.name} ({column.note})" if column.note else column.name


def _with_interval(value: Any, low: Any, high: Any) -> Any:
    if value is None or low is None or low == high:
        return value
    return f"{number(float(value))} ({number(float(low))} to {number(float(high))})"


def _heading(of: Contents, chart: Chart) -> str:
    times = times_are(of.runs, chart)
    return f"## {escaped(chart.title)}{f' ({times})' if times else ''}"


def _chart(chart: Chart) -> Iterable[str]:
    for name, series in chart.variants.items():
        rows = [
            [f"{one.name} ({CHEATS})" if one.cheats else one.name, *values]
            for one in series
            for values in zip(one.x, one.y, one.low, one.high, one.over, strict=True)
        ]
        yield f"{escaped(name)}:" if name else ""
        yield table(["series", chart.x, chart.y, "low", "high", "interval over"], rows)


def _common(of: Contents) -> list[list[Any]]:
    pairs = [[name, "not set" if value is None else value] for name, value in of.compared.common]
    return [pair for pair in pairs if pair[0] != SEED][:MOST_COMMON]


def _commands(of: Contents) -> Iterable[str]:
    lines = [command(run) for run in of.runs]
    known = dict.fromkeys(line for line in lines if line)
    if known:
        text = "\n".join(" ".join(line.split("\n")) for line in list(known)[:MOST_ROWS])
        fence = "```" if "```" not in text else "~~~~"
        yield f"{fence}bash\n{text}\n{fence}"
