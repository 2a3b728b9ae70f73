"""Stage `artifacts`: what the store holds, who made it from what, and what nothing uses any more."""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefetch.artifacts import BUILDING, UNFINISHED, Store, discard, lock_path
from prefetch.config import ArtifactsConfig, Config
from prefetch.errors import ArtifactError, ConfigError
from prefetch.manifest import MANIFEST, Damaged, check_files, read_manifest
from prefetch.runs.index import RUNS
from prefetch.written import left_parts

KEY = re.compile("[0-9a-f]{16}")  # what has another name was put there by somebody else


@dataclass(frozen=True)
class Entry:
    """One artifact as the list shows it."""

    kind: str
    key: str
    made_by: str  # source or predictor, where the recipe names one
    made_from: tuple[str, ...]
    n_bytes: int
    age_s: float
    idle_s: float  # since a run last asked for it
    folder: Path
    damage: str | None = None  # what is wrong with it, as far as its manifest tells

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.key}"


def entries(store: Store) -> list[Entry]:
    """Every sealed artifact, oldest first."""
    found = [_entry(path) for path in sorted(store.root.glob("*/*")) if KEY.fullmatch(path.name)]
    return sorted(found, key=lambda entry: -entry.age_s)


def _entry(folder: Path) -> Entry:
    try:
        manifest: dict[str, Any] = read_manifest(folder)
        damage, n_bytes = None, sum(file["bytes"] for file in manifest["files"].values())
    except Damaged as error:
        manifest, damage = {"identity": {}}, str(error)
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    upstream = manifest["identity"].get("upstream", {})
    settings = manifest["identity"].get("config", {})
    return Entry(
        kind=folder.parent.name,
        key=folder.name,
        made_by=str(settings.get("source") or settings.get("predictor") or ""),
        made_from=tuple(f"{kind}/{key}" for kind, key in upstream.items()),
        n_bytes=n_bytes,
        age_s=_since(folder / MANIFEST),
        idle_s=min(_since(folder / MANIFEST), _since(lock_path(folder))),
        folder=folder,
        damage=damage,
    )


def damaged(held: list[Entry]) -> list[Entry]:
    """Those whose files are not what was sealed: every byte is read."""
    found = []
    for entry in held:
        damage = entry.damage
        try:
            if damage is None:
                check_files(entry.folder, read_manifest(entry.folder))
        except Damaged as error:
            damage = str(error)
        except ArtifactError as error:
            print(f"{error}; nobody can tell here whether it is damaged, so it stays")
        if damage is not None:
            print(damage)
            found.append(entry)
    return found


def _since(path: Path) -> float:
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else float("inf")


