"""Stage `traces`: what can be done with a trace as a thing (describe, check, subset, merge, convert, migrate, export).

`trace=DIR` is what it works on, or whatever `source=` gives. The work is done in `prefetch.trace`; this is its door.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from prefetch.artifacts import Outside, Store
from prefetch.config import Config, TracesConfig
from prefetch.errors import ConfigError, FormatError
from prefetch.manifest import MANIFEST, sha256_of
from prefetch.runs.outputs import Outputs
from prefetch.sources.collect import routing_recipe
from prefetch.sources.described import show_lines, show_trace
from prefetch.trace.checks import check_trace
from prefetch.trace.counts import ExpertCounts, load_counts
from prefetch.trace.export import export, export_counts
from prefetch.trace.findings import Finding, findings
from prefetch.trace.merge import merge
from prefetch.trace.migrate import migrate
from prefetch.trace.parquet import TraceReader
from prefetch.trace.rewrite import Written
from prefetch.trace.selection import Selection
from prefetch.trace.subset import subset
from prefetch.trace.target import new_folder

Metrics = dict[str, float]
SELECTS = ("domains", "requests", "layers", "phase", "first", "drawn", "tokens")
READS = {  # which options each of them reads; another one that is set is a mistake
    "describe": (),
    "check": (),
    "subset": ("to", *SELECTS, "leave_out"),
    "merge": ("to", "inputs", "domains", "leave_out"),
    "convert": ("to",),
    "migrate": ("to",),
    "export": ("to", "format", "leave_out"),
}


def run(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    """Does what `traces.do` says, tells what there is to say, and writes `metrics.json`."""
    deeds: dict[str, Callable[[Config, Store, Outputs], Metrics]] = {
        "describe": _describe,
        "check": _check,
        "subset": _subset,
        "merge": _merge,
        "convert": _convert,
        "migrate": _migrate,
        "export": _export,
    }
    check_options(cfg.traces)
    metrics = deeds[cfg.traces.do](cfg, store, outputs)
    outputs.metrics(metrics)
    return metrics


def check_options(asked: TracesConfig) -> None:
    if asked.do not in READS:
        raise ConfigError(f"traces.do={asked.do}: expected one of {', '.join(READS)}")
    reads = READS[asked.do]
    if "to" in reads and asked.to is None:
        raise ConfigError(
            f"traces.do={asked.do}: pass traces.to=PLACE, where the result is written"
        )
    for item in dataclasses.fields(TracesConfig):
        if item.name in ("do", *reads):
            continue
        value = getattr(asked, item.name)
        if value is not None and value != []:
            words = ", ".join(f"traces.{name}" for name in reads) or "none of traces.*"
            raise ConfigError(
                f"traces.{item.name}: traces.do={asked.do} does not read it; it reads {words}"
            )


def _describe(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    return show_trace(store.make(routing_recipe(cfg)), outputs)


def _check(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    """Every fault of a folder, a line each; damage is an error once all of it was told."""
    if cfg.trace is None:
        raise ConfigError("traces.do=check: pass trace=DIR, the folder to look at")
    folder = Path(cfg.trace)
    if not folder.is_dir():
        raise ConfigError(f"trace={folder}: no such folder")
    found = []
    for finding in findings(folder):
        print(finding.line(), flush=True)
        found.append(finding)
    damage = [finding for finding in found if finding.is_damage]
    outputs.table("findings", pd.DataFrame(map(vars, found), columns=_names(Finding)))
    metrics: Metrics = {"findings": len(found), "damaged": len(damage)}
    if damage:
        outputs.metrics(metrics)
        raise FormatError(
            f"{folder}: damaged in {len(damage)} places; the first: {damage[0].line()}"
        )
    sealed = "not sealed by a store"
    if (folder / MANIFEST).is_file():
        sealed = f"every file as it was sealed; sha256 of the seal {sha256_of(folder / MANIFEST)}"
    print(f"whole    {folder}: {sealed}")
    return metrics


def _names(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _subset(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    asked = cfg.traces
    named = {name: _plain(getattr(asked, name)) for name in SELECTS}
    if all(value is None for value in named.values()) and not asked.leave_out:
        raise ConfigError(
            "traces.do=subset: of what? Pass " + ", ".join(f"traces.{name}" for name in SELECTS)
        )
    chosen = Selection(**named, seed=cfg.seed)
    folder = store.need("trace", cfg).folder
    return _told(subset(folder, _to(asked), chosen, leave_out=tuple(asked.leave_out)), outputs)


def _merge(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    asked = cfg.traces
    if cfg.trace is not None or not asked.inputs:
        raise ConfigError(
            "traces.do=merge: pass traces.inputs=[DIR,DIR,...], the traces to put together"
        )
    for folder in asked.inputs:
        _opened(folder, store)
    domains = None if asked.domains is None else list(asked.domains)
    done = merge(list(asked.inputs), _to(asked), domains=domains, leave_out=tuple(asked.leave_out))
    return _told(done, outputs)


def _opened(folder: str, store: Store) -> None:
    """A trace that no store has sealed is checked; one that is sealed is compared with its seal."""
    reader = TraceReader(folder)
    if not (reader.folder / MANIFEST).exists():
        check_trace(reader)
    store.make(Outside("trace", reader.folder))


def _convert(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    """What a source reads, at a place of the user's own. What the store has already is copied."""
    if cfg.trace is not None:
        raise ConfigError(
            "traces.do=convert: makes a trace of what source= reads; trace= is one already (traces.do=export writes "
            "it in other formats)"
        )
    recipe = routing_recipe(cfg)
    assert not isinstance(recipe, Outside), "there is no trace= here"
    with new_folder(_to(cfg.traces)) as folder:
        if store.has(recipe):
            _copy(store.make(recipe).folder, folder)
        else:
            upstream = {name: store.make(part).folder for name, part in recipe.upstream.items()}
            recipe.build(folder, upstream)
    to = Path(_to(cfg.traces))
    if (to / "counts.json").is_file():
        return _told_counts(to, load_counts(to), outputs)
    reader = TraceReader(to)
    dropped = [f"dropped: {why}: {n} rows" for why, n in reader.provenance.dropped_rows.items()]
    said = (*dropped, *reader.provenance.notes)
    return _told(Written(to, reader.n_tokens, reader.n_requests, said), outputs)


