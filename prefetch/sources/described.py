"""A trace in words, a table and numbers, for whoever was handed one: what it is, what it lacks, what it can serve.

What a predictor needs it says itself; this file names none but for what stands beside a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch import config, leaves
from prefetch.artifacts import Artifact
from prefetch.errors import ConfigError
from prefetch.runs.outputs import Outputs
from prefetch.sources.collect import describe as of_artifact
from prefetch.trace.beside import names_beside
from prefetch.trace.describe import Description, describe
from prefetch.trace.parquet import TraceReader

LINES = "said.txt"
FOLDS = 5  # what train and evaluate split requests into
BESIDE = {"gate_lookahead": "router_weights"}  # predictor -> what must stand beside the rows
ON_ITS_OWN = ("imported", "ensemble")  # what these need, their settings decide
Row = tuple[str, str]


def show_trace(artifact: Artifact, outputs: Outputs) -> dict[str, float]:
    """Prints it, writes `description.txt` and the table `domains`; counts are told as `collect` tells them."""
    metrics, rows = of_artifact(artifact)
    del metrics["seconds"], metrics["tokens_per_second"]  # of collecting it, once
    rows = [row for row in rows if row[0] != "seconds"]
    if artifact.kind == "trace":
        reader = TraceReader(artifact.folder)
        told = describe(reader)
        metrics |= told.metrics()
        rows += [*_sizes(told), *_lineage(reader), *serves(reader, told)]
        frame = pd.DataFrame(told.table())
        outputs.table("domains", frame)
        _print_table("rows by domain and phase", frame)
    _print_rows(f"{artifact.kind} {artifact.folder}", rows)
    text = "".join(f"{name}: {value}\n" for name, value in rows)
    (outputs.folder / "description.txt").write_text(text)
    return metrics


def _sizes(told: Description) -> Iterator[Row]:
    numbers = told.metrics()
    shortest, median, longest = (
        int(numbers[f"{name}_request_tokens"]) for name in ("shortest", "median", "longest")
    )
    yield "tokens of a request", f"{shortest:,} to {longest:,}, median {median:,}"
    yield "bytes", ", ".join(f"{name} {n:,}" for name, n in told.bytes_of.items())
    if told.n_not_executed:
        yield "not executed", f"{told.n_not_executed:,} rows (answered from a prefix cache)"
    yield "lacks", ", ".join(told.lacks) or "nothing"


def _lineage(reader: TraceReader) -> Iterator[Row]:
    told = reader.provenance
    if told.versions:
        yield "made with", ", ".join(f"{name} {version}" for name, version in told.versions.items())
    if told.seed is not None:
        yield "seed", str(told.seed)
    for name, digest in list(told.inputs.items())[:8]:
        yield f"from {name}", digest
    if len(told.inputs) > 8:
        yield "from", f"{len(told.inputs) - 8} inputs more (trace.json lists them)"


def serves(reader: TraceReader, told: Description) -> Iterator[Row]:
    """Stages and predictors that can use it, and what the others miss."""
    fit, unfit = [], []
    for name, missing in sorted(missing_of(reader).items()):
        if missing:
            unfit.append(f"{name} ({', '.join(missing)})")
        else:
            fit.append(name)
    yield "predictors", ", ".join(fit)
    if unfit:
        yield "not these, which need", ", ".join(unfit)
    yield from _stages(reader, told)


def missing_of(reader: TraceReader) -> dict[str, list[str]]:
    """Predictor -> what it needs and this trace lacks."""
    found = {}
    for name in config.choices("predictor"):
        if name in ON_ITS_OWN:
            continue
        leaf: Any = OmegaConf.load(config.CONFIGS / "predictor" / f"{name}.yaml")
        try:
            needs = getattr(leaves.locate(str(leaf["_target_"])), "needs", ())
        except ConfigError:  # somebody's own, whose module is not at hand here
            found[name] = [f"{leaf['_target_']}, which cannot be imported"]
            continue
        missing = [column for column in needs if column not in reader.columns]
        beside = BESIDE.get(name)
        found[name] = missing + [beside] * (beside not in (None, *names_beside(reader)))
    return found


def _stages(reader: TraceReader, told: Description) -> Iterator[Row]:
    numbers, card = told.metrics(), reader.card
    if numbers["requests"] < FOLDS:
        yield (
            "train, evaluate",
            f"{numbers['requests']:.0f} requests: too few to hold some out, split in time",
        )
    if card.expert_bytes_L is None:
        yield (
            "evaluate, advise",
            "bytes and times need simulator.model_card=..., the card knows no sizes",
        )
    if card.n_layers == 1:
        yield "train", "one layer: there is no later layer to guess"
    if not numbers["decode_tokens"]:
        yield "evaluate", "prompts only: a replay token by token is teacher-forced decode"
    if numbers["domains"] < 2:
        yield "analyze", "no comparison of domains: it takes two"
    if not {"weights", "scores"} & set(reader.columns):
        yield "analyze", "no confidence of the router: neither weights nor scores"
    if numbers["tokens"] == numbers["not_executed_tokens"]:
        yield "every stage", "no row was executed: nothing can be replayed"


def show_lines(lines: Sequence[str], outputs: Outputs) -> None:
    """What an operation has to say: on the screen, and in `said.txt`."""
    for line in lines:
        print(line)
    (outputs.folder / LINES).write_text("".join(f"{line}\n" for line in lines))


def _print_rows(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(width=max(100, Console().width)).print(table)


def _print_table(title: str, frame: pd.DataFrame) -> None:
    table = Table(title=Text(title), title_justify="left")
    for name in frame:
        table.add_column(str(name), justify="left" if name == "domain" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(f"{v:,}" if isinstance(v, int) else str(v)) for v in row))
    Console(width=max(100, Console().width)).print(table)
