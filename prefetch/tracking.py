"""The experiment tracker: what a run may tell it, and Weights & Biases. The only file that imports wandb.

It knows no stage: a run is told as an `About`, its numbers, tables, curves, pictures, and the artifacts it stood on.
Offline is the default and never touches the network; `prefetch.runs.tracked` reads such a run back.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefetch import __version__
from prefetch.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and not every stage makes a table

    from prefetch.runs.naming import About

log = logging.getLogger(__name__)
MODES = ("offline", "online", "disabled")
MOST_REFERENCES = 1000  # files of an artifact that are named one by one
DATA = "WANDB_DATA_DIR"  # where the client lays copies of tables, which it uploads from
QUIET = {  # arguments, host name and git remote can hold secrets; what matters of them is in the config
    "console": "off",
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "host": "not told",
    "program": "scripts/run.py",
    "x_transaction_log_flush_interval": 1.0,  # seconds; what a killed run may lose
    "init_timeout": 30.0,
}


@dataclass(frozen=True)
class UsedArtifact:
    """One artifact that a run stood on: its place in the graph of what was made from what."""

    kind: str
    key: str
    folder: Path | None  # None = the user's own, which no store holds
    about: Mapping[str, Any]  # its manifest: identity, versions, commit, seconds, files
    is_made: bool  # by this run; False = found

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key}"

    @property
    def upstream(self) -> dict[str, str]:
        return dict(self.about["identity"].get("upstream", {}))


class Tracker(Protocol):
    """What a run may tell an experiment tracker."""

    def start(self, about: About) -> None: ...
    def log(self, metrics: Mapping[str, float]) -> None: ...
    def curve(self, name: str, frame: pd.DataFrame, x: str, by: Sequence[str]) -> None: ...
    def table(self, name: str, frame: pd.DataFrame) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def lineage(self, used: Sequence[UsedArtifact]) -> None: ...
    def finish(self, error: str | None = None, exit_code: int = 1) -> None: ...


class NoTracker:
    """For whoever wants no tracker: the files in the run's folder are complete without one."""

    def start(self, about: About) -> None: ...
    def log(self, metrics: Mapping[str, float]) -> None: ...
    def curve(self, name: str, frame: pd.DataFrame, x: str, by: Sequence[str]) -> None: ...
    def table(self, name: str, frame: pd.DataFrame) -> None: ...
    def figure(self, name: str, path: Path) -> None: ...
    def lineage(self, used: Sequence[UsedArtifact]) -> None: ...
    def finish(self, error: str | None = None, exit_code: int = 1) -> None: ...


