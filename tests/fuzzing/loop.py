"""One reader's inputs, one after the other: changed copies of its seeds, of which those that reach new lines are kept.

The inputs follow from the seed alone; a loop that was ended goes on from its notes.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from fuzzing import arrays, plain, streams, tables, trees
from fuzzing.readers import Files, Reader
from fuzzing.watch import ACCEPTED, DEFECT, ROOT, Outcome, Watch

TRACED = (
    0.2  # share of the inputs whose lines are followed: following costs three times the reading
)
MOST_KEPT = 400
MOST_DEFECTS = 40  # different ones that are kept with their inputs
FORMATS: dict[str, plain.Mutator] = {
    ".json": trees.json_file, ".jsonl": trees.json_lines, ".yaml": trees.yaml_file, ".npz": arrays.npz,
    ".npy": arrays.npy,
    ".safetensors": arrays.safetensors, ".pkl": streams.pickled, ".pt": streams.torch_file, ".wandb": streams.wandb,
    ".ckpt": streams.torch_file, ".gguf": streams.gguf, ".parquet": tables.parquet, ".csv": plain.text,
    ".txt": plain.text,
    ".log": plain.text, ".md": plain.text, ".svg": plain.text, ".png": plain.bytewise,
}  # fmt: skip


@dataclass
class Told:
    """What came of a reader's inputs so far."""

    reader: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    worst_s: float = 0.0
    worst_bytes: int = 0
    lines: int = 0  # of the project that were reached
    defects: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # in a line -> count, message, input

    def take(self, outcome: Outcome, number: int) -> bool:
        """Counts it; is it a defect that was not met before?"""
        self.inputs += 1
        self.seconds += outcome.seconds
        self.worst_s = max(self.worst_s, outcome.seconds)
        self.worst_bytes = max(self.worst_bytes, outcome.n_bytes)
        self.accepted += outcome.kind == ACCEPTED
        self.refused += outcome.kind not in (ACCEPTED, DEFECT)
        if outcome.kind != DEFECT:
            return False
        is_new = outcome.what not in self.defects
        if is_new:
            self.defects[outcome.what] = {"count": 0, "first": number, "message": outcome.message}
        self.defects[outcome.what]["count"] += 1
        return is_new


