"""Stage `diagnose`: a profile of a real MoE run in; where its time goes, why, and what would help, out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.device import page, rows, seed_files, tracelens
from analysis.device.diagnosis import Beside, Diagnosis, Profile, diagnose, diagnose_tables, read
from analysis.device.findings import ERROR
from analysis.device.machine import judging_hardware
from analysis.device.names import Names, load_names
from analysis.device.offload import MOST_ROWS, Offloaded, offloaded
from analysis.device.roofline import BYTES, peaks_of
from analysis.device.routing_tables import RoutingTables, routing_tables
from analysis.device.shapes import Given, Known
from analysis.device.step_routing import step_routing
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError, MissingData
from prefetch.models.cards import load_architecture, load_card
from prefetch.sim.hardware import Hardware
from prefetch.trace.parquet import TraceReader
from prefetch.tracking import Outputs, write_json

log = logging.getLogger(__name__)
PHASES = ("auto", "decode", "prefill")
SUFFIXES = (".json", ".json.gz", ".gz")


def run(cfg: Config, _store: Store, outputs: Outputs) -> dict[str, float]:
    """The first line that it prints is the status; a profile that cannot be read is status ERROR, and an error."""
    names = load_names(cfg.diagnose.names)
    check(cfg)
    path = profile_path(cfg.profile_trace)
    try:
        found = _diagnosed(cfg, path, names)
    except FormatError as error:
        _write_error(cfg, str(error), outputs)
        raise
    return _write(cfg, found, outputs)


def check(cfg: Config) -> None:
    settings = cfg.diagnose
    sizes = ("tokens", "hidden", "inner", "experts", "top_k", "tensor_parallel", "expert_parallel")
    for name in sizes:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"diagnose.{name}={value}: must be at least 1")
    for name in ("weight", "activation"):
        value = getattr(settings, name)
        if value is not None and value not in BYTES:
            raise ConfigError(f"diagnose.{name}={value}: must be one of {', '.join(BYTES)}")
    if settings.phase not in PHASES:
        raise ConfigError(f"diagnose.phase={settings.phase}: must be one of {', '.join(PHASES)}")
    if settings.hardware not in ("auto", "chosen"):
        raise ConfigError(f"diagnose.hardware={settings.hardware}: must be auto or chosen")


def profile_path(given: str | None) -> Path:
    """A file, or a folder of TraceLens, or a folder with one profile in it."""
    if given is None:
        raise ConfigError(
            "profile_trace is missing: pass profile_trace=TRACE.json.gz, or a folder of TraceLens"
        )
    path = Path(given)
    if not path.exists():
        raise ConfigError(f"profile_trace={given}: does not exist")
    if path.is_file() or tracelens.is_output(path):
        return path
    inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
    if len(inside) == 1:
        return inside[0]
    listed = ", ".join(p.name for p in inside[:8]) or "none"
    raise ConfigError(
        f"profile_trace={given}: expected a profile, a folder of TraceLens, or a folder with one profile; found "
        f"{len(inside)} profiles ({listed}): name one"
    )


def _diagnosed(cfg: Config, path: Path, names: Names) -> Diagnosis:
    card = cfg.diagnose.model_card
    given = Given(**{one.name: getattr(cfg.diagnose, one.name) for one in fields(Given)})
    known = Known(names, given, load_architecture(card) if card else None)
    if path.is_dir() or path.suffix == ".csv":
        return _of_tables(cfg, path, known)
    profile = read(path, names)
    known = Known(names, given, known.card, profile.step_tokens, profile.trace.ranks)
    hardware, why = judging_hardware(cfg, profile.trace.meta, is_cpu=profile.trace.is_cpu)
    beside = _beside(cfg, known, hardware, why, profile)
    return diagnose(profile, known, beside)


def _of_tables(cfg: Config, path: Path, known: Known) -> Diagnosis:
    """The folder's own peaks, unless a hardware file was chosen."""
    hardware, why = judging_hardware(cfg, {}, is_cpu=False)
    peaks = peaks_of(hardware) if hardware is not None else None
    if path.is_dir():
        found = tracelens.read_output(path, known, peaks)
    else:
        table = tracelens.read_table(path, known, peaks)
        found = tracelens.TraceLensOutput(path, table, None, peaks, {})
    notes = [] if found.peaks is not None and hardware is None else [why]
    return diagnose_tables(found, known, Beside(notes=notes))


