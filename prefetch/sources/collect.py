"""Stage `collect`: a trace (or counts) from the chosen source, found again if it was collected before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch import __version__
from prefetch.artifacts import Artifact, Build, Outside, Recipe, Store, library_version
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError
from prefetch.leaves import instantiate
from prefetch.manifest import MANIFEST
from prefetch.runs.outputs import Outputs
from prefetch.sources.ranks import Meeting, Rank
from prefetch.sources.source import Source
from prefetch.trace.counts import ExpertCounts, load_counts
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance

RECIPE = 2  # raise it when the trace format or its checks change what is written


def run(cfg: Config, store: Store, outputs: Outputs) -> dict[str, float]:
    """Collects or finds, prints what there is in a short table, and writes `metrics.json`."""
    artifact = _made(cfg, store)
    metrics, facts = describe(artifact)
    dropped = metrics["dropped_rows"]
    if dropped > cfg.collect.max_dropped * (dropped + metrics["tokens"]):
        raise FormatError(
            f"{artifact.folder}: {dropped} of {dropped + metrics['tokens']} rows were dropped, more than "
            f"collect.max_dropped={cfg.collect.max_dropped} allows"
        )
    outputs.metrics(metrics)
    if (rank := Rank.of_environment()) is None or rank.number == 0:
        _print(artifact, facts)
    return metrics


def _made(cfg: Config, store: Store) -> Artifact:
    """In this process, or by all that were started together, each a share of the batches."""
    rank = Rank.of_environment()
    source: Any = None if rank is None or cfg.trace else instantiate(cfg.source, "source")
    if rank is None or not hasattr(source, "record_with"):
        return store.make(routing_recipe(cfg))
    recipe = cast(Recipe, trace_recipe(cfg))
    folder = store.root / recipe.kind / recipe.key
    with Meeting(rank, folder) as meeting:
        if rank.number == 0:
            return store.make(trace_recipe(cfg, meeting))

        def is_made() -> bool:  # what is damaged the first process makes again, with all of us
            return store.is_whole(recipe)

        if meeting.wait_for_opening(is_made):
            source.record_with(meeting, None)
            meeting.wait_until(is_made)
        return store.make(recipe)


def routing_recipe(cfg: Config) -> Recipe | Outside:
    """A trace; counts, where that is all that the source has."""
    has_rows = cfg.trace is not None or instantiate(cfg.source, "source").gives == "trace"
    return trace_recipe(cfg) if has_rows else counts_recipe(cfg)


def trace_recipe(cfg: Config, meeting: Meeting | None = None) -> Recipe | Outside:
    """What a trace is made from: the folder that the user named, or the source and its settings.

    With a meeting other processes record a share of it each; no byte depends on that.
    """
    if cfg.trace is not None:
        reader = TraceReader(cfg.trace)
        if not (reader.folder / MANIFEST).exists():  # no store has sealed it
            from prefetch.trace.checks import check_trace

            check_trace(reader)
        return Outside("trace", reader.folder)
    source: Source = instantiate(cfg.source, "source")
    if source.gives != "trace":
        raise ConfigError(
            f"source {type(source).__name__} has only counts, without order; this needs a trace"
        )

    def build(folder: Path, upstream: Mapping[str, Path]) -> None:
        from prefetch.trace.writer import TraceWriter  # slow to import, and not needed to find

        writer = TraceWriter(
            folder, _provenance(source, recipe), max_dropped=cfg.collect.max_dropped
        )
        if meeting is None:
            source.record(writer, upstream)
        else:
            meeting.open()
            cast(Any, source).record_with(meeting, writer)
        writer.close()

    recipe = _recipe("trace", source, build)
    return recipe


def counts_recipe(cfg: Config) -> Recipe:
    source: Source = instantiate(cfg.source, "source")

    def build(folder: Path, _upstream: Mapping[str, Path]) -> None:
        source.count(_provenance(source, recipe)).save(folder)

    recipe = _recipe("counts", source, build)
    return recipe


def _recipe(kind: str, source: Source, build: Build) -> Recipe:
    return Recipe(
        kind=kind,
        version=RECIPE * 1000 + source.version,
        config={"source": _name(source), **source.settings()},
        build=build,
        upstream=source.upstream(),
        libraries=source.libraries,
        files=source.files(),
    )


def _name(source: Source) -> str:
    """The module's name: what the user typed after source=."""
    return type(source).__module__.rpartition(".")[2]


