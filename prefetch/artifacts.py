"""Content-addressed store: what was computed once is found again, and nothing half-made looks finished.

It knows no stage: a `Recipe` says what determines the content and how to make it. Artifacts are built in a temporary
folder under a file lock, sealed with a manifest, and renamed into place.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefetch.errors import ArtifactError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
RUNS = "runs"  # index of runs, wherever they wrote
BUILDING = ".building"  # suffix of a temporary folder; only the holder of its lock may touch it
UNFINISHED = ".unfinished"  # suffix of what an interrupted build left to go on from
Build = Callable[[Path, Mapping[str, Path]], None]


@dataclass(frozen=True)
class Recipe:
    """How to make one artifact, and exactly what its content depends on."""

    kind: str
    version: int  # of the code that makes it; raise it when the content changes
    config: Mapping[str, Any]  # plain values only
    build: Build  # (empty folder, upstream kind -> its folder)
    upstream: Mapping[str, Recipe | Outside] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()  # distributions whose version can change the content
    files: Mapping[str, Path] = field(
        default_factory=dict
    )  # outside files: their content counts, not their place

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the key is a hash of; outside files are read once."""
        return {
            "kind": self.kind,
            "recipe": self.version,
            "config": dict(self.config),
            "upstream": {name: recipe.key for name, recipe in self.upstream.items()},
            "libraries": {name: library_version(name) for name in self.libraries},
            "files": {name: sha256_of(path) for name, path in self.files.items()},
        }

    @property
    def key(self) -> str:
        return _digest(self.identity)


@dataclass(frozen=True)
class Outside:
    """A folder that the user made elsewhere and named: used as it is, known by its content."""

    kind: str
    folder: Path

    @property
    def key(self) -> str:
        """What a store sealed keeps the key that it has there, so that what was made from it is found."""
        return self.sealed_key or self.content_key

    @property
    def content_key(self) -> str:
        return _digest(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        paths = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path.name != MANIFEST
        )
        files = {str(path.relative_to(self.folder)): sha256_of(path) for path in paths}
        return {"kind": self.kind, "outside": True, "upstream": {}, "files": files}

    @property
    def sealed_key(self) -> str | None:
        """The key that it has in the store that sealed it; None = no store did."""
        if not (self.folder / MANIFEST).is_file():
            return None
        return _digest(read_manifest(self.folder)["identity"])


@dataclass(frozen=True)
class Artifact:
    """A sealed folder of the store."""

    kind: str
    key: str
    folder: Path
    manifest: Mapping[str, Any]
    was_made: bool = False  # by this call; False = found