@dataclass
class WandbTracker:
    """Weights & Biases; offline by default: `wandb sync` it later."""

    project: str = "expert-prefetch"
    mode: str = "offline"
    entity: str | None = None
    group: str | None = None  # None = the sweep's folder, or the experiment's name
    tags: list[str] = field(default_factory=list)  # beside those of the choices
    tag_choices: dict[str, list[str]] = field(default_factory=dict)  # stage -> groups that it reads
    minima: list[str] = field(default_factory=list)  # of curves ("fit/loss*"), into the summary
    maxima: list[str] = field(default_factory=list)
    is_unreachable: ClassVar[bool] = False  # one run of a process waits for the server, not each

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected one of {MODES}, got {self.mode!r}")
        self._run: Any = None
        self._data: Path | None = None  # where copies of tables are laid

    def start(self, about: About) -> None:
        if self.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_login()):
            raise ConfigError(
                "tracker.mode=online: no key found, and without one the client would wait for a login; run "
                "`wandb login`, set WANDB_API_KEY, or use tracker.mode=offline and `wandb sync` later"
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        at_home()
        self._data = about.folder.resolve() / "wandb"
        if self.mode == "online" and self.is_unreachable:
            self.mode = "offline"
        self._run = self._begun(about)

    def _begun(self, about: About) -> Any:
        """The client's run; offline where the server cannot be reached."""
        try:
            return self._init(about, self.mode)
        except Exception as error:  # its own types, pydantic's, and plain ones
            reason = " ".join(str(error).split())[:300]
            if type(error).__name__ in ("UsageError", "ValidationError"):
                raise ConfigError(
                    f"W&B refused to start ({reason}); tracker=none goes without it"
                ) from error
            if self.mode != "online":
                raise TrackerLost(f"W&B did not start: {reason}") from error
        log.warning(
            "W&B cannot be reached (%s); this run is kept offline: `wandb sync` it later", reason
        )
        self.mode, WandbTracker.is_unreachable = "offline", True
        for begun in about.folder.glob("wandb/run-*"):  # of the attempt: nothing is in it
            shutil.rmtree(begun, ignore_errors=True)
        return self._begun(about)

    def _init(self, about: About, mode: str) -> Any:
        import wandb

        known: dict[str, Any] = {n: QUIET[n] for n in QUIET if n in wandb.Settings.model_fields}
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]  # checked against MODES
            name=about.name,
            group=self.group or about.group,
            job_type=about.stage,
            tags=[*self.tags, *about.tags(self.tag_choices)],
            dir=str(about.folder),
            config={**about.config, "run": {**about.facts, **_machine()}},
            reinit="create_new",
            settings=wandb.Settings(**known),
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def curve(self, name: str, frame: pd.DataFrame, x: str, by: Sequence[str]) -> None:
        """History with an x axis of its own, so that curves of several lengths lie over each other.

        The last point of a curve says nothing of its run: the summary has it only as an extreme that was asked for.
        """
        step, frame = f"{name}/{x}", _lines(frame, x, by)
        self._run.define_metric(step, hidden=True, summary="none")
        for column in frame.columns.drop(x):
            metric = f"{name}/{column}"
            self._run.define_metric(metric, step_metric=step, summary=self._kept(metric))
        for row in frame.to_dict("records"):
            known = {key: value for key, value in row.items() if value == value}  # no NaN
            self._run.log({f"{name}/{key}": value for key, value in known.items()})

    def _kept(self, metric: str) -> str:
        """The client's word for what a summary keeps of a curve."""
        asked = {"min": self.minima, "max": self.maxima}
        words = [w for w, globs in asked.items() if any(fnmatchcase(metric, g) for g in globs)]
        return ",".join(words) or "none"

    def table(self, name: str, frame: pd.DataFrame) -> None:
        import wandb

        with self._staged():
            columns: list[Any] = [str(name) for name in frame.columns]
            table = wandb.Table(columns=columns, data=_rows(frame), allow_mixed_types=True)
            self._run.log({f"table/{name}": table})

    def figure(self, name: str, path: Path) -> None:
        import wandb

        self._run.log({f"figure/{name}": wandb.Image(str(path))})

    def lineage(self, used: Sequence[UsedArtifact]) -> None:
        """Keys in the config, to filter by; artifacts without their data, for the graph."""
        kinds = [one.kind for one in used]
        keys = {one.kind: one.key for one in used if kinds.count(one.kind) == 1}
        told = {"uses": keys, "lineage": sorted(f"{one.kind}/{one.key}" for one in used)}
        told["upstream"] = [
            f"{one.kind}/{one.key} <- {name} {key}"
            for one in used
            for name, key in sorted(one.upstream.items())
        ]
        self._run.config.update(told, allow_val_change=True)
        with self._staged():
            for one in sorted(used, key=lambda one: one.is_made):  # first what it stood on
                self._declare(one)

    def _declare(self, one: UsedArtifact) -> None:
        """By reference: nothing is copied, and nothing is uploaded but where it lies."""
        artifact = _artifact(one)
        if one.is_made:
            self._run.log_artifact(artifact, aliases=["latest"])
        elif self.mode == "online":
            self._run.use_artifact(artifact)
        elif self.mode == "offline" and hasattr(self._run, "_log_artifact"):
            # use_artifact refuses to work offline; this is what it does before it waits for the server
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def finish(self, error: str | None = None, exit_code: int = 1) -> None:
        if self._run is None:
            return
        self._run.summary["outcome"] = "finished" if error is None else "failed"
        if error is not None:
            self._run.summary["error"] = error
        self._run.finish(exit_code=0 if error is None else exit_code)

    @contextmanager
    def _staged(self) -> Iterator[None]:
        """The client's copies of tables lie in the run's folder, not in the user's home for good."""
        if DATA in os.environ:
            yield
            return
        os.environ[DATA] = str(self._data)
        try:
            yield
        finally:
            os.environ.pop(DATA, None)


class TrackerLost(Exception):
    """The tracker cannot work here, for no fault of its settings: the run goes on without it."""


def _artifact(one: UsedArtifact) -> Any:
    import wandb

    identity = one.about["identity"]
    files = one.about.get("files", {})
    artifact = wandb.Artifact(
        one.name,
        type=one.kind,
        metadata={
            "key": one.key,
            **{name: identity.get(name) for name in ("recipe", "config", "upstream", "libraries")},
            **{name: one.about.get(name) for name in ("git_commit", "made", "seconds")},
            "files": len(files),
            "bytes": sum(file["bytes"] for file in files.values()),
        },
    )
    if one.folder is not None:
        for name in ["manifest.json", *files][:MOST_REFERENCES]:
            artifact.add_reference((one.folder / name).as_uri(), name=name, checksum=False)
    return artifact


def _lines(frame: pd.DataFrame, x: str, by: Sequence[str]) -> pd.DataFrame:
    """A column per line, in the order of x. No dots in their names: the client takes them for nesting."""
    if not by:
        return frame.sort_values(x)
    wide = frame.pivot(index=x, columns=list(by)).sort_index()
    apart = [
        "_".join([str(column), *(f"{group}{one:g}" for group, one in zip(by, values, strict=True))])
        for column, *values in (tuple(name) for name in wide.columns)
    ]
    return wide.set_axis([name.replace(".", "_") for name in apart], axis="columns").reset_index()


def _rows(frame: pd.DataFrame) -> list[Iterable[Any]]:
    """What the client can tell: missing values are None, and what is neither number nor text is told as text."""
    cells = zip(frame.itertuples(index=False), frame.isna().to_numpy(), strict=True)
    return [
        [None if is_gone else _plain(value) for value, is_gone in zip(row, gone, strict=True)]
        for row, gone in cells
    ]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _machine() -> dict[str, Any]:
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def at_home() -> None:
    """Without HOME the client tells every step of its own; Python knows the user's home all the same."""
    with suppress(RuntimeError):  # nor does it know such a user
        os.environ.setdefault("HOME", str(Path.home()))


def _has_login() -> bool:
    """Does the standard netrc file name the tracker's host? Asked without importing wandb, which would prompt."""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and "wandb" in path.read_text(errors="ignore")