def _provenance(source: Source, recipe: Recipe) -> Provenance:
    return Provenance(
        kind="real" if source.real else "synthetic",
        source=_name(source),
        versions={
            "prefetch": __version__,
            **{name: library_version(name) for name in source.libraries},
        },
        seed=getattr(source, "seed", None),
        inputs=recipe.identity["files"],
    )


def describe(artifact: Artifact) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """The metrics of a collected artifact, and the rows that a person reads."""
    if artifact.kind == "counts":
        counts = load_counts(artifact.folder)
        metrics, rows = _of_counts(counts)
        card, provenance = counts.card, counts.provenance
    else:
        reader = TraceReader(artifact.folder)
        card, provenance = reader.card, reader.provenance
        metrics = {"tokens": reader.n_tokens, "requests": reader.n_requests}
        rows = [("tokens", f"{reader.n_tokens:,}"), ("requests", f"{reader.n_requests:,}")]
        rows.append(("recorded", ", ".join(reader.columns)))
        rows.append(("domains", ", ".join(reader.domains) or "unknown"))
    seconds = float(artifact.manifest.get("seconds", 0.0))
    dropped = dict(provenance.dropped_rows)
    metrics |= {
        "layers": card.n_layers,
        "experts": card.n_experts,
        "top_k": card.top_k,
        "dropped_rows": sum(dropped.values()),
        "real": int(provenance.kind == "real"),
        "seconds": seconds,
        "tokens_per_second": metrics["tokens"] / seconds if seconds else 0.0,
        **provenance.facts,
    }
    rows += [
        ("layers", f"{card.n_layers} ({_numbers(card.layer_numbers)})"),
        ("experts, chosen", f"{card.n_experts}, {card.top_k}"),
        ("bytes per expert", _sizes(card.expert_bytes_L, card.expert_precision)),
        ("kind", f"{provenance.kind}, {card.name}, source={provenance.source}"),
        *((f"dropped: {why}", f"{n:,} rows") for why, n in dropped.items()),
        *(
            (name, f"{value:,.0f}" if value == int(value) else f"{value:.4g}")
            for name, value in provenance.facts.items()
        ),
        *(("note", note) for note in provenance.notes),
        ("seconds", f"{seconds:.1f} ({'made now' if artifact.was_made else 'found'})"),
    ]
    return metrics, rows


def _of_counts(counts: ExpertCounts) -> tuple[dict[str, float], list[tuple[str, str]]]:
    choices = int(counts.counts_LE.sum(axis=1).max())
    tokens = choices // counts.card.top_k
    return {"tokens": tokens, "requests": 0}, [
        ("tokens (most used layer)", f"{tokens:,}"),
        ("requests", "no order"),
    ]


def _numbers(numbers: tuple[int, ...]) -> str:
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"{numbers[0]} to {numbers[-1]}" + (f" by {step}" if step != 1 else "")
    return ", ".join(map(str, numbers))


def _sizes(sizes: tuple[int, ...] | None, precision: str | None) -> str:
    if sizes is None:
        return "unknown (pass source.model_card=... to lend a model's sizes)"
    span = (
        f"{min(sizes):,}"
        if min(sizes) == max(sizes)
        else f"{min(sizes):,} to {max(sizes):,} by layer"
    )
    return f"{span} ({precision or 'precision unknown'})"


def _print(artifact: Artifact, rows: list[tuple[str, str]]) -> None:
    table = Table(
        title=Text(f"{artifact.kind} {artifact.folder}"), show_header=False, title_justify="left"
    )
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(width=max(100, Console().width)).print(table)