def _beside(
    cfg: Config, known: Known, hardware: Hardware | None, why: str, profile: Profile
) -> Beside:
    peaks = None if hardware is None else peaks_of(hardware, host=profile.trace.is_cpu)
    if cfg.trace is None:
        return Beside(peaks, notes=[why])
    trace, notes = TraceReader(cfg.trace), [why]
    tokens = known.given.tokens or known.step_tokens or _tokens_of_calls(profile)
    if tokens is None:
        raise ConfigError(
            "the profile does not tell the tokens of a step: pass diagnose.tokens beside trace="
        )
    is_decode = _is_decode(cfg, profile, notes)
    routing = step_routing(trace, tokens, is_decode=is_decode, source=str(cfg.trace))
    tables = routing_tables(trace, tokens)
    notes += [
        f"{name} of the routing: not computable ({reason})"
        for name, reason in tables.missing.items()
    ]
    return Beside(
        peaks,
        routing,
        _remedies(tables),
        _offloaded(cfg, trace, hardware, notes),
        tables.tables,
        notes,
    )


def _tokens_of_calls(profile: Profile) -> int | None:
    """Of the operations that were called with tokens, if all had as many."""
    listed = [kept.get("Input Dims") for kept in profile.trace.inputs]
    firsts = [dims[0] for dims in listed if isinstance(dims, list) and dims]
    sizes = [dims[0] for dims in firsts if isinstance(dims, list) and len(dims) == 2]
    found = {size for size in sizes if isinstance(size, int) and size > 0}
    return found.pop() if len(found) == 1 else None


def _is_decode(cfg: Config, profile: Profile, notes: list[str]) -> bool:
    if cfg.diagnose.phase != "auto":
        return bool(cfg.diagnose.phase == "decode")
    if profile.is_decode is None:
        notes.append(
            "Steps of the routing are taken as prompts (consecutive tokens): pass diagnose.phase=decode if not."
        )
    return bool(profile.is_decode)


def _remedies(tables: RoutingTables) -> pd.DataFrame:
    return tables.tables.get("remedies", pd.DataFrame())


def _offloaded(
    cfg: Config, trace: TraceReader, hardware: Hardware | None, notes: list[str]
) -> Offloaded | None:
    """Needs the bytes of an expert and a machine: what lacks is said, and nothing is made up."""
    if not cfg.diagnose.simulate:
        return None
    card = trace.card
    if card.expert_bytes_L is None and cfg.diagnose.model_card is not None:
        card = load_card(cfg.diagnose.model_card)
    if hardware is None or card.expert_bytes_L is None or card.n_layers != trace.card.n_layers:
        notes.append(
            "Pinning and prefetch: not computable without a hardware file and the bytes of an expert."
        )
        return None
    try:
        block = next(trace.batches(max_rows=MOST_ROWS))
        return offloaded(block, card, hardware, horizon=cfg.simulator.horizon)
    except (MissingData, ConfigError) as error:
        notes.append(f"Pinning and prefetch: not computable ({error})")
        return None


def _write(cfg: Config, found: Diagnosis, outputs: Outputs) -> dict[str, float]:
    print(page.first_line(found))
    outputs.table(
        "operations",
        pd.DataFrame([rows.operation_row(op, found.moe_ns) for op in found.operations]),
    )
    outputs.table("kernels", found.kernels)
    outputs.table("passages", found.layer_us)
    for name, table in found.sections.items():
        outputs.table(name, table)
    (outputs.folder / "findings.md").write_text(page.page(found))
    write_json(outputs.folder / "findings.json", rows.to_json(found))
    if cfg.diagnose.compatible:
        seed_files.write(found, outputs.folder)
    numbers = rows.metrics(found)
    outputs.metrics(numbers)
    if cfg.diagnose.figures:
        from analysis.device.pictures import draw_all  # matplotlib: slow, and not everyone draws

        for path in draw_all(found, outputs.folder):
            if path.suffix == ".png":
                outputs.figure(path)
    for one in found.findings:
        print(f"{one.kind}: {one.title}, {one.time_ns / 1e3:,.1f} µs: {one.why}")
    for note in found.notes:
        print(note)
    return numbers


def _write_error(cfg: Config, error: str, outputs: Outputs) -> None:
    print(ERROR)
    told: Mapping[str, Any] = {"status": ERROR, "source": str(cfg.profile_trace), "error": error}
    write_json(outputs.folder / "findings.json", told)
    (outputs.folder / "findings.md").write_text(f"# Diagnosis\n\n**{ERROR}**\n\n{error}\n")
    if cfg.diagnose.compatible:
        seed_files.write_error(error, outputs.folder)