class Lines:
    """Which lines of the project ran, while it is asked to follow."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._is_ours: dict[str, bool] = {}
        self._own = (str(ROOT / "prefetch"), str(ROOT / "analysis"))

    def of(self, read: Callable[[], object]) -> Callable[[], object]:
        def followed() -> object:
            sys.settrace(self._called)
            try:
                return read()
            finally:
                sys.settrace(None)

        return followed

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        is_ours = self._is_ours.get(name)
        if is_ours is None:
            is_ours = self._is_ours[name] = name.startswith(self._own)
        return self._line if is_ours else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


class Loop:
    """`room` is a folder of its own; `notes` keeps what is told, what is kept, and the inputs of defects."""

    def __init__(self, reader: Reader, seed: int, room: Path, notes: Path) -> None:
        self.reader, self.room, self.notes = reader, room, notes
        self.corpus: list[Files] = list(reader.seeds())
        self.told, self.lines = Told(reader.name, seed), Lines()
        if (notes / "told.json").exists():
            self._go_on()
        self.watch = Watch(room)

    def _go_on(self) -> None:
        told = json.loads((self.notes / "told.json").read_text())
        if told["seed"] == self.told.seed:
            self.told = Told(**told)
            kept = sorted((self.notes / "kept").glob("*"), key=lambda path: int(path.name))
            self.corpus += [_read(folder) for folder in kept]

    def warm(self) -> list[Outcome]:
        """The seeds themselves: compiles, imports, and shows what a sound file comes to."""
        outcomes = [self._run(files, is_followed=True) for files in self.corpus for _ in range(2)]
        gc.collect()
        gc.freeze()  # what stays is not looked through again every 200 inputs
        return outcomes

    def run(self, n: int, beat: Callable[[int], None] = lambda _: None) -> Told:
        for _ in range(n):
            beat(self.told.inputs)
            self.one()
        self.save()
        return self.told

    def one(self) -> None:
        number = self.told.inputs
        rng = Random(f"{self.told.seed} {self.reader.name} {number}")
        files = changed(rng.choice(self.corpus), self.corpus, rng)
        is_followed, before = rng.random() < TRACED, len(self.lines.seen)
        outcome = self._run(files, is_followed=is_followed)
        if self.told.take(outcome, number) and len(self.told.defects) <= MOST_DEFECTS:
            self.keep_defect(outcome.what, files)
        is_small = len(self.corpus) < MOST_KEPT and sum(map(len, files.values())) < 200_000
        if is_followed and is_small and len(self.lines.seen) > before:
            _write(self.notes / "kept" / str(number), files)
            self.corpus.append(files)
        self.told.lines = max(self.told.lines, len(self.lines.seen))
        if number % 200 == 199:
            gc.collect()
            self.save()

    def _run(self, files: Files, *, is_followed: bool) -> Outcome:
        where, out = self.room / "in", self.room / "out"
        for folder in (where, out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _write(where, files)

        def read() -> object:
            return self.reader.read(where, out)

        names = [str(where), *(Path(name).name for name in files)]
        n_input = sum(_size(name, data) for name, data in files.items())
        return self.watch.of(self.lines.of(read) if is_followed else read, n_input, names)

    def keep_defect(self, what: str, files: Files) -> None:
        place = self.notes / "defects" / f"{len(self.told.defects):02d}"
        _write(place, files)
        (place.parent / f"{place.name}.txt").write_text(
            f"{what}\n\n{self.told.defects[what]['message']}\n"
        )

    def save(self) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        temporary = self.notes / "told.json.part"
        temporary.write_text(json.dumps(asdict(self.told), indent=1))
        temporary.replace(self.notes / "told.json")


def here(reader: Reader, seed: int, n: int, notes: Path) -> Told:
    """A few inputs in this process: a crash, or a hang of native code, ends it."""
    with tempfile.TemporaryDirectory(dir=quick_folder(), prefix="fuzz-") as room:
        loop = Loop(reader, seed, Path(room), notes)
        loop.warm()
        return loop.run(n)


def quick_folder() -> str | None:
    memory = "/dev/shm"  # inputs are many and small
    return memory if os.access(memory, os.W_OK) else None


def _size(name: str, data: bytes) -> int:
    """What is packed within reason counts as what it holds."""
    try:
        return (
            len(gzip.decompress(data))
            if name.endswith(".gz") and len(data) < 200_000
            else len(data)
        )
    except (OSError, EOFError, zlib.error):
        return len(data)


def changed(files: Files, corpus: list[Files], rng: Random) -> Files:
    """One file of the input, or the input as a folder."""
    files = dict(files)
    name = rng.choice(sorted(files))
    how = rng.random()
    if how < 0.04 and len(files) > 1:
        del files[name]
    elif how < 0.06:
        files[name] = b""
    elif how < 0.09 and len(files) > 1:
        files[name] = files[rng.choice(sorted(files))]
    elif how < 0.13:
        other = rng.choice(corpus)
        files[name] = plain.splice(files[name], other.get(name, next(iter(other.values()))), rng)
    else:
        for _ in range(rng.choice((1, 1, 1, 2))):
            files[name] = _tried(_mutator(name), files[name], rng)
            name = rng.choice(sorted(files))
    return files


def _tried(mutator: plain.Mutator, data: bytes, rng: Random) -> bytes:
    """What has been changed before may be too odd to be changed by what it means."""
    try:
        return mutator(data, rng)
    except Exception:
        return plain.bytewise(data, rng)


def _mutator(name: str) -> plain.Mutator:
    suffix = Path(name).suffix
    if suffix == ".gz":
        return streams.gzipped(_mutator(name.removesuffix(".gz")))
    return FORMATS.get(suffix, plain.bytewise)


def _write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _read(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
