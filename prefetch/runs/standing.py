"""How a run stands: `run.json` in its folder says what was asked, with which code, and what came of it.

Written as a run begins and as it ends, so that a killed one is known by what it did not write. It knows no stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefetch import __version__
from prefetch.errors import ConfigError
from prefetch.manifest import code_digest, git_commit
from prefetch.runs.outputs import write_json
from prefetch.runs.redaction import Redactor
from prefetch.written import left_parts, write_whole

log = logging.getLogger(__name__)
NAME, LOCK = "run.json", ".run.lock"
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
NO_RESULT = ("tracker",)  # settings that leave every number as it is


@dataclass
class Standing:
    folder: Path
    stage: str
    words: Sequence[str]  # what was typed behind scripts/run.py
    settings: Mapping[str, Any]  # all of them, resolved
    _began_s: float = field(default=0.0, init=False)  # since 1970
    _clock_s: float = field(default=0.0, init=False)  # the same on a clock that nobody sets

    def about(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        told = {name: value for name, value in self.settings.items() if name not in NO_RESULT}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        return {
            "stage": self.stage,
            "settings": digest.hexdigest(),
            "version": __version__,
            "commit": git_commit(),
            "code": code_digest(),
            "seen_from": str(Path.cwd()),  # what relative paths stand for
        }

    def done(self) -> dict[str, float] | None:
        """The metrics of the same run, where this folder holds it whole."""
        told, metrics = self._told(), read(self.folder / "metrics.json")
        same = told.get("state") == FINISHED and bool(metrics)  # a power cut may have emptied it
        same = same and all(told.get(name) == value for name, value in self.about().items())
        return metrics if same else None

    def _told(self) -> dict[str, Any]:
        return read(self.folder / NAME)

    def need_place(self, *, in_sweep: bool) -> None:
        """A folder that holds another run whole is not written over, unless it was named for this one run."""
        told = self._told()
        is_other = told.get("state") == FINISHED and (
            (told.get("stage"), told.get("settings")) != (self.stage, self.about()["settings"])
        )
        if is_other and in_sweep:
            raise ConfigError(
                f"{self.folder}: holds a finished run of other settings ({told.get('command')}); name another "
                "hydra.sweep.dir, or remove it"
            )
        if is_other:
            log.warning("%s: files of an earlier run stay where this one writes none", self.folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.folder}: another process is at work in this folder; wait for it, or name another one"
            ) from None
        try:
            yield
        finally:
            (self.folder / LOCK).unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def _as_typed(self) -> Iterator[None]:
        """Hydra writes what was typed before anybody can be refused: who was meanwhile, has written it over ours."""
        ours = {path: path.read_text() for path in self.folder.glob(".hydra/*.yaml")}
        try:
            yield
        finally:
            with suppress(OSError):
                for path in [path for path, said in ours.items() if path.read_text() != said]:
                    write_whole(path, ours[path])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The run itself: how it ended is written down, whatever ended it."""
        self._began_s, self._clock_s = time.time(), time.monotonic()
        with self._alone(), self._as_typed():
            of_before = (self.folder / name for name in ("error.txt", "metrics.json"))
            for path in (*of_before, *left_parts(self.folder, alone=True)):
                path.unlink(missing_ok=True)
            self._write(RUNNING, None)
            try:
                yield
            except Exception as error:
                self._end(FAILED, f"{type(error).__name__}: {error}")
                raise
            except BaseException:
                self._end(INTERRUPTED, "interrupted: what stands here is not complete")
                raise
            self._write(FINISHED, None)

    def _end(self, state: str, error: str) -> None:
        error = Redactor(self.settings).text(error)
        with suppress(OSError):  # the disk may be what failed: the error itself is still to be told
            self._write(state, error)
            write_whole(self.folder / "error.txt", error + "\n")  # the console forgets

    def _write(self, state: str, error: str | None) -> None:
        entry = {
            **self.about(),
            "state": state,
            "error": error,
            "command": command(Redactor(self.settings).words(self.words)),
            "began": datetime.fromtimestamp(self._began_s, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock_s, 3),
            "process": os.getpid(),
        }
        write_json(self.folder / NAME, entry)


def read(path: Path) -> dict[str, Any]:
    """What stands in a file of ours; nothing where there is none, or a torn one."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(told) if isinstance(told, dict) else {}


def command(words: Sequence[str]) -> str:
    """As it can be pasted into a shell."""
    return f"python scripts/run.py {shlex.join(words)}"
