"""A trace, or counts, written in a format of others: which there are, and what each leaves out, a line each.

The formats themselves stand in `exports`. Whatever is written can be read back by a source of ours.
"""

from __future__ import annotations

from pathlib import Path

from prefetch.errors import ConfigError
from prefetch.trace.beside import names_beside
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.describe import Description, describe
from prefetch.trace.exports import arrays, counts, esft, imatrix, route_csv, vllm
from prefetch.trace.parquet import TraceReader
from prefetch.trace.rewrite import Written, kept_columns
from prefetch.trace.target import check_apart, new_file, new_folder

OF_COUNTS = {
    "counts": counts.write_json,
    "counts_npz": counts.write_npz,
    "specmoe_dense": counts.write_specmoe_dense,
    "specmoe_sparse": counts.write_specmoe_sparse,
    "locality": counts.write_locality,
    "imatrix": imatrix.write_imatrix,
}
OF_TRACES = ("npz", "parquet", "route_csv", "esft", "vllm")
HOLDS_EVERY_COLUMN = ("npz", "parquet")
BY_SUFFIX = {
    ".npz": "npz",
    ".parquet": "parquet",
    ".csv": "route_csv",
    ".jsonl": "vllm",
    ".json": "counts",
    ".gguf": "imatrix",
}
SUFFIX = {
    "counts_npz": ".npz",
    "specmoe_dense": ".json",
    "specmoe_sparse": ".json",
    "locality": ".json",
}
SUFFIX |= {format: suffix for suffix, format in BY_SUFFIX.items()}


def export(
    trace: TraceReader | Path | str,
    to: Path | str,
    format: str | None = None,
    *,
    leave_out: tuple[str, ...] = (),
) -> Written:
    """Writes the trace to the new file `to` (a folder for esft); format None = by the suffix of `to`."""
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    check_apart(to, reader.folder)
    chosen, columns = format_of(to, format), kept_columns(reader, leave_out)
    told = describe(reader)
    if chosen in OF_COUNTS:
        said = _write_counts(counts.count_experts(reader), Path(to), chosen)
    elif chosen == "esft":
        with new_folder(to) as folder:
            said = esft.write_esft(reader, folder, told)
    else:
        said = _write_rows(reader, Path(to), chosen, columns, told)
    if chosen not in HOLDS_EVERY_COLUMN and (lost := _lost(reader, columns)):
        said.append(f"not held: {', '.join(lost)}, which the trace has")
    said += [f"left out: {name}, as asked" for name in reader.columns if name in leave_out]
    if reader.provenance.kind == "synthetic":
        said.append(
            "drawn routing: the format cannot say so, and read back it would pass for recorded"
        )
    return Written(Path(to), reader.n_tokens, reader.n_requests, tuple(said))


def export_counts(found: ExpertCounts, to: Path | str, format: str | None = None) -> Written:
    """Counts that never were a trace."""
    chosen = format_of(to, format, of_counts=True)
    if chosen not in OF_COUNTS:
        raise ConfigError(
            f"format={chosen}: holds the order of choices, which counts have not; expected {', '.join(OF_COUNTS)}"
        )
    said = _write_counts(counts.alone(found), Path(to), chosen)
    return Written(Path(to), 0, 0, tuple(said))


def format_of(to: Path | str, format: str | None, *, of_counts: bool = False) -> str:
    """The format by its name, or by the suffix of the file."""
    known = (*OF_TRACES, *OF_COUNTS)
    suffix = Path(to).suffix
    if format is None:
        if suffix not in BY_SUFFIX:
            raise ConfigError(
                f"{to}: which format? Pass one of {', '.join(known)}, or a name ending in {', '.join(BY_SUFFIX)}"
            )
        return "counts_npz" if of_counts and suffix == ".npz" else BY_SUFFIX[suffix]
    if format not in known:
        raise ConfigError(f"format={format}: expected one of {', '.join(known)}")
    if suffix != SUFFIX.get(format, suffix):
        raise ConfigError(f"{to}: a file of format {format} ends in {SUFFIX[format]}")
    return format


def _lost(reader: TraceReader, columns: list[str]) -> list[str]:
    """What was recorded beside choices and weights, of which the formats' own lines speak."""
    unsaid = [name for name in columns if name not in ("weights", "score_ids")]
    return [*unsaid, *names_beside(reader)]


def _write_counts(counted: counts.Counted, to: Path, chosen: str) -> list[str]:
    with new_file(to) as path:
        said = OF_COUNTS[chosen](counted, path) or []
    return [*counts.cannot(counted, chosen), *said]


def _write_rows(
    reader: TraceReader, to: Path, chosen: str, columns: list[str], told: Description
) -> list[str]:
    with new_file(to) as path:
        if chosen == "route_csv":
            return route_csv.write_route_csv(reader, path, columns)
        if chosen == "vllm":
            return vllm.write_vllm(reader, path)
        write = arrays.write_npz if chosen == "npz" else arrays.write_parquet
        write(reader, path, columns)
    return arrays.cannot(reader, told, columns)
