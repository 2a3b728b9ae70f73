"""Reads an offline run of Weights & Biases back: config, summary, history, tables, group, state. It imports no client.

The file is a log in LevelDB's format (blocks of 32 KiB) of protobuf records; the numbers of the fields are those of
wandb's published wandb_internal.proto, where a number never changes its meaning, so files of other versions are read
for what is known of them. A run that was killed is read as far as it was written.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefetch.errors import FormatError, reading

MAGIC = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
HEADER = 7  # of a block's record: checksum, size, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
Message = dict[int, list[Any]]  # field number -> values, in order: numbers or bytes


@dataclass(frozen=True)
class LoggedArtifact:
    """An artifact that a run declared: what it is and where its files lie; nothing of its content."""

    type: str
    name: str
    digest: str
    aliases: list[str]
    metadata: dict[str, Any]
    references: dict[str, str]  # file in the artifact -> where it lies
    copied: list[str]  # files that were copied for an upload
    is_input: bool = False  # the run stood on it; it did not make it


@dataclass
class OfflineRun:
    """What one `run-*.wandb` says."""

    path: Path
    run_id: str = ""
    entity: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    started_s: int = 0  # since 1970
    client: str = ""  # version that wrote it
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows, with _step
    step_metrics: dict[str, str] = field(default_factory=dict)  # metric or glob -> its x axis
    artifacts: list[LoggedArtifact] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # names of artifacts that an online run consumed
    exit_code: int | None = None  # None = no end was written: killed, or still at work
    cut: str | None = None  # why reading ended before the end of the file

    @property
    def state(self) -> str:
        if self.exit_code is None:
            return "unfinished"
        return "failed" if self.exit_code else "finished"

    @property
    def files(self) -> Path:
        """The folder of its tables and pictures."""
        return self.path.parent / "files"

    def tables(self) -> list[str]:
        return [name for name, value in self.summary.items() if _is_a(value, "table-file")]

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table that the summary names."""
        value = self.summary.get(name)
        if not isinstance(value, dict) or not _is_a(value, "table-file"):
            raise FormatError(f"{self.path}: has no table {name!r}; there are {self.tables()}")
        path = self._inside(value.get("path"))
        with reading(path, "a table of W&B as JSON"):
            content = json.loads(path.read_bytes())
            return list(content["columns"]), [list(row) for row in content["data"]]

    def pictures(self) -> dict[str, Path]:
        found = {name: v for name, v in self.summary.items() if _is_a(v, "image-file")}
        return {name: self._inside(value.get("path")) for name, value in found.items()}

    def _inside(self, path: object) -> Path:
        """A file's own word on where it lies is not followed out of its folder."""
        target = (self.files / str(path)).resolve()
        if not target.is_relative_to(self.files.resolve()):
            raise FormatError(f"{self.path}: names the file {path!r}, which lies outside its run")
        return target


def find_offline_runs(folder: Path) -> list[Path]:
    """Every offline run below a folder, or the one that is named itself; the oldest first."""
    if folder.is_file():
        return [folder]
    return sorted(folder.rglob("*run-*/run-*.wandb"), key=lambda path: path.parent.name)


def read_offline_run(path: Path) -> OfflineRun:
    """The run as far as it was written; a file that is none is an error by name."""
    with reading(path, "an offline run of W&B (run-ID.wandb)"):
        run = OfflineRun(path, run_id=path.stem.removeprefix("run-"))
        data = path.read_bytes()
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            raise FormatError(f"begins with {data[:7]!r}, not with {MAGIC!r}")
        for record in _records(data, run):
            _take(run, _message(record))
        for row in run.history if run.exit_code is None else []:
            run.summary |= row  # a run that was killed may have written no summary
        for told in (run.config, run.summary):
            told.pop("_wandb", None)  # the client's own notes
        return run


def _records(data: bytes, run: OfflineRun) -> Iterator[bytes]:
    """The log's records, put together from their parts; `run.cut` says why it ended early."""
    at, parts = len(MAGIC), b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + HEADER : at + HEADER + size]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(part) < size:
            run.cut = f"byte {at}: the record is not complete"
            return
        if zlib.crc32(bytes([kind]) + part) != checksum:
            run.cut = f"byte {at}: the record's checksum is wrong"
            return
        parts = part if kind in (FULL, FIRST) else parts + part
        at += HEADER + size
        if kind in (FULL, LAST):
            yield parts
    if run.exit_code is None:
        run.cut = f"byte {len(data)}: no end of the run was written"


def _take(run: OfflineRun, record: Message) -> None:
    """Adds what one record says; records of other kinds (system metrics, console) are passed over."""
    for number, take in TAKERS.items():
        for part in record.get(number, []):
            take(run, _message(part))


