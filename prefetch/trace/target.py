"""What a user named to be written: a folder or a file that appears whole or not at all, and replaces nothing.

It is built under another name beside its place and renamed when it is done; an interruption removes it. What a killed
process of this machine left behind is removed by the next that writes to the same place.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefetch.errors import ConfigError
from prefetch.written import FULL, is_alive

BUILDING = ".building"


def check_apart(to: Path | str, *read: Path) -> None:
    """What is read must not change while it is read: nothing is written into it."""
    for folder in read:
        if Path(to).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{to}: lies inside {folder}, which is read; name a place outside of it"
            )


@contextmanager
def new_folder(to: Path | str) -> Iterator[Path]:
    """An empty folder to write into, that becomes `to`; `to` may be there already if it is empty."""
    target = _place(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; nothing is overwritten, name another place")
    temporary = _beside(target)
    try:
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from error
    with _removed_unless_done(temporary, target):
        yield temporary


@contextmanager
def new_file(to: Path | str) -> Iterator[Path]:
    """A path to write to, that becomes `to`."""
    target = _place(to)
    if target.exists():
        raise ConfigError(f"{target}: is there already; nothing is overwritten, name another place")
    temporary = _beside(target)
    try:
        temporary.touch(exist_ok=False)  # else the error would name a file that nobody knows
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from error
    with _removed_unless_done(temporary, target):
        yield temporary


@contextmanager
def _removed_unless_done(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
        _synced(temporary)
        _put(temporary, target)
    except OSError as error:
        _remove(temporary)
        if error.errno not in FULL:
            raise  # of what was read, perhaps: it names its file
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
    except BaseException:
        _remove(temporary)
        raise


def _put(temporary: Path, target: Path) -> None:
    """Into place, unless somebody else was faster."""
    if target.is_file():
        raise ConfigError(f"{target}: was written meanwhile; nothing is overwritten")
    try:
        temporary.replace(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from error


def _place(to: Path | str) -> Path:
    target = Path(to).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def _beside(target: Path) -> Path:
    """A name of this process's own; those of processes that have died are removed."""
    start = f".{target.name}{BUILDING}-{socket.gethostname()}-"
    for left in target.parent.glob(f"{start}*"):
        owner = left.name.removeprefix(start)
        if owner.isdecimal() and (int(owner) == os.getpid() or not is_alive(int(owner))):
            _remove(left)
    return target.with_name(f"{start}{os.getpid()}")


def _synced(path: Path) -> None:
    """On disk before the rename: a power cut must not leave a finished name over empty files."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
