"""Stage `diagnose`: a profile of a real MoE run in; where its time goes, why, and what would help, out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.device import page, rows, seed_files, tracelens
from analysis.device.beside import Beside, active_of
from analysis.device.diagnosis import Diagnosis, Profile, diagnose, diagnose_tables, read
from analysis.device.doubts import waiting
from analysis.device.findings import ERROR, NOT_JUDGED
from analysis.device.machine import judging_hardware
from analysis.device.names import Names, load_names
from analysis.device.offload import MOST_ROWS, Offloaded, offloaded
from analysis.device.operations import Active
from analysis.device.plain_text import one_line, shown
from analysis.device.roofline import BYTES, Peaks, peaks_of
from analysis.device.shapes import Given, Known
from analysis.device.step_routing import step_routing
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, FormatError, MissingData
from prefetch.models.cards import load_architecture, load_card
from prefetch.runs.outputs import Outputs, write_json
from prefetch.sim.hardware import Hardware
from prefetch.trace.parquet import TraceReader

if TYPE_CHECKING:
    from analysis.device.routing_tables import RoutingTables

log = logging.getLogger(__name__)
NO_TOKENS = "the profile does not tell the tokens of a step: pass diagnose.tokens beside trace="
SYNTHETIC = (
    "The routing (trace=) is synthetic: drawn from a process, no model chose it. What is said of it shows what routing "
    "like it would cost, not how this run routed."
)
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
    if (path / "findings.json").is_file():
        raise ConfigError(
            f"profile_trace={given}: is what stage=diagnose left: pass the profile that it was made from"
        )
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
    peaks = None if hardware is None else peaks_of(hardware, host=profile.trace.is_cpu)
    beside = Beside(peaks, notes=[why])
    if cfg.trace is not None:
        tokens = given.tokens or known.step_tokens or _tokens_of_calls(profile)
        beside = _with_routing(cfg, cfg.trace, beside, hardware, tokens, profile.is_decode)
    return diagnose(profile, known, beside)


def _of_tables(cfg: Config, path: Path, known: Known) -> Diagnosis:
    """The folder's own peaks, unless a hardware file was chosen; with routing its operations are judged again."""
    hardware, why = judging_hardware(cfg, {}, is_cpu=False)
    peaks = peaks_of(hardware) if hardware is not None else None
    found = _read_tables(path, known, peaks, None)
    beside = Beside(notes=[] if found.peaks is not None and hardware is None else [why])
    if cfg.trace is not None:
        sizes = {op.shape.tokens for op in found.operations if op.shape.tokens is not None}
        tokens = known.given.tokens or (sizes.pop() if len(sizes) == 1 else None)
        beside = _with_routing(cfg, cfg.trace, beside, hardware, tokens, None)
        found = _read_tables(path, known, peaks, active_of(beside.routing))
    return diagnose_tables(found, known, beside)


def _read_tables(
    path: Path, known: Known, peaks: Peaks | None, active: Active | None
) -> tracelens.TraceLensOutput:
    if path.is_dir():
        return tracelens.read_output(path, known, peaks, active)
    table = tracelens.read_table(path, known, peaks, active)
    return tracelens.TraceLensOutput(path, table, None, peaks, {})


def _with_routing(
    cfg: Config,
    source: str,
    beside: Beside,
    hardware: Hardware | None,
    tokens: int | None,
    told: bool | None,
) -> Beside:
    """`told`: whether the profile's steps only generate, where it says."""
    if tokens is None:
        raise ConfigError(NO_TOKENS)
    trace, notes = TraceReader(source), list(beside.notes)
    is_decode = _is_decode(cfg, told, notes)
    routing = step_routing(trace, tokens, is_decode=is_decode, source=source)
    # what judges routing is slow to import, and most profiles come without
    from analysis.device.routing_tables import routing_tables

    tables = routing_tables(trace, routing.steps)
    notes += [
        f"{name} of the routing: not computable ({why})" for name, why in tables.missing.items()
    ]
    simulated = _offloaded(cfg, trace, hardware, notes)
    doubts = [SYNTHETIC] if trace.provenance.kind == "synthetic" else []
    return Beside(beside.peaks, routing, _remedies(tables), simulated, tables.tables, doubts, notes)


def _tokens_of_calls(profile: Profile) -> int | None:
    """Of the operations that were called with tokens, if all had as many."""
    listed = [kept.get("Input Dims") for kept in profile.trace.inputs]
    firsts = [dims[0] for dims in listed if isinstance(dims, list) and dims]
    sizes = [dims[0] for dims in firsts if isinstance(dims, list) and len(dims) == 2]
    found = {size for size in sizes if isinstance(size, int) and size > 0}
    return found.pop() if len(found) == 1 else None


def _is_decode(cfg: Config, told: bool | None, notes: list[str]) -> bool:
    if cfg.diagnose.phase != "auto":
        return bool(cfg.diagnose.phase == "decode")
    if told is None:
        notes.append(
            "Steps of the routing are taken as prompts (consecutive tokens): pass diagnose.phase=decode if not."
        )
    return bool(told)


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
    for text in filter(None, [*found.doubts, waiting(found.times)]):
        print(one_line(text))
    listed = [rows.operation_row(op, found.moe_ns) for op in found.operations]
    tables = {"operations": pd.DataFrame(listed), "kernels": found.kernels}
    for name, table in {**tables, "passages": found.layer_us, **found.sections}.items():
        outputs.table(name, table)
    (outputs.folder / "findings.md").write_text(page.page(found), encoding="utf-8")
    write_json(outputs.folder / "findings.json", rows.to_json(found))
    if cfg.diagnose.compatible:
        seed_files.write(found, outputs.folder)
    numbers = rows.metrics(found)
    outputs.metrics(numbers)
    if cfg.diagnose.figures:
        _draw(found, outputs)
    told = [one for one in found.findings if found.peaks is not None or one.kind != NOT_JUDGED]
    for one in told:  # without a device a note says it once
        print(one_line(f"{one.kind}: {one.title}, {one.time_ns / 1e3:,.1f} µs: {one.why}"))
    for note in found.notes:
        print(one_line(note))
    return numbers


def _draw(found: Diagnosis, outputs: Outputs) -> None:
    from analysis.device.pictures import draw_all  # matplotlib: slow, and not everyone draws

    for path in draw_all(found, outputs.folder):
        if path.suffix == ".png":
            outputs.figure(path)


def _write_error(cfg: Config, error: str, outputs: Outputs) -> None:
    print(ERROR)
    told: Mapping[str, Any] = {"status": ERROR, "source": str(cfg.profile_trace), "error": error}
    write_json(outputs.folder / "findings.json", told)
    text = f"# Diagnosis\n\n**{ERROR}**\n\n{shown(error)}\n"
    (outputs.folder / "findings.md").write_text(text, encoding="utf-8")
    if cfg.diagnose.compatible:
        seed_files.write_error(error, outputs.folder)