def _take_run(run: OfflineRun, said: Message) -> None:
    names = {1: "run_id", 2: "entity", 3: "project", 6: "group", 7: "job_type", 8: "name"}
    for number, name in names.items():
        setattr(run, name, _text(said, number) or getattr(run, name))
    run.tags = [tag.decode(errors="replace") for tag in said.get(10, [])] or run.tags
    for part in said.get(17, []):
        run.started_s = _message(part).get(1, [0])[-1]
    for part in said.get(4, []):
        _update(run.config, _message(part))


def _take_history(run: OfflineRun, said: Message) -> None:
    row: dict[str, Any] = {}
    for part in said.get(2, []):
        row["_step"] = _message(part).get(1, [0])[-1]
    for part in said.get(1, []):
        _put(row, _message(part))
    run.history.append(row)


def _take_metric(run: OfflineRun, said: Message) -> None:
    run.step_metrics[_text(said, 1) or _text(said, 2)] = _text(said, 4)


def _take_request(run: OfflineRun, said: Message) -> None:
    """Artifacts of some versions: a request that was kept."""
    for logged in said.get(13, []):
        run.artifacts += [_artifact(_message(part)) for part in _message(logged).get(1, [])]


def _take_header(run: OfflineRun, said: Message) -> None:
    for version in said.get(1, []):
        run.client = _text(_message(version), 1).partition("+")[0]


def _take_exit(run: OfflineRun, said: Message) -> None:
    run.exit_code = _signed(said.get(1, [0])[-1])


def _update(target: dict[str, Any], said: Message) -> None:
    for part in said.get(1, []):
        _put(target, _message(part))
    for part in said.get(2, []):
        item = _message(part)
        target.pop(_path_of(item)[0], None)


def _put(target: dict[str, Any], item: Message) -> None:
    *outer, last = _path_of(item)
    for name in outer:
        inner = target.get(name)
        target[name] = inner if isinstance(inner, dict) else {}
        target = target[name]
    target[last] = _value(item)


def _path_of(item: Message) -> list[str]:
    return [key.decode(errors="replace") for key in item.get(2, [])] or [_text(item, 1)]


def _value(item: Message) -> Any:
    """JSON in all versions; newer ones also write a history's plain values as such."""
    if 16 in item:
        return json.loads(item[16][-1])
    if 4 in item:
        return bool(item[4][-1])
    if 5 in item:
        return (item[5][-1] >> 1) ^ -(item[5][-1] & 1)  # zigzag
    if 6 in item:
        return struct.unpack("<d", item[6][-1])[0]
    if 8 in item:
        return json.loads(item[8][-1])
    return _text(item, 7) if 7 in item else None


def _artifact(said: Message) -> LoggedArtifact:
    manifest = [_message(part) for part in said.get(12, [])]
    entries = [_message(part) for one in manifest for part in one.get(4, [])]
    return LoggedArtifact(
        type=_text(said, 4),
        name=_text(said, 5),
        digest=_text(said, 6),
        aliases=[alias.decode(errors="replace") for alias in said.get(11, [])],
        metadata=json.loads(_text(said, 8) or "{}"),
        references={_text(entry, 1): _text(entry, 3) for entry in entries if 3 in entry},
        copied=[_text(entry, 1) for entry in entries if 6 in entry],
        is_input=bool(said.get(10, [0])[-1]),
    )


TAKERS: dict[int, Callable[[OfflineRun, Message], None]] = {  # field of a record -> what reads it
    2: _take_history,
    3: lambda run, said: _update(run.summary, said),
    5: lambda run, said: _update(run.config, said),
    8: lambda run, said: run.artifacts.append(_artifact(said)),
    12: _take_metric,
    17: _take_run,
    18: _take_exit,
    21: _take_header,
    25: lambda run, said: run.used.append(_text(said, 3)),
    100: _take_request,
}


def _message(data: bytes) -> Message:
    """Protobuf's wire format: fields by their number, whatever they mean."""
    found: Message = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, value = tag & 7, b""
        if kind == 0:
            number, at = _varint(data, at)
            found.setdefault(tag >> 3, []).append(number)
            continue
        if kind not in (1, 2, 5):
            raise FormatError(f"a field of wire type {kind}, which no version writes")
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        value = data[at : at + size]
        if len(value) < size:
            raise FormatError("a field longer than its record")
        at += size
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _text(said: Message, number: int) -> str:
    values = said.get(number, [])
    return values[-1].decode(errors="replace") if values else ""


def _is_a(value: object, kind: str) -> bool:
    return isinstance(value, dict) and value.get("_type") == kind
