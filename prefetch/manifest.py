"""A folder's seal: `manifest.json` with what it is, how it was made, and the sum of every file and of itself.

It knows no store. A sum finds damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prefetch.errors import ArtifactError

ROOT, PACKAGES = Path(__file__).parents[1], ("analysis", "prefetch")
MANIFEST = "manifest.json"
FIELDS = {"identity", "git_commit", "made", "seconds", "files", "sum"}


class Damaged(ArtifactError):
    """A sealed folder that does not hold what was sealed."""


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
        if not all(type(one["bytes"]) is int for one in files.values()):
            raise ValueError("expected whole numbers of bytes")
        identity = manifest["identity"]
        if any(not isinstance(identity.get(name, {}), dict) for name in ("config", "upstream")):
            raise ValueError("expected a configuration, and what it was made from, by their names")
        digest_of(identity)  # what holds NaN, nobody has made
        if odd := manifest.keys() - FIELDS:
            raise ValueError(f"fields that no version wrote: {sorted(odd)}")
        if "sum" in manifest and manifest["sum"] != _sum(manifest):  # older ones have none
            raise ValueError("its own sum differs")
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Damaged(f"{path}: the artifact is damaged ({error})") from error
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file is there and holds the bytes that were sealed."""
    for name, sealed in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Damaged(f"{folder / MANIFEST}: names {name!r}, which lies outside its folder")
        if not path.is_file():
            raise Damaged(f"{path}: missing from the artifact")
        if not _is_same(path, sealed):
            raise Damaged(
                f"{path}: its sha256 differs from the manifest, so the artifact is corrupted"
            )


def _is_same(path: Path, sealed: Mapping[str, Any]) -> bool:
    """What a disk cannot read any more is damage as well; what may not be read is none."""
    try:
        return path.stat().st_size == sealed["bytes"] and sha256_of(path) == sealed["sha256"]
    except (OSError, ArtifactError) as error:
        if isinstance(error.__cause__ or error, PermissionError):
            raise ArtifactError(
                f"{path}: may not be read by this user, store=DIR names another store"
            ) from error
        raise Damaged(str(error)) from error


def sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def digest_of(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sum(manifest: Mapping[str, Any]) -> str:
    """Of a manifest without its sum."""
    told = {name: value for name, value in manifest.items() if name != "sum"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, identity: Mapping[str, Any], seconds: float) -> None:
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
    manifest["sum"] = _sum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _sync(folder / MANIFEST)


def _sync(path: Path) -> None:
    """On disk before the rename: a power cut must not leave a sealed folder with empty files."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@cache
def code_digest() -> str:
    """Of both packages' files: two states of one working tree have the same commit."""
    told = "".join(
        f"{path.relative_to(ROOT)} {sha256_of(path)}\n"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    return hashlib.sha256(told.encode()).hexdigest()[:12]


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
