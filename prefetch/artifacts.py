"""Content-addressed store: what was computed once is found again, and nothing half-made looks finished.

It knows no stage: a `Recipe` says what determines the content and how to make it. Artifacts are built in a temporary
folder under a file lock, sealed with a manifest, and renamed into place.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefetch.errors import ArtifactError, PrefetchError
from prefetch.manifest import (
    MANIFEST,
    Damaged,
    check_files,
    digest_of,
    read_manifest,
    seal,
    sha256_of,
)
from prefetch.written import FULL, disk_error

log = logging.getLogger(__name__)
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
            "config": json.loads(json.dumps(dict(self.config))),  # as its manifest is read
            "upstream": {name: recipe.key for name, recipe in self.upstream.items()},
            "libraries": {name: library_version(name) for name in self.libraries},
            "files": {name: sha256_of(path) for name, path in self.files.items()},
        }

    @property
    def key(self) -> str:
        return digest_of(self.identity)

    def need_unchanged(self) -> None:
        """Outside files are read twice, for the key and by the build: a log that grows would lie under a wrong key.

        Code was read as it was imported: who edits it during a long fit changes the next one.
        """
        imported = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
        for name, path in self.files.items():
            if str(path) not in imported and sha256_of(path) != self.identity["files"][name]:
                raise ArtifactError(
                    f"{path}: was changed while the {self.kind} was made from it; nothing is kept, run again"
                )


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
        return digest_of(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        paths = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path.name != MANIFEST
        )
        files = {str(path.relative_to(self.folder)): sha256_of(path) for path in paths}
        return {"kind": self.kind, "outside": True, "upstream": {}, "files": files}

    @property
    def told(self) -> Mapping[str, Any]:
        """Its identity as the store that sealed it told it, or by its content."""
        is_sealed = (self.folder / MANIFEST).is_file()
        return dict(read_manifest(self.folder)["identity"]) if is_sealed else self.identity

    @property
    def sealed_key(self) -> str | None:
        """The key that it has in the store that sealed it; None = no store did."""
        if not (self.folder / MANIFEST).is_file():
            return None
        return digest_of(read_manifest(self.folder)["identity"])


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
        self,
        root: Path | str,
        *,
        makers: Mapping[str, str] | None = None,
        verify: bool = True,
        rebuild: bool = False,
    ) -> None:
        self.root = Path(root)
        self.verify = verify
        self.rebuild = rebuild  # what is damaged is made again, instead of an error
        self.used: dict[str, Mapping[str, Any]] = {}
        self.on_use: Callable[[], None] = lambda: None  # called whenever `used` has grown
        self._makers = makers or {}  # kind -> dotted name of a function from the config to a recipe

    def need(self, kind: str, cfg: Any) -> Artifact:
        """What the configuration asks for, made through the stage that makes it if nobody did before."""
        module, _, name = self._makers[kind].rpartition(".")
        return self.make(getattr(importlib.import_module(module), name)(cfg))

    def make(self, recipe: Recipe | Outside) -> Artifact:
        """The artifact of this recipe: found, or made now with everything it stands on."""
        n_used = len(self.used)
        if isinstance(recipe, Outside):
            artifact = self._outside(recipe)
        else:
            folder = self.root / recipe.kind / recipe.key
            artifact = self._whole(folder, is_last=False) or self._build(recipe, folder)
            with suppress(OSError):  # a store that belongs to somebody else can still be read
                lock_path(artifact.folder).touch()  # when it was last used
            self._note_upstream(recipe)
        self.used[f"{recipe.kind}/{artifact.key}"] = artifact.manifest["identity"]
        if len(self.used) > n_used:
            self.on_use()
        return artifact

    def _note_upstream(self, recipe: Recipe) -> None:
        """What it was made from was stood on too, whether this run made it or found it."""
        for part in recipe.upstream.values():
            if isinstance(part, Recipe):
                self._note_upstream(part)
                identity = json.loads(json.dumps(part.identity))  # as a manifest would tell it
            else:
                identity = part.told
            self.used[f"{part.kind}/{part.key}"] = identity

    def has(self, recipe: Recipe | Outside) -> bool:
        """Is it there already? Nothing is made, and nothing is checked."""
        if isinstance(recipe, Outside):
            return recipe.folder.is_dir()
        return (self.root / recipe.kind / recipe.key / MANIFEST).is_file()

    def is_whole(self, recipe: Recipe) -> bool:
        """Is it there, and as it was sealed? Nothing is made."""
        try:
            return self._found(self.root / recipe.kind / recipe.key) is not None
        except Damaged:
            return False

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
            try:
                check_files(recipe.folder, manifest)
            except Damaged as error:
                raise Damaged(f"{error}; nothing here can make it again: get it anew") from error
        return Artifact(recipe.kind, sealed_key, recipe.folder, manifest)

    def _build(self, recipe: Recipe, folder: Path) -> Artifact:
        upstream = {name: self.make(part).folder for name, part in recipe.upstream.items()}
        with self._writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                found = self._whole(folder)  # by somebody else, while this run waited
                if found is not None:
                    return found
                discard(folder)
                log.info("making %s %s", recipe.kind, folder.name)
                self._build_alone(recipe, folder, upstream)
                manifest = read_manifest(folder)  # while nobody can take it away
        return Artifact(recipe.kind, folder.name, folder, manifest, was_made=True)

    def _build_alone(self, recipe: Recipe, folder: Path, upstream: Mapping[str, Path]) -> None:
        temporary = building(folder)
        temporary.mkdir()
        try:
            started = time.perf_counter()
            recipe.build(temporary, upstream)
            recipe.need_unchanged()
            seal(temporary, recipe.identity, time.perf_counter() - started)
            temporary.replace(folder)
        except BaseException as error:
            answer = None
            if isinstance(error, Exception) and not isinstance(error, (OSError, PrefetchError)):
                answer = disk_error(error, temporary)  # a library's, which may have met the disk
            _remove(temporary)
            if answer is not None:
                raise answer from error
            raise

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """A disk that is full or read-only, said with what to do; any other error is the builder's own."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL or _is_about(error, folder):
                is_full = error.errno in FULL and error.errno != errno.EROFS
                advice = "free the disk or pass store=DIR" if is_full else "pass store=DIR"
                reason = error.strerror or error
                raise ArtifactError(f"{folder}: cannot be written ({reason}); {advice}") from error
            raise

    def _whole(self, folder: Path, *, is_last: bool = True) -> Artifact | None:
        """None = it is not there, or it is damaged and may be made again; the last look says so."""
        try:
            return self._found(folder)
        except Damaged as error:
            if not folder.is_dir():
                return None  # somebody has taken it away meanwhile
            if self.rebuild:
                if is_last:
                    log.warning("%s; it is made again", error)
                return None
            name = f"{folder.parent.name}/{folder.name}"
            raise Damaged(
                f"{error}; artifacts.rebuild=true makes it again, stage=artifacts artifacts.remove={name} removes it"
            ) from error

    def _found(self, folder: Path) -> Artifact | None:
        if not folder.is_dir():
            return None
        manifest = read_manifest(folder)
        if digest_of(manifest["identity"]) != folder.name:
            raise Damaged(f"{folder}: its manifest is that of another artifact")
        if self.verify:
            check_files(folder, manifest)
        return Artifact(folder.parent.name, folder.name, folder, manifest)


def _is_about(error: OSError, folder: Path) -> bool:
    """Does it name a file where the artifact is written, or a folder on the way to it? Some do so in words only."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return str(folder) in str(error)
    place, kind = Path(error.filename).absolute(), folder.parent.absolute()
    return place.is_relative_to(kind) or kind.is_relative_to(place)


def library_version(name: str) -> str:
    if name == "python":
        return ".".join(str(part) for part in sys.version_info[:3])
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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


def building(folder: Path) -> Path:
    """Where it is built, and whence it is deleted; for the holder of its lock alone."""
    return folder.with_name(folder.name + BUILDING)


def discard(folder: Path) -> None:
    """Out of sight in one step, then deleted, with what a killed run left of it; under its lock."""
    doomed = building(folder)
    _remove(doomed)
    if folder.exists():
        folder.rename(doomed)
        _remove(doomed)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
