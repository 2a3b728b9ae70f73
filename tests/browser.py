"""A headless Chromium for tests of pages, driven over its own pipe: no driver, no port, no library.

Speaks the DevTools protocol: JSON that ends with NUL, on file descriptors 3 and 4. Where no Chromium is, tests
skip; where CHROMIUM names one, it must run.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60  # of one call; a busy machine starts slowly
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--remote-debugging-pipe", "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

PLACE = """
import fcntl, os, sys
high = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]  # they may be 3 and 4 themselves
for wanted, end in zip((3, 4), high):
    os.dup2(end, wanted)
os.execvp(sys.argv[3], sys.argv[3:])
"""  # wherever the pipes are, they become 3 and 4; then this process is the browser


def chromium() -> str | None:
    """The program; None = there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `problems` are its errors and warnings on the console, `asked` every address that it wanted."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._said = Path(self._profile.name, "stderr.txt")
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._process, self._write, self._read = self._begun(program)
        try:
            (target,) = [t for t in self._targets() if t["type"] == "page"]
            attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _begun(self, program: str) -> tuple[subprocess.Popen[bytes], int, int]:
        """The process, and our ends of its two pipes."""
        down, up = os.pipe(), os.pipe()
        theirs, ours = (down[0], up[1]), (down[1], up[0])
        place = [sys.executable, "-ISc", PLACE, *map(str, theirs)]
        command = [
            *place,
            program,
            *OPTIONS,
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        with self._said.open("wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=theirs
            )
        for end in theirs:
            os.close(end)
        return process, *ours

    def _targets(self) -> list[dict[str, Any]]:
        """Of a browser that has just begun, once it has a page."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found: list[dict[str, Any]] = self.call("Target.getTargets")["targetInfos"]
            if any(target["type"] == "page" for target in found):
                return found
            time.sleep(0.05)
        raise TimeoutError("Chromium opened no page")

    def call(self, method: str, **settings: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        told: dict[str, Any] = {"id": self._number, "method": method, "params": settings}
        if self._session:
            told["sessionId"] = self._session
        os.write(self._write, json.dumps(told).encode() + b"\0")
        end = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(end, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, *_ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                said = self._said.read_text(errors="replace")[-2000:]
                raise TimeoutError(
                    f"{what}: Chromium did not answer ({self._process.poll()}): {said}"
                )
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(
                str(details.get("exception", {}).get("description", details["text"]))
            )
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(
                " ".join(str(a.get("value", a.get("description"))) for a in told["args"])
            )
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(told["entry"]["text"])

    def open(self, path: Path, address: str = "") -> None:
        """A file, at an address in it; returns when the page says that it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.resolve().as_uri() + address)
        self.wait("document.documentElement?.dataset.ready")

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        told = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in told:
            raise RuntimeError(
                f"{expression}: {told['exceptionDetails']['exception']['description']}"
            )
        return told["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"{expression} was never true; {self.problems}"
            time.sleep(0.02)
        return value

    def size(self, width: int, height: int = 900, *, is_phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )

    def prefer(self, **features: str) -> None:
        """What a media query is told: prefer(prefers_color_scheme="dark")."""
        told = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=told)

    def point_at(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key: press("Tab", 9)."""
        for kind in ("keyDown", "keyUp"):
            said = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **said,
            )

    def picture(self, path: Path, *, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
