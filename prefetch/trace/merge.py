"""Several traces of one model as one: requests numbered on, domains kept, every input named with its key.

It refuses what would be no trace of one model: cards that differ in a field, routers that differ, drawn beside recorded
routing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prefetch.artifacts import Outside
from prefetch.errors import ConfigError, FormatError
from prefetch.progress import Progress
from prefetch.trace.beside import merge_beside
from prefetch.trace.parquet import TraceReader
from prefetch.trace.provenance import Provenance
from prefetch.trace.rewrite import Rewriter, Written, as_note, kept_columns
from prefetch.trace.routing import RoutingTrace
from prefetch.trace.target import check_apart, new_folder


def merge(
    traces: Sequence[TraceReader | Path | str],
    to: Path | str,
    *,
    domains: Sequence[str | None] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Written:
    """Writes them one after the other into the new folder `to`; `domains` names one per trace, None = its own."""
    readers = [t if isinstance(t, TraceReader) else TraceReader(t) for t in traces]
    names = list(domains) if domains is not None else [None] * len(readers)
    check_alike(readers, names)
    check_apart(to, *(reader.folder for reader in readers))
    columns, said = shared_columns(readers, leave_out)
    total = sum(reader.n_tokens for reader in readers)
    with new_folder(to) as folder, Progress("merging", total, "tokens") as progress:
        writer = Rewriter(folder, readers[0].card)
        for reader, name in zip(readers, names, strict=True):
            for block in reader.batches(*columns):
                writer.add(_named(block, name), str(reader.folder))
                progress.advance(block.n_tokens)
        said += merge_beside(readers, folder)
        writer.close(_provenance(readers, names, said))
    return Written(Path(to), writer.tokens, writer.requests, tuple(said))


def check_alike(readers: Sequence[TraceReader], names: Sequence[str | None]) -> None:
    if len(readers) < 2:
        raise ConfigError(f"merge: expected two traces or more, got {len(readers)}")
    if len(names) != len(readers):
        raise ConfigError(
            f"domains: expected one for each of the {len(readers)} traces (null keeps its own), got {len(names)}"
        )
    places = [reader.folder.resolve() for reader in readers]
    if twice := [place for i, place in enumerate(places) if place in places[:i]]:
        raise ConfigError(f"merge: {twice[0]} is named twice; its requests would stand there twice")
    first = readers[0]
    for reader in readers[1:]:
        if reader.provenance.kind != first.provenance.kind:
            raise FormatError(
                f"{reader.folder}: is {reader.provenance.kind}, {first.folder} is {first.provenance.kind}: drawn and "
                "recorded routing are never mixed"
            )
        ours, theirs = first.card.to_json(), reader.card.to_json()
        for field, value in ours.items():
            if theirs[field] != value:
                raise FormatError(
                    f"{reader.folder}: not the same model: {field} is {_short(theirs[field])}, in {first.folder} it "
                    f"is {_short(value)}"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def shared_columns(
    readers: Sequence[TraceReader], leave_out: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """What all have recorded alike, and a line for each column that not all have."""
    columns = {name: kept_columns(reader, ()) for reader in readers for name in [reader.folder]}
    shared, said = [], []
    kept_columns(readers[0], leave_out)  # refuses unknown names
    for name in dict.fromkeys(name for names in columns.values() for name in names):
        if name in leave_out or (name == "score_ids" and "scores" in leave_out):
            said.append(f"left out: {name}, as asked")
            continue
        lacking = [reader.folder for reader in readers if name not in reader.columns]
        kinds = {reader.columns[name] for reader in readers if name in reader.columns}
        if lacking:
            said.append(f"left out: {name}, which {lacking[0]} has not recorded")
        elif len(kinds) > 1:
            shapes = sorted(str(list(shape)) for _, shape in kinds)
            said.append(f"left out: {name}, recorded in unequal shapes {', '.join(shapes)}")
        else:
            shared.append(name)
    return _whole_scores(shared, columns, said), said


def _whole_scores(shared: list[str], columns: dict[Path, list[str]], said: list[str]) -> list[str]:
    """Scores of the best M mean nothing without their ids, nor ids without their scores."""
    named = any("score_ids" in names for names in columns.values())
    if named and ("scores" in shared) != ("score_ids" in shared):
        alone = "scores" if "scores" in shared else "score_ids"
        said.append(f"left out: {alone}, whose other half not all of the traces have")
        return [name for name in shared if name != alone]
    return shared


def _named(block: RoutingTrace, name: str | None) -> RoutingTrace:
    if name is None:
        return block
    return dataclasses.replace(block, domains=(name,), domain_T=np.zeros(block.n_tokens, np.int32))


def _provenance(
    readers: Sequence[TraceReader], names: Sequence[str | None], said: list[str]
) -> Provenance:
    told = [reader.provenance for reader in readers]
    inputs: dict[str, str] = {}
    notes = [f"{len(readers)} traces, one after the other", *said]
    dropped: dict[str, int] = {}
    for i, (reader, name, own) in enumerate(zip(readers, names, told, strict=True), start=1):
        inputs[f"trace {i}"] = Outside("trace", reader.folder).key
        inputs |= {f"trace {i}: {file}": digest for file, digest in own.inputs.items()}
        if name is not None:
            notes.append(f"trace {i}: its domain was set to {name}")
        notes += as_note(f"measured on trace {i}", own.facts)
        for why, rows in own.dropped_rows.items():
            dropped[why] = dropped.get(why, 0) + rows
    notes += [
        note for note in dict.fromkeys(n for own in told for n in own.notes) if note not in notes
    ]
    seeds = {own.seed for own in told}
    return Provenance(
        kind=told[0].kind,
        source=" + ".join(dict.fromkeys(own.source for own in told)),
        versions=_versions(told),
        seed=seeds.pop() if len(seeds) == 1 else None,
        inputs=inputs,
        dropped_rows=dropped,
        notes=tuple(notes),
    )


def _versions(told: Sequence[Provenance]) -> dict[str, str]:
    """Of every tool the versions that took part."""
    found: dict[str, list[str]] = {}
    for own in told:
        for tool, version in own.versions.items():
            found.setdefault(tool, [])
            if version not in found[tool]:
                found[tool].append(version)
    return {tool: ", ".join(versions) for tool, versions in found.items()}
