"""Reads the JSON of a profiler event by event, plain or gzipped, and never holds more than a piece of the text.

It knows the frame (an object with a list `traceEvents`, or the bare list) and nothing of what an event means.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from prefetch.errors import FormatError

PIECE_BYTES = 1 << 20
MOST_BYTES = 1 << 26  # of one event or one entry of metadata: more is no profile
NEAR_END = 16  # characters: a literal or a number that the piece cuts off fails there, not before
EVENTS = "traceEvents"
SPACE = " \t\r\n"
ZIP = "PK\x03\x04"


class ChromeTrace:
    """`events()` yields each event once; `meta` holds what stands beside them, complete when all have been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self._text, self._at, self._done, self._read = "", 0, False, 0
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._file: IO[bytes] | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        with self._open() as self._file:
            if self._next() == "[":
                yield from self._list()
            elif self._char() == "{":
                yield from self._object()
            else:
                raise self._no_json()
            self._end()

    def _open(self) -> IO[bytes]:
        with self.path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        if self.path.suffix == ".gz" and not is_gzip:
            raise FormatError(f"{self.path}: its name ends in .gz, but it is not gzipped")
        return cast(IO[bytes], gzip.open(self.path, "rb") if is_gzip else self.path.open("rb"))

    def _object(self) -> Iterator[dict[str, Any]]:
        self._at += 1
        found_events = False
        while self._next() != "}":
            key = self._value()
            if self._next() != ":":
                raise self._wrong(f"expected : after {str(key)[:60]!r}, found {self._near()!r}")
            self._at += 1
            if key == EVENTS and self._next() == "[":
                found_events = True
                yield from self._list()
            else:
                self._next()
                self.meta[str(key)] = self._value()
            self._comma("}")
        self._at += 1
        if not found_events:
            raise self._wrong(
                f"expected a list {EVENTS!r}, found only {sorted(self.meta)[:8]}; "
                "pass what torch.profiler's export_chrome_trace wrote"
            )

    def _list(self) -> Iterator[dict[str, Any]]:
        self._at += 1
        while self._next() != "]":
            event = self._value()
            if not isinstance(event, dict):
                raise self._wrong(f"expected an event {{...}}, found {str(event)[:60]!r}")
            yield event
            self._comma("]")
        self._at += 1

    def _end(self) -> None:
        """Reads to the end of the file, where a gzip has its checksum: two profiles in one file are none."""
        while self._text[self._at :].strip(SPACE) == "":
            self._at = len(self._text)
            if not self._more():
                return
        self._next()
        raise self._wrong(f"expected the end of the file, found {self._near()!r}")

    def _comma(self, end: str) -> None:
        found = self._next()
        if found == ",":
            self._at += 1
        elif found != end:
            raise self._wrong(f"expected , or {end}, found {self._near()!r}")

    def _next(self) -> str:
        """The next character that is no space; reads on where the piece is used up."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                raise self._wrong("ends early: the profile is incomplete, record it again")

    def _char(self) -> str:
        return self._text[self._at]

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._done:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                if not cut and error.pos < len(self._text) - NEAR_END:
                    raise self._wrong(f"is not JSON ({error.msg}), near {self._near()!r}") from None
            except RecursionError:
                raise self._wrong("is nested too deep to be a profile") from None
            if len(self._text) - self._at > MOST_BYTES:
                raise self._wrong(f"one value is longer than {MOST_BYTES >> 20} MiB")
            if not self._more():
                raise self._wrong("ends early: the profile is incomplete, record it again")

    def _more(self) -> bool:
        """Drops what was used and reads the next piece; False at the end of the file."""
        if self._done:
            return False
        assert self._file is not None
        try:
            # as much again as a long value has needed, so that it is not scanned piece by piece
            piece = self._file.read(max(PIECE_BYTES, len(self._text) - self._at))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._wrong(f"the gzip is damaged or cut off ({error})") from error
        self._read += len(piece)
        self._done = not piece
        self._text = self._text[self._at :] + self._utf8.decode(piece, final=self._done)
        self._at = 0
        return bool(piece)

    def _no_json(self) -> FormatError:
        if self._near().startswith(ZIP):
            return FormatError(f"{self.path}: is a zip archive: unpack it, and pass the profile")
        found = self._near()
        return FormatError(
            f"{self.path}: expected JSON that begins with {{ or [, found {found!r} at its beginning"
        )

    def _near(self) -> str:
        return self._text[self._at : self._at + 40]

    def _wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: after {self._read:,} bytes of JSON: {what}")
