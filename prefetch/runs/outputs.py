"""What a run leaves for people: files first, then the experiment tracker.

`Outputs` is what a stage is handed; it writes into the run's folder and tells the tracker. A tracker that dies takes
nothing with it, and what was written before a run was killed stays.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefetch.errors import PrefetchError
from prefetch.runs.redaction import Redactor
from prefetch.tracking import NoTracker, Tracker, UsedArtifact
from prefetch.written import write_whole

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and not every stage makes a table

    from prefetch.artifacts import Store
    from prefetch.runs.naming import About

log = logging.getLogger(__name__)
TRACKED_ROWS = 10_000  # W&B shows no more of a table
PATIENCE = 3  # failures of a tracker, after which it is only asked to end


class SafeTracker:
    """A tracker whose failures are one warning; the run goes on, and the tracker's run is still ended."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker = tracker
        self._failures = 0

    def start(self, about: About) -> None:
        """A setting that cannot be is the user's error; a client that cannot work here is a warning."""
        try:
            self._tracker.start(about)
        except PrefetchError:
            raise
        except Exception as error:
            self._tracker = NoTracker()
            self._warn("start", error)

    def tell(self, verb: str, *details: Any) -> None:
        if self._failures >= PATIENCE and verb != "finish":
            return
        try:
            getattr(self._tracker, verb)(*details)
        except Exception as error:
            if not self._failures:
                self._warn(verb, error)
            self._failures += 1

    def _warn(self, verb: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        said = "the tracker failed (%s: %s); the run goes on, its folder has everything"
        log.warning(said, verb, reason)


class Outputs:
    """The folder of one run: metrics, tables, figures, lineage; every one written before the tracker hears of it."""

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        *,
        store: Store | None = None,
        hidden: Redactor | None = None,
    ) -> None:
        self.folder = folder
        self._tracker = SafeTracker(tracker)
        self._store = store
        self._hidden = hidden or Redactor()
        self._n_used = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._before = self._hidden.seen(folder)

    def start(self, about: About) -> None:
        self._tracker.start(about)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """`metrics.json`, flat, numbers only."""
        odd = {name: value for name, value in metrics.items() if not _is_number(value)}
        assert not odd, f"metrics are finite numbers; these are not: {odd}"
        write_json(self.folder / "metrics.json", dict(metrics))
        self._keep_lineage()
        self._tracker.tell("log", metrics)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """`name.parquet` and `name.csv`."""
        frame = self.data(name, frame)
        frame.to_csv(self.folder / f"{name}.csv", index=False)
        if len(frame) <= TRACKED_ROWS:
            self._tracker.tell("table", name, frame)

    def data(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """`name.parquet` only: a table that is read by programs, too long to look at."""
        frame = self._hidden.frame(frame)
        frame.to_parquet(self.folder / f"{name}.parquet", index=False)
        self._keep_lineage()
        return frame

    def curve(self, name: str, frame: pd.DataFrame, x: str, by: Sequence[str] = ()) -> None:
        """Lines over `x` for the tracker, a column each, or each for every value of `by`: loss_horizon4_fold0.

        The files have them as a table already.
        """
        self._tracker.tell("curve", name, frame, x, by)

    def figure(self, path: Path) -> None:
        """A picture that stands in the folder already."""
        self._tracker.tell("figure", path.stem, path)

    def lineage(self, used: Mapping[str, Any], since_s: float = math.inf) -> None:
        """`lineage.json`: every artifact that this run stood on. What was made since its beginning, it made."""
        write_json(self.folder / "lineage.json", self._hidden.value(used))
        self._n_used = len(used)
        self._tracker.tell("lineage", [self._described(name, used[name], since_s) for name in used])

    def finish(self, error: str | None, exit_code: int = 1, since_s: float = math.inf) -> None:
        """The last word, also where the disk is full: what the run stood on, nothing secret, and how it ended."""
        try:
            self._close(since_s)
        except OSError as full:
            if error is None:
                raise
            log.warning("%s", full)  # beside the error that ended the run
        finally:
            safe = () if error is None else (self._hidden.text(error), exit_code)
            self._tracker.tell("finish", *safe)

    def _close(self, since_s: float) -> None:
        if self._store is not None:
            self.lineage(self._store.used, since_s)
        self._hidden.folder(self.folder, self._before)

    def _keep_lineage(self) -> None:
        """A run that is killed later has told what it stood on until now."""
        if self._store is not None and len(self._store.used) > self._n_used:
            self._n_used = len(self._store.used)
            write_json(self.folder / "lineage.json", self._hidden.value(self._store.used))

    def _described(self, name: str, identity: Mapping[str, Any], since_s: float) -> UsedArtifact:
        kind, _, key = name.partition("/")
        folder = None if self._store is None else self._store.root.resolve() / kind / key
        manifest, sealed_s = dict[str, Any](), -math.inf
        if folder is not None:
            with suppress(OSError, ValueError):
                manifest = json.loads((folder / "manifest.json").read_text())
                sealed_s = (folder / "manifest.json").stat().st_mtime
        return UsedArtifact(
            kind=kind,
            key=key,
            folder=folder if manifest else None,  # else the user's own, which no store holds
            about=self._hidden.value({**manifest, "identity": identity}),
            is_made=sealed_s >= since_s,
        )


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing: a reader never sees half a file."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