def _copy(made: Path, folder: Path) -> None:
    """Without the seal: a folder outside a store is known by its content."""
    for path in made.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)


def _migrate(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    if cfg.trace is None:
        raise ConfigError("traces.do=migrate: pass trace=DIR, a trace of an older version")
    return _told(migrate(cfg.trace, _to(cfg.traces)), outputs)


def _export(cfg: Config, store: Store, outputs: Outputs) -> Metrics:
    asked, recipe = cfg.traces, routing_recipe(cfg)
    artifact = store.make(recipe)
    if artifact.kind == "counts":
        if asked.leave_out:
            raise ConfigError("traces.leave_out: counts have no columns")
        return _told(export_counts(load_counts(artifact.folder), _to(asked), asked.format), outputs)
    leave_out = tuple(asked.leave_out)
    return _told(export(artifact.folder, _to(asked), asked.format, leave_out=leave_out), outputs)


def _told(done: Written, outputs: Outputs) -> Metrics:
    """The lines of what was written, on the screen and in the run's folder."""
    n_bytes = _bytes(done.path)
    head = f"{done.path}: {done.tokens:,} tokens, {done.requests:,} requests, {n_bytes:,} bytes"
    show_lines([head, *done.said], outputs)
    return {
        "tokens": done.tokens,
        "requests": done.requests,
        "bytes": n_bytes,
        "notes": len(done.said),
    }


def _told_counts(to: Path, found: ExpertCounts, outputs: Outputs) -> Metrics:
    """What has no order is no trace, and is not told as an empty one."""
    layers, experts, choices = *found.counts_LE.shape, int(found.counts_LE.sum())
    show_lines(
        [
            f"{to}: counts of {choices:,} choices, {layers} layers of {experts} experts; {_bytes(to):,} bytes",
            "counts are no trace: trace= refuses them; stage=analyze takes them from their source=",
            *found.provenance.notes,
        ],
        outputs,
    )
    notes = len(found.provenance.notes)
    return {"choices": choices, "layers": layers, "bytes": _bytes(to), "notes": notes}


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _to(asked: TracesConfig) -> str:
    assert asked.to is not None, "checked by check_options"
    return asked.to


def _plain(value: Any) -> Any:
    """Hydra's lists as lists."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
