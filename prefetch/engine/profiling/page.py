"""`router_baseline_profile.md`: the page of a profile. Every heading is filled in from what the run measured.

It measures nothing: sentences come from `findings`, recommendations from `steps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prefetch.engine.profiling import words
from prefetch.engine.profiling.findings import HEADINGS
from prefetch.engine.profiling.measure import NO_MEMORY, NO_TIME, REFUSED
from prefetch.engine.profiling.operations import DEFINITION, DENSE, OURS
from prefetch.engine.profiling.rows import Rows
from prefetch.engine.profiling.steps import steps
from prefetch.engine.profiling.told import Told
from prefetch.engine.profiling.work import BACKWARD, FORWARD, LAYER, Roofs
from prefetch.kernels.twins import interpreted

TITLE = "MoE Router Baseline Profiling"
ROUTER_DOES = """The router is responsible for:
1. Computing routing probabilities using a linear layer
2. Selecting top-k experts for each token
3. Saying in which order experts compute their tokens (dispatch), and summing what they give (combine)"""


@dataclass(frozen=True)
class Ran:
    """What a page says beside the findings."""

    machine: Mapping[str, Any]
    roofs: Roofs
    room_bytes: int
    memory_source: str
    command: str
    skew: float
    factor: float
    figures: Sequence[str] = ()
    noise: str = ""
    warning: str = ""


def page(told: Told, ran: Ran) -> str:
    bullets = {name: _bullets(sentences(told)) for name, sentences in HEADINGS.items()}
    parts = [
        f"# {TITLE}",
        _intro(told, ran),
        "## Hardware Configuration",
        _hardware(ran),
        "## Performance Metrics",
        f"The layer of most sentences: {told.rows.words}. Times are medians of calls that find cold caches. "
        + _spread(told.rows),
        "### Router Performance",
        ROUTER_DOES,
        "Key findings:\n" + bullets["Router Performance"],
        "### Full MoE Layer Performance",
        "The MoE layer combines the router with expert feed-forward networks.",
        "Key findings:\n" + bullets["Full MoE Layer Performance"],
        _layers(told.rows),
        "## Memory Usage Patterns",
        f"Peaks are {ran.memory_source}.",
        "### Router Memory Usage",
        bullets["Router Memory Usage"],
        "### MoE Layer Memory Usage",
        bullets["MoE Layer Memory Usage"],
        "## Identified Bottlenecks",
        "### Computational Bottlenecks",
        bullets["Computational Bottlenecks"],
        "### Memory Bottlenecks",
        bullets["Memory Bottlenecks"],
        "## Expert Utilization Analysis",
        bullets["Expert Utilization Analysis"],
        "## Next Steps",
        _next(told),
        "## What was not run",
        _left_out(told.rows.table),
        *(["## Figures", "\n".join(f"![{name}]({name}.png)" for name in ran.figures)] if ran.figures else []),
        "## How to read this",
        _reading(ran),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _intro(told: Told, ran: Ran) -> str:
    ours = told.rows.of(LAYER, OURS)
    paths = sorted(ours.path.unique())
    if interpreted():
        kernels = "`ours` ran under Triton's interpreter: its times say nothing."
    elif paths == [DEFINITION]:
        kernels = "On this CPU `ours` is the torch definition of the kernels; the Triton kernels did not run."
    else:
        kernels = f"`ours` are the Triton kernels (paths {words.one_of(paths)})."
    n_ran, n = len(told.rows.ran), len(told.rows.table)
    return (
        f"Profiling results of the Mixture of Experts (MoE) router and layer on {told.device}: {n_ran:,} of {n:,} rows "
        f"were run. {kernels} Made by `{ran.command}`; every number stands in `results.csv`."
    )


def _hardware(ran: Ran) -> str:
    machine = ran.machine
    is_gpu = machine["device_kind"] == "gpu"
    gpu = machine["device"] if is_gpu else f"none used; timed on {machine['device']}"
    threads = words.count(int(machine["threads"]), "thread")
    products = ", ".join(
        f"{words.digits(rate / 1e12)} TFLOP/s {dtype}"
        for dtype, rate in ran.roofs.flops_per_s.items()
    )
    lines = [
        f"GPU: {gpu}",
        f"CUDA Version: {machine['cuda']} (PyTorch {machine['torch']}, Triton {machine['triton']})",
        f"Available Memory: {words.size(ran.room_bytes)} of {words.size(int(machine['device_bytes']))} may be used",
        f"Host: {machine['host']}, {threads} used, Python {machine['python']}, {machine['system']}",
        f"Measured roofs: reading {words.digits(ran.roofs.read_bytes_per_s / 1e9)} GB/s; products {products}",
    ]
    if "load" in machine:
        lines.append(f"How quiet it was: {ran.noise}{ran.warning}")
    return _bullets(lines)


def _spread(rows: Rows) -> str:
    """How far a time may be believed."""
    half, most = float(rows.spread.median()), float(rows.spread.quantile(0.9))
    return (
        f"Of half of the rows the quartiles are at most {words.percent(half)} of the median apart, of a tenth more "
        f"than {words.percent(most)}."
    )


def _bullets(lines: Iterable[str]) -> str:
    return (
        "\n".join(f"- {line}" for line in lines) or "- Nothing of this ran: see what was not run."
    )


def _layers(rows: Rows) -> str:
    """The headline's layers, every implementation beside ours."""
    main = rows.main[rows.main.part == LAYER]
    head = "tokens | direction | implementation | time | quartiles | of bound | times the reference | peak memory"
    order = main.sort_values(["direction", "tokens"], ascending=[False, True], kind="stable")
    lines = [_row(row) for _, row in order.iterrows()]
    return "\n".join([f"| {head} |", "|" + "---|" * 8, *lines])