class Store:
    """`need("trace", cfg)` finds or makes; `used` remembers what a run stood on, for its lineage."""

    def __init__(
        self, root: Path | str, *, makers: Mapping[str, str] | None = None, verify: bool = True
    ) -> None:
        self.root = Path(root)
        self.verify = verify
        self.used: dict[str, Mapping[str, Any]] = {}
        self._makers = makers or {}  # kind -> dotted name of a function from the config to a recipe

    def need(self, kind: str, cfg: Any) -> Artifact:
        """What the configuration asks for, made through the stage that makes it if nobody did before."""
        module, _, name = self._makers[kind].rpartition(".")
        return self.make(getattr(importlib.import_module(module), name)(cfg))

    def make(self, recipe: Recipe | Outside) -> Artifact:
        """The artifact of this recipe: found, or made now with everything it stands on."""
        if isinstance(recipe, Outside):
            artifact = self._outside(recipe)
        else:
            folder = self.root / recipe.kind / recipe.key
            artifact = self._found(folder) or self._build(recipe, folder)
            with suppress(OSError):  # a store that belongs to somebody else can still be read
                lock_path(artifact.folder).touch()  # when it was last used
        self.used[f"{recipe.kind}/{artifact.key}"] = artifact.manifest["identity"]
        return artifact

    def has(self, recipe: Recipe | Outside) -> bool:
        """Is it there already? Nothing is made, and nothing is checked."""
        if isinstance(recipe, Outside):
            return recipe.folder.is_dir()
        return (self.root / recipe.kind / recipe.key / MANIFEST).is_file()

    def sealed(self, kind: str) -> list[Path]:
        """The folders of everything of a kind, by their keys."""
        found = (path.parent for path in self.root.glob(f"{kind}/*/{MANIFEST}"))
        return sorted(folder for folder in found if not folder.name.endswith(BUILDING))

    def _outside(self, recipe: Outside) -> Artifact:
        """A folder that some store sealed keeps the key that it has there."""
        sealed_key = recipe.sealed_key
        if sealed_key is None:
            return Artifact(recipe.kind, recipe.key, recipe.folder, {"identity": recipe.identity})
        manifest = read_manifest(recipe.folder)
        if self.verify:
            check_files(recipe.folder, manifest)
        return Artifact(recipe.kind, sealed_key, recipe.folder, manifest)

    def _build(self, recipe: Recipe, folder: Path) -> Artifact:
        upstream = {name: self.make(part).folder for name, part in recipe.upstream.items()}
        with self._writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                found = self._found(folder)
                if found is not None:
                    return found
                log.info("making %s %s", recipe.kind, folder.name)
                temporary = folder.with_name(folder.name + BUILDING)
                _remove(
                    temporary
                )  # left by a run that was killed: the lock says that nobody builds it
                temporary.mkdir()
                try:
                    started = time.perf_counter()
                    recipe.build(temporary, upstream)
                    _seal(temporary, recipe.identity, time.perf_counter() - started)
                    temporary.replace(folder)
                except BaseException:
                    _remove(temporary)
                    raise
        return Artifact(recipe.kind, folder.name, folder, read_manifest(folder), was_made=True)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """A disk that is full or read-only, said with what to do; any other error is the builder's own."""
        try:
            yield
        except OSError as error:
            is_ours = str(self.root) in str(error.filename or "")
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG) or is_ours:
                raise ArtifactError(
                    f"{folder}: cannot be written ({error.strerror}); free the disk or pass store=DIR"
                ) from error
            raise

    def _found(self, folder: Path) -> Artifact | None:
        if not folder.is_dir():
            return None
        manifest = read_manifest(folder)
        if _digest(manifest["identity"]) != folder.name:
            raise ArtifactError(
                f"{folder}: its manifest is that of another artifact; remove the folder"
            )
        if self.verify:
            check_files(folder, manifest)
        return Artifact(folder.parent.name, folder.name, folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or not {"identity", "files", "seconds", "made"} <= set(
            manifest
        ):
            raise ValueError("expected the fields identity, files, seconds, made")
        files = manifest["files"]
        if not files or any({"bytes", "sha256"} - files[name].keys() for name in files):
            raise ValueError("expected files with their bytes and sha256")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: the artifact is damaged ({error}); remove the folder {folder}"
        ) from error
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file is there and holds the bytes that were sealed."""
    for name, sealed in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(
                f"{folder / MANIFEST}: names {name!r}, which lies outside its folder"
            )
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing from the artifact; remove the folder {folder} and run again"
            )
        if path.stat().st_size != sealed["bytes"] or sha256_of(path) != sealed["sha256"]:
            raise ArtifactError(
                f"{path}: its sha256 differs from the manifest, so the artifact is corrupted; "
                f"remove the folder {folder} and run again"
            )


def sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def library_version(name: str) -> str:
    if name == "python":
        return ".".join(str(part) for part in sys.version_info[:3])
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seal(folder: Path, identity: Mapping[str, Any], seconds: float) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise ArtifactError(f"{folder}: the recipe {identity['kind']} wrote no file")
    manifest = {
        "identity": identity,
        "git_commit": git_commit(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in paths
        },
    }
    for path in paths:
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _sync(folder / MANIFEST)


def _sync(path: Path) -> None:
    """On disk before the rename: a power cut must not leave a sealed folder with empty files."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@cache  # the code that runs is the code that was imported
def git_commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, and says so if that means waiting."""
    lock = FileLock(lock_path(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another run that makes %s %s", folder.parent.name, folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def write_index(store: Store, *, stage: str, folder: Path, failed: bool) -> None:
    """Enters a run into the store's index: its folder, its stage, and what it stood on."""
    entry = {
        "stage": stage,
        "folder": str(folder.resolve()),
        "failed": failed,
        "used": sorted(store.used),
    }
    index = store.root / RUNS
    try:
        index.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(entry["folder"].encode()).hexdigest()[:16]  # type: ignore[attr-defined]
        temporary = index / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(entry, indent=1) + "\n")
        temporary.replace(index / f"{name}.json")
    except OSError as error:
        log.warning("%s: the run could not be entered (%s)", index, error)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
