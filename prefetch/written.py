"""A file that is there whole or not at all, and what those left who were killed while they wrote one.

It knows no stage and no store.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PART = ".part"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # of a disk that takes nothing more
ENOUGH = 2**20  # bytes; a disk that takes so much has not failed for want of room
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_OWNER = re.compile(r"-(\d+)-\d+\.part$")  # process and thread


def write_whole(path: Path, text: str, *, lasting: bool = True) -> None:
    """Under another name beside its place, then renamed. `lasting`: a power cut leaves no empty file either."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}-{owner}{PART}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the disk may be what failed
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # nobody knows the other name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def left_parts(folder: Path, *, alone: bool = False) -> Iterator[Path]:
    """What `write_whole` began there and cannot end, because its process has died.

    Of another machine's nothing can be known, but by whoever is `alone` at work in that folder and below.
    """
    found = (
        folder.rglob(f".*{PART}") if alone else folder.glob(f".*-{socket.gethostname()}-*{PART}")
    )
    for path in list(found):
        owner = _OWNER.search(path.name)
        if owner and (alone or not is_alive(int(owner[1]))):
            yield path


def disk_error(error: Exception, folder: Path) -> OSError | None:
    """What the disk answered to whoever wrote into this folder; None = it was not the disk.

    Libraries that are no Python tell it in words, or not at all: then it is asked again.
    """
    if told := _OF_RUST.search(str(error)):
        return OSError(int(told[1]), os.strerror(int(told[1])), str(folder))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ENOUGH))
            file.flush()
    except OSError as answer:
        return answer
    return None


def is_alive(process: int) -> bool:
    """Of this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