def _row(row: pd.Series) -> str:
    ratio = row.times_reference
    beside = f"{words.times(ratio)} {row.reference}" if pd.notna(ratio) else ""
    return (
        f"| {row.tokens:,} | {row.direction} | {row.implementation} | {words.time(row.median_ns)} "
        f"| {words.time(row.p25_ns)} to {words.time(row.p75_ns)} | {words.percent(row.of_bound)} | {beside} "
        f"| {words.size(row.peak_bytes)} |"
    )


def _next(told: Told) -> str:
    found = steps(told)
    todo = [step.text for step in found if step.holds]
    idle = [step.text for step in found if not step.holds]
    lines = "\n".join(f"{i}. {text}" for i, text in enumerate(todo, 1))
    parts = ["Based on the profiling results, the following are recommended:", lines]
    if not todo:
        parts = ["By these numbers nothing is worth changing."]
    if idle:
        parts += ["By the same numbers not worth it now:", _bullets(idle)]
    return "\n\n".join(parts)


def _left_out(table: pd.DataFrame) -> str:
    lines = []
    reasons = {
        NO_MEMORY: "predicted to need more memory than may be used",
        NO_TIME: "profile.seconds were over, or would have been",
        REFUSED: "torch or a compiler refused it",
    }
    for status, why in reasons.items():
        rows = table[table.status.str.startswith(status)]
        if rows.empty:
            continue
        groups = rows.groupby(["implementation", "direction"], sort=False)
        said = [
            f"{name} {direction} ({len(of)}, from {words.tokens(int(of.tokens.min()))} on)"
            for (name, direction), of in groups
        ]
        lines.append(f"{words.count(len(rows), 'row')}: {why}: {words.one_of(said)}.")
    return _bullets(lines) if lines else "Every row of the grid was run."


def _reading(ran: Ran) -> str:
    lines = [
        "Bound: the longer of the bytes and the operations that the task needs at least, at the roofs above, both "
        "measured in this run. It is the same for every implementation.",
        "Caches are cleared before every call; the first call is not counted. What is compared is timed in turns, so "
        "that other work on the machine meets all of it alike. Parts are timed one by one: together they may take "
        "longer than the layer.",
        f"Routing is drawn: uniform, or Zipf with exponent {ran.skew:g}; the router's product is computed all the "
        "same.",
        f"The dense baseline gives an expert {ran.factor:g}x its even share of seats (`profile.capacity_factor`); "
        f"choices without a seat are dropped, so that `{DENSE}` computes less than the others.",
        f"`{BACKWARD}` is the gradient of tokens, experts and router alone; its memory is that of `{FORWARD}` and "
        f"`{BACKWARD}` together.",
    ]
    return _bullets(lines)
