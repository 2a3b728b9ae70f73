"""What a run meets on a bad day, and what must be true afterwards: harm done on purpose, and a judge.

Harm comes at the n-th change that a run makes to its store or its folder (`fault_points.c`), or as a signal at any
moment. Runs are forked from a process that has imported everything (`warm_entry.py`), which makes hundreds affordable.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, cast

from entry import ROOT, environment

from prefetch import stock
from prefetch.artifacts import BUILDING, Store
from prefetch.config import ArtifactsConfig, Config
from prefetch.errors import PrefetchError
from prefetch.manifest import MANIFEST, check_files, read_manifest
from prefetch.runs import standing
from prefetch.written import PART

HARMS = ("nothing", "kill", "term", "torn", "full", "read_only", "vanish", "clock", "fail_once")
MEASURED = re.compile(r"_us\b|_us_|seconds|per_second")  # of this run; two may be equal by chance
NEVER_SAME = (
    ".hydra",
    ".log",
    "run.json",
    "error.txt",
    "report.html",
)  # clocks, process numbers, attempts
LONGEST_S = 120  # of a run; one that hangs dies of SIGABRT, which the judge tells
OUT = "hydra.run.dir=out"


@dataclass(frozen=True)
class Fault:
    """Harm at the n-th change, or a signal so long after the run began."""

    harm: str = "nothing"
    at: int = 0  # 1 = the first change; full and read_only last from there on
    code: int = 0  # of fail_once the error's number, of clock the seconds that it is set back
    stop: int = 0  # signal from outside
    after_s: float = 0.0


@dataclass(frozen=True)
class Done:
    code: int  # negative: ended by that signal
    out: str
    err: str
    changes: tuple[str, ...]  # "3 write store/trace/...", as they were made
    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Case:
    """A command that meets the fault, and what stands in the store before it."""

    name: str
    words: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()  # commands
    files: Callable[[Path], None] = lambda _: None  # puts there what it reads
    is_kept: bool = False  # the folder that `before` wrote stays, as before/
    dropped: tuple[str, ...] = ()  # of the store that `before` left
    timed: str = (
        "$^"  # pattern of results that follow from a measured time, which a trial measures anew
    )


def sharp(changes: Sequence[str]) -> list[int]:
    """The changes, from 1, but for those between the first and the last write to one file."""
    kinds = ["", *(change.partition(" ")[2] for change in changes), ""]
    inner = range(1, len(changes) + 1)
    return [n for n in inner if not kinds[n - 1] == kinds[n] == kinds[n + 1]]


def library(folder: Path) -> Path | None:
    """The counter of changes, compiled; None = there is no C compiler here."""
    compiler, made = shutil.which("cc"), folder / "fault_points.so"
    source = Path(__file__).with_name("fault_points.c")
    if compiler is None or sys.platform != "linux":
        return None
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return made


class Warm:
    """`run(folder, *words, fault=...)`: the entry in a process of its own, without its imports."""

    def __init__(self, folder: Path, counter: Path, imported: Sequence[str]) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_entry.py")), *imported],
            cwd=ROOT, env={**environment(), "LD_PRELOAD": str(counter)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        self._server.communicate(timeout=LONGEST_S)

    def run(self, folder: Path, *words: str, fault: Fault = Fault()) -> Done:
        paths = {name: self._folder / f"last.{name}" for name in ("out", "err", "log")}
        for path in paths.values():
            path.unlink(missing_ok=True)
        under = [str(folder / "store"), str(folder / "out")]
        job: dict[str, Any] = {"folder": str(folder), "words": words, "under": under}
        job |= {name: str(path) for name, path in paths.items()}
        job |= {"harm": HARMS.index(fault.harm), "at": fault.at, "code": fault.code}
        assert self._server.stdin is not None
        began = time.perf_counter()
        print(json.dumps(job), file=self._server.stdin, flush=True)
        process = int(self._answer())
        hangs = threading.Timer(LONGEST_S, _stop, (process, signal.SIGABRT))  # no harm's signal
        hangs.start()
        if fault.stop:
            time.sleep(fault.after_s)
            _stop(process, fault.stop)
        code, cpu_s = json.loads(self._answer())
        hangs.cancel()
        seconds = time.perf_counter() - began
        out, err, log = (path.read_text() if path.exists() else "" for path in paths.values())
        changes = tuple(log.replace(f"{folder}/", "").splitlines())
        return Done(code, out, err, changes, seconds, cpu_s)


def _stop(process: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(process, number)


@contextmanager
def warmed(folder: Path, counter: Path, *imported: str) -> Iterator[Warm]:
    """With these stages, and modules, imported."""
    warm = Warm(folder, counter, imported)
    try:
        yield warm
    finally:
        warm.close()


@dataclass
class Tidy:
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)


@dataclass
class Trials:
    """One case, run undisturbed first, then with one fault after the other in the same place."""

    warm: Warm
    case: Case
    folder: Path
    runs: int = 0
    said: set[str] = field(default_factory=set)  # every last line of a run that gave up

    def __post_init__(self) -> None:
        self.prepared, self.work = self.folder / "prepared", self.folder / "work"
        self.prepared.mkdir(parents=True)
        self.case.files(self.prepared)
        for words in self.case.before:
            self._fresh(self.prepared)
            done = self._run(*words)
            assert done.code == 0, done.err
            (self.work / "out").rename(self.work / "before")
            if not self.case.is_kept:
                shutil.rmtree(self.work / "before")
            for name in self.case.dropped:
                shutil.rmtree(self.work / "store" / name)
            shutil.rmtree(self.prepared)
            self.work.rename(self.prepared)
        self.whole, first = self._undisturbed()
        _, second = self._undisturbed()
        alike = {name for name, digest in first.items() if second.get(name) == digest}
        odd = re.compile(f"{MEASURED.pattern}|{self.case.timed}")
        self.same = {name for name in alike if not odd.search(name)}
        self.expected, self.paths = first, _paths(self.work)

    def _fresh(self, start: Path) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(start, self.work)

    def _run(self, *words: str, fault: Fault = Fault()) -> Done:
        self.runs += 1
        words = (*words, "store=store", "tracker=none")
        return self.warm.run(self.work, *words, OUT, fault=fault)

    def _undisturbed(self) -> tuple[Done, dict[str, str]]:
        self._fresh(self.prepared)
        done = self._run(*self.case.words)
        assert done.code == 0, done.err
        found = results(self.work)
        self._tidy()
        return done, found

    def _tidy(self) -> None:
        """`stage=artifacts`, here: its command needs no process of its own."""
        with redirect_stdout(StringIO()):
            stock.run(cast(Config, Tidy()), Store(self.work / "store"))

    def trial(self, fault: Fault) -> list[str]:
        """What is wrong after this fault; nothing = nothing."""
        self._fresh(self.prepared)
        first = self._run(*self.case.words, fault=fault)
        wrong = [f"the run itself: {one}" for one in [*_ended(first, fault), *self._left(first)]]
        self._back()
        self.said |= set(first.err.splitlines()[-1:]) if first.code > 0 else set()
        again = self._run(*self.case.words)
        if "is there already" in again.err:  # it had come so far, and nothing is written twice
            wrong += [f"the next run: {one}" for one in self._differs() if "missing" not in one]
        else:
            wrong += [f"the next run: {one}" for one in [*_ended(again, Fault()), *self._differs()]]
        self._tidy()
        more = _paths(self.work) - self.paths
        remains = sorted(path for path in more if _is_half(path) or not self._is_odd(path))
        return wrong + [f"remains after stage=artifacts: {path}" for path in remains]

    def _is_odd(self, path: str) -> bool:
        """Named after a measured time: rows of single cells that were kept, and whatever the case says."""
        return path.startswith("store/cells/") or bool(re.search(self.case.timed, path))

    def _back(self) -> None:
        """A store that vanished is there again, over what the run began in its place: as when a disk is mounted."""
        gone, store = self.work / "store.gone", self.work / "store"
        if gone.exists():
            shutil.rmtree(store, ignore_errors=True)
            gone.rename(store)

    def _left(self, done: Done) -> Iterator[str]:
        """Nothing half-made looks finished."""
        told = standing.read(self.work / "out" / standing.NAME)
        is_elsewhere = (self.work / "store.gone").exists()  # what it stood on was measured anew
        if not is_elsewhere and (done.code == 0 or told.get("state") == standing.FINISHED):
            yield from self._differs()
        for manifest in (self.work / "store").glob(f"*/*/{MANIFEST}"):
            try:
                if not manifest.parent.name.endswith(BUILDING):
                    check_files(manifest.parent, read_manifest(manifest.parent))
            except PrefetchError as error:
                yield f"looks finished and is not: {error}"

    def _differs(self) -> Iterator[str]:
        found = results(self.work)
        for name in sorted(self.expected.keys() | found.keys()):
            if re.search(self.case.timed, name):
                continue
            if name not in self.expected or name not in found:
                yield f"{name} is {'new' if name in found else 'missing'}"
            elif name in self.same and found[name] != self.expected[name]:
                yield f"{name} differs"


def _ended(done: Done, fault: Fault) -> Iterator[str]:
    """How a run may end: with its result, killed, or with one line that says what to do."""
    stop = {"kill": signal.SIGKILL, "torn": signal.SIGKILL, "term": signal.SIGTERM}
    if done.code < 0 and -done.code != (fault.stop or stop.get(fault.harm)):
        yield f"died of signal {-done.code}"
    if "Traceback" in done.err or "Exception ignored" in done.err:
        yield f"a traceback: {done.err.splitlines()[-1]}"
    if fault.harm == "nothing" and not fault.stop and done.code:
        yield f"exit code {done.code}: {done.err[-300:]}"
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.code > 0 and done.code != 130 and len(lines) != 1:
        yield f"exit code {done.code} with {len(lines)} lines of error"
    if done.code == 130 and "interrupted" not in done.err:
        yield "exit code 130 and no word of an interruption"


def _is_half(path: str) -> bool:
    return path.endswith((BUILDING, PART)) or f"{BUILDING}/" in path


def _paths(work: Path) -> set[str]:
    """Everything below, but for locks, which tell when an artifact was last used."""
    found = (str(path.relative_to(work)) for path in work.rglob("*"))
    odd = (".lock", *NEVER_SAME)
    return {path for path in found if not path.endswith(odd) and "/.hydra/" not in path}


def results(work: Path) -> dict[str, str]:
    """What the run is for: sealed files and what a person reads, in parts that are small enough to compare."""
    found: dict[str, str] = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(path.relative_to(work))
        inner = name.startswith("store/") and (name.count("/") < 3 or "/." in name)
        if inner or name.endswith((".lock", *NEVER_SAME, MANIFEST)) or ".hydra/" in name:
            continue
        for part, content in _parts(path):
            found[f"{name}{part}"] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Columns of a table and values of a JSON apart: some are measured times."""
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))
        for column in zip(*rows, strict=False):
            yield f"[{column[0]}]", "\n".join(column).encode()
    elif path.suffix == ".json":
        for key, value in _leaves(json.loads(path.read_text())):
            yield f"[{key}]", repr(value).encode()
    else:
        yield "", path.read_bytes()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