def used_names(store: Store, held: list[Entry]) -> set[str]:
    """What a run that still has its folder stood on, and everything that was made from."""
    used: set[str] = set()
    for path in (store.root / RUNS).glob("*.json"):
        try:
            run = json.loads(path.read_text())
            is_there, stood_on = _is_there(Path(run["folder"])), set(run["used"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: the entry of a run is damaged; remove the file"
            ) from error
        if is_there:
            used |= stood_on
    made_from = {entry.name: entry.made_from for entry in held}
    waiting = list(used)
    while waiting:
        fresh = set(made_from.get(waiting.pop(), ())) - used
        used |= fresh
        waiting += fresh
    return used


def _is_there(folder: Path) -> bool:
    """Of a folder that may not be looked at, nobody here can tell: it counts as there."""
    try:
        return folder.is_dir()
    except PermissionError:
        return True


def remove(entry_folder: Path) -> None:
    """A reader never meets half an artifact."""
    with FileLock(lock_path(entry_folder)):
        discard(entry_folder)


def sweep_remains(store: Store) -> list[Path]:
    """Temporary folders of runs that were killed, whose lock nobody holds, and files that nobody is writing."""
    swept = []
    for path in [path for folder in _folders_of_files(store) for path in left_parts(folder)]:
        with suppress(OSError):  # somebody else's, or a disk that cannot be written: it stays
            path.unlink()
            swept.append(path)
    for folder in store.root.glob(f"*/*{BUILDING}"):
        lock = FileLock(lock_path(folder.with_name(folder.name.removesuffix(BUILDING))), timeout=0)
        try:
            with lock:
                shutil.rmtree(folder)
                swept.append(folder)
        except OSError:
            continue  # somebody is building it now (Timeout is one), or it stays, as above
    return swept


def _folders_of_files(store: Store) -> list[Path]:
    """Where single files are written, and not folders: the index of runs, and rows that were kept."""
    return [store.root / RUNS, *store.root.glob(f"*/.*{UNFINISHED}")]


def drop_unfinished(store: Store) -> list[Path]:
    """Where interrupted fits would go on, not those that go on now; and rows of evaluations, which nobody locks."""
    dropped = []
    for folder in store.root.glob(f"*/.*{UNFINISHED}"):
        key = folder.name.removeprefix(".").removesuffix(UNFINISHED)
        try:
            with FileLock(lock_path(folder.with_name(key)), timeout=0):
                shutil.rmtree(folder)
                dropped.append(folder)
        except OSError:
            continue
    return dropped


def run(cfg: Config, store: Store) -> None:
    """Lists; with artifacts.remove=unused, damaged or kind/key it removes first."""
    try:
        for folder in sweep_remains(store):
            print(f"removed the remains of a killed run: {folder}")
        if cfg.artifacts.remove == "unused":
            for folder in drop_unfinished(store):
                print(f"removed the checkpoints of an interrupted fit: {folder}")
        held = entries(store)
        used = used_names(store, held)
        for entry in _doomed(cfg.artifacts, held, used):
            remove(entry.folder)
            print(f"removed {entry.name} ({entry.n_bytes:,} bytes)")
            held.remove(entry)
    except OSError as error:
        raise ArtifactError(f"{store.root}: {error}") from error
    _show(held, used, store)


def _doomed(cfg: ArtifactsConfig, held: list[Entry], used: set[str]) -> list[Entry]:
    wanted = cfg.remove
    if wanted is None:
        return []
    if wanted == "damaged":
        return damaged(held)
    if wanted == "unused":
        idle = [entry for entry in held if entry.name not in used]
        fresh = [entry for entry in idle if entry.idle_s < 60 * cfg.spare_minutes]
        for entry in fresh:
            print(
                f"spared {entry.name}: a run may stand on it, it was used {_duration(entry.idle_s)} ago "
                f"(artifacts.spare_minutes={cfg.spare_minutes:g})"
            )
        return [entry for entry in idle if entry not in fresh]
    named = [entry for entry in held if entry.name.startswith(wanted)]
    if len(named) != 1:
        names = ", ".join(entry.name for entry in held) or "nothing"
        raise ConfigError(
            f"artifacts.remove={wanted}: expected unused, damaged or the name of one artifact, "
            f"it fits {len(named)}; the store holds {names}"
        )
    return named


def _show(held: list[Entry], used: set[str], store: Store) -> None:
    if not held:
        print(f"{store.root}: no artifacts")
        return
    title = f"{store.root}: {len(held)} artifacts, {sum(e.n_bytes for e in held):,} bytes"
    table = Table(title=Text(title))
    columns: dict[str, Any] = {
        "kind": "left",
        "key": "left",
        "made by": "left",
        "made from": "left",
        "bytes": "right",
        "age": "right",
    }
    for name, justify in {**columns, "used": "left"}.items():
        table.add_column(name, justify=justify, no_wrap=True)
    for entry in held:
        age = _duration(entry.age_s)
        is_used = "yes" if entry.name in used else "no"
        is_used = is_used if entry.damage is None else f"{is_used}, damaged"
        table.add_row(
            entry.kind,
            entry.key,
            entry.made_by,
            "\n".join(entry.made_from),
            f"{entry.n_bytes:,}",
            age,
            is_used,
        )
    Console(width=max(120, Console().width)).print(table)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
