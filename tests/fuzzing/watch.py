"""What is watched while a reader reads one input: errors, time, memory, and what it touches.

It knows no reader and no format. An audit hook cannot be taken back: this belongs into a process of its own.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import site
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from prefetch.errors import LONGEST, PrefetchError

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 5.0  # of computing; whoever sleeps is ended by the parent
SPARE_BYTES = 200 << 20
SLACK_BYTES = (
    1 << 30
)  # of address space, which arenas and stacks of threads reserve and never touch
ACCEPTED, REFUSED, DEFECT = "accepted", "refused", "defect"
ASKED_TOO_MUCH = re.compile(
    r"MemoryError|(can't|cannot|unable to) allocate|malloc of size|bad_alloc", re.IGNORECASE
)
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
        "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "webbrowser.open",
        "os.kill", "os.putenv")  # fmt: skip
OF_PYTHON = (
    "pickle.find_class",
    "marshal.load",
    "code.__new__",
)  # numba's cache and the import system do these as well
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate",
           "shutil.rmtree", "shutil.move", "os.utime", "os.chown")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """Five seconds of computing on one input: no library's `except Exception` may swallow it."""


@dataclass
class Outcome:
    kind: str
    seconds: float  # of computing
    n_bytes: int  # beyond what the process held before
    what: str = ""  # of a defect: one line by which it is known again
    message: str = ""  # what a user would read, or the traceback


class Watch:
    """`of(read)` runs it once. Reading is allowed in the input, the project and Python; writing in `out` alone."""

    def __init__(self, room: Path) -> None:
        self.out = str(room / "out")
        self._readable = (str(room), *_python_folders(), str(ROOT / "prefetch"), str(ROOT / "analysis"),
                          str(ROOT / "configs"), str(ROOT / "tests"), "/proc/", "/sys/", "/dev/", "/usr/share/zoneinfo",
                          "/etc/localtime", "/etc/mime.types", "/etc/ssl")  # fmt: skip
        self._is_on = False
        self.touched: list[str] = []
        sys.dont_write_bytecode = True  # of a module that is imported late
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGPROF, _hang)

    def of(self, read: Callable[[], object], n_input: int, files: Iterable[str]) -> Outcome:
        self.touched.clear()
        before = _begin_memory(n_input)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        self._is_on, error = True, None
        try:
            read()
        except BaseException as raised:  # judged below
            error = raised
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        seconds = time.process_time() - started
        held = max(0, _memory("VmHWM") - before)
        kind, what, message = self._judged(error, held, n_input, files)
        return Outcome(kind, seconds, held, what, message)

    def _judged(
        self, error: BaseException | None, held: int, n_input: int, files: Iterable[str]
    ) -> tuple[str, str, str]:
        told = "" if error is None else f"{type(error).__name__}: {error}"
        fault = self._fault(error, told, held, n_input, files)
        if fault is None:
            return (ACCEPTED if error is None else REFUSED), "", told
        trace = "" if error is None else "".join(traceback.format_exception(error))[-6000:]
        lines = [*self.touched[:9], f"{held >> 20} MiB for {n_input} bytes", trace]
        return DEFECT, f"{fault} in {_place(error)}", "\n".join(lines)

    def _fault(
        self, error: BaseException | None, told: str, held: int, n_input: int, files: Iterable[str]
    ) -> str | None:
        if self.touched:
            return f"touched {_plain(self.touched[0])}"
        if isinstance(error, Hang):
            return "hang"
        if held > 2 * n_input + SPARE_BYTES:
            return "memory"
        if error is None:
            return None
        if not isinstance(error, PrefetchError):
            return type(error).__name__
        chain = " ".join(f"{type(one).__name__}: {one}"[:2000] for one in _chain(error))
        faults = {
            "asks for memory": ASKED_TOO_MUCH.search(chain) is not None,
            "several lines": len(told.splitlines()) != 1,
            "a long message": len(told) > LONGEST + 100,
            "names no file": not any(name in told for name in files),
        }
        return next((name for name, holds in faults.items() if holds), None)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open":
            self._opened(args)
        elif event in (*RUNS, *OF_PYTHON) or event.startswith(
            ("winreg", "ftplib", "http.client", "smtplib", "poplib")
        ):
            if event not in OF_PYTHON or not _is_of_python():
                self.touched.append(f"{event} {str(args)[:200]}")
        elif event in CHANGES:
            where = _named(event, args)
            is_outside = any(not os.path.realpath(path).startswith(self.out) for path in where)
            if is_outside and not _is_of_python():
                self.touched.append(f"{event} {where}")
        elif event == "exec":
            name = getattr(args[0], "co_filename", "?")
            if not name.startswith(
                (*self._readable[1:], "<frozen", "<string>", "<__array_function__")
            ):
                self.touched.append(f"exec {name}")

    def _opened(self, args: tuple[Any, ...]) -> None:
        path, _, flags = (*args, None, None, None)[:3]
        if isinstance(path, int) or path is None:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if path == "<string>":  # Python 3.12 on, for the line that its tokenizer could not read
            return
        real = os.path.realpath(path)
        if isinstance(flags, int) and flags & WRITES:
            if not real.startswith((self.out, "/dev/null")) and not _is_of_python():
                self.touched.append(f"writes {real}")
        elif not real.startswith(self._readable):
            self.touched.append(f"reads {real}")


def _named(event: str, args: tuple[Any, ...]) -> list[str]:
    """The paths that an event is about; relative ones may be of a folder that is open."""
    paths = [os.fspath(path) for path in args[:2] if isinstance(path, (str, os.PathLike))]
    opened = [
        one
        for one in args[1:]
        if isinstance(one, int) and one > 2 and event in ("os.remove", "os.rmdir", "shutil.rmtree")
    ]
    base = str(Path(f"/proc/self/fd/{opened[-1]}").readlink()) if opened else "."
    return [str(Path(base, path)) for path in paths]


def _python_folders() -> tuple[str, ...]:
    found = {sys.prefix, sys.base_prefix, *site.getsitepackages(), *sysconfig.get_paths().values()}
    return tuple(sorted({os.path.realpath(path) for path in found} | found))


def _is_of_python() -> bool:
    """A module that is imported late, or what numba compiled before and finds again."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if any(
            name in frame.f_code.co_filename
            for name in ("/numba/", "<frozen importlib", "dataclasses.py")
        ):
            return True
        frame = frame.f_back
    return False


def _hang(*_: object) -> None:
    raise Hang


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    for _ in range(9):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _place(error: BaseException | None) -> str:
    """The project's own line that was nearest to it."""
    if error is None:
        return "accepted"
    last = "?"
    for one in _chain(error):
        for frame in traceback.extract_tb(one.__traceback__):
            is_ours = frame.filename.startswith((str(ROOT / "prefetch"), str(ROOT / "analysis")))
            if is_ours and not frame.filename.endswith("errors.py"):
                last = f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return last


def _plain(text: str) -> str:
    return re.sub(r"\d+", "N", text)[:160]


def _begin_memory(n_input: int) -> int:
    """Resets the peak; address space is limited so that a huge request fails instead of hurting the machine."""
    Path("/proc/self/clear_refs").write_text("5")
    limit = _memory("VmSize") + 2 * n_input + SPARE_BYTES + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return _memory("VmRSS")


def _memory(name: str) -> int:
    with Path("/proc/self/status").open("rb") as file:
        for line in file:
            if line.startswith(name.encode()):
                return int(line.split()[1]) << 10
    return 0
