"""What a run leaves for people: files first, then the experiment tracker. The only file that imports wandb.

`Outputs` is what a stage is handed; it writes into the run's folder and tells the tracker. A tracker that dies takes
nothing with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefetch.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and not every stage makes a table

log = logging.getLogger(__name__)
TRACKED_ROWS = 10_000  # W&B shows no more of a table
MODES = ("offline", "online", "disabled")


class Tracker(Protocol):
    """What a run may tell an experiment tracker."""

    def start(
        self, *, stage: str, folder: Path, config: Mapping[str, Any], group: str | None
    ) -> None: ...
    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...
    def table(self, name: str, frame: pd.DataFrame) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def lineage(self, keys: Mapping[str, Any]) -> None: ...
    def finish(self, error: str | None = None) -> None: ...


class NoTracker:
    """For whoever wants no tracker: the files in the run's folder are complete without one."""

    def start(
        self, *, stage: str, folder: Path, config: Mapping[str, Any], group: str | None
    ) -> None: ...
    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...
    def table(self, name: str, frame: pd.DataFrame) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def lineage(self, keys: Mapping[str, Any]) -> None: ...
    def finish(self, error: str | None = None) -> None: ...


@dataclass
class WandbTracker:
    """Weights & Biases; offline by default, which never touches the network: `wandb sync` it later."""

    project: str = "expert-prefetch"
    mode: str = "offline"
    entity: str | None = None
    group: str | None = None  # None = the sweep's folder, or none
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected one of {MODES}, got {self.mode!r}")
        self._run: Any = None

    def start(
        self, *, stage: str, folder: Path, config: Mapping[str, Any], group: str | None
    ) -> None:
        if self.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_login()):
            raise ConfigError(
                "tracker.mode=online: no key found, and without one the client would wait for a login; run "
                "`wandb login`, set WANDB_API_KEY, or use tracker.mode=offline and `wandb sync` later"
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]  # checked against MODES
                group=self.group or group,
                job_type=stage,
                tags=self.tags,
                dir=str(folder),
                config=dict(config),
                reinit="create_new",
                settings=wandb.Settings(console="off", x_disable_stats=True),
            )
        except Exception as error:  # its own types, pydantic's, and plain ones
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"W&B refused to start ({reason}); tracker=none goes without it"
            ) from error

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        import wandb

        self._run.log({f"table/{name}": wandb.Table(dataframe=frame)})

    def figure(self, name: str, path: Path) -> None:
        import wandb

        self._run.log({f"figure/{name}": wandb.Image(str(path))})

    def lineage(self, keys: Mapping[str, Any]) -> None:
        self._run.config.update({"lineage": sorted(keys)}, allow_val_change=True)

    def finish(self, error: str | None = None) -> None:
        if error is not None:
            self._run.summary["error"] = error
        self._run.finish(exit_code=0 if error is None else 1)


def _has_login() -> bool:
    """Does the standard netrc file name the tracker's host? Asked without importing wandb, which would prompt."""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and "wandb" in path.read_text(errors="ignore")


class SafeTracker:
    """A tracker that dies takes nothing with it: its first failure is a warning, and the run goes on without."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def tell(self, verb: str, *details: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, verb)(*details)
        except Exception as error:
            self._tracker = None
            log.warning(
                "the tracker failed (%s); the run goes on, its folder has everything", error
            )


class Outputs:
    """The folder of one run: metrics, tables, figures, lineage; every one written before the tracker hears of it."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder = folder
        self._tracker = SafeTracker(tracker)
        folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """`metrics.json`, flat, numbers only."""
        odd = {name: value for name, value in metrics.items() if not _is_number(value)}
        assert not odd, f"metrics are finite numbers; these are not: {odd}"
        write_json(self.folder / "metrics.json", dict(metrics))
        self._tracker.tell("log", metrics)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """`name.parquet` and `name.csv`."""
        frame.to_parquet(self.folder / f"{name}.parquet", index=False)
        frame.to_csv(self.folder / f"{name}.csv", index=False)
        if len(frame) <= TRACKED_ROWS:
            self._tracker.tell("table", name, frame)

    def data(self, name: str, frame: pd.DataFrame) -> None:
        """`name.parquet` only: a table that is read by programs, too long to look at."""
        frame.to_parquet(self.folder / f"{name}.parquet", index=False)

    def figure(self, path: Path) -> None:
        """A picture that stands in the folder already."""
        self._tracker.tell("figure", path.stem, path)

    def lineage(self, used: Mapping[str, Any]) -> None:
        """`lineage.json`: every artifact that this run stood on."""
        write_json(self.folder / "lineage.json", dict(used))
        self._tracker.tell("lineage", used)

    def finish(self, error: str | None) -> None:
        self._tracker.tell("finish", error)


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing: a reader never sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
