"""Numbers out of text logs at the speed of a columnar parser: one compiled pass over the bytes, no loop per row.

It knows no format: a row is a line that begins with a number (or with one named word), its numbers stand between
commas, blanks, tabs, quotes and brackets. Every row keeps its line number, so that an error can name it.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import FormatError

MOST_TIMES = 200  # text of routing deflates 2 to 8 times; more than this is a bomb, or no log
ENCODINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"GGUF": "GGUF",
}
POWERS = 10.0 ** np.arange(-60, 61)


@dataclass(frozen=True, eq=False)
class Rows:
    """R rows of numbers: those of row r are `values_N[starts_R[r]:starts_R[r + 1]]`."""

    values_N: NDArray[np.float32]  # exact for whole numbers below 2**24
    starts_R: NDArray[np.int64]  # one longer than the rows
    lines_R: NDArray[np.int64]  # from 1
    named_R: NDArray[np.bool_]  # did the line begin with the word?
    others: list[
        tuple[int, str]
    ]  # line number and text of lines that are no rows (headers), at most 1,000
    is_cut: (
        bool  # the last line has no newline: whoever wrote it was killed; it is not among the rows
    )

    @property
    def sizes_R(self) -> NDArray[np.int64]:
        return np.diff(self.starts_R)

    def block(self, rows: NDArray[np.bool_], width: int) -> NDArray[np.float32]:
        """The chosen rows, all of this width, as an array."""
        starts = self.starts_R[:-1][rows]
        return self.values_N[starts[:, None] + np.arange(width)]


def read_text(path: Path) -> NDArray[np.uint8]:
    """The bytes of a text file, gzip undone; what is no text in UTF-8 is refused by name."""
    raw = np.fromfile(path, np.uint8) if path.stat().st_size else np.empty(0, np.uint8)
    if bytes(raw[:2]) == b"\x1f\x8b":
        raw = np.frombuffer(_inflate(path, MOST_TIMES * len(raw) + (1 << 20)), np.uint8)
    if not len(raw):
        raise FormatError(f"{path}: the file is empty")
    head = bytes(raw[:4])
    for magic, name in ENCODINGS.items():
        if head.startswith(magic):
            raise FormatError(f"{path}: expected text in UTF-8, found {name}")
    if head.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
    nulls = raw == 0
    if nulls.any():
        line = int((raw[: int(nulls.argmax())] == 10).sum()) + 1
        raise FormatError(f"{path}, line {line}: expected text in UTF-8, found a NUL byte")
    return raw


def _inflate(path: Path, most: int) -> bytes:
    try:
        with gzip.open(path) as file:
            data = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: expected a gzip file; {error}") from error
    if len(data) > most:
        raise FormatError(f"{path}: inflates to more than {MOST_TIMES} times its size; refused")
    return data


def parse_rows(path: Path, data: NDArray[np.uint8], *, word: str = "") -> Rows:
    """Every line that begins with a number, or with `word` followed by numbers."""
    is_cut = len(data) > 0 and int(data[-1]) != 10
    if is_cut:
        ends = np.flatnonzero(data[-(1 << 20) :] == 10)
        data = (
            data[: len(data) - min(len(data), 1 << 20) + int(ends[-1]) + 1]
            if len(ends)
            else data[:0]
        )
    marker = np.frombuffer(word.encode(), np.uint8)
    n_lines, n_numbers = _count(data)
    values = np.empty(n_numbers, np.float32)
    starts, lines = np.empty(n_lines + 1, np.int64), np.empty(n_lines, np.int64)
    named, others = np.empty(n_lines, np.bool_), np.empty((1000, 3), np.int64)
    n_rows, n_values, n_others, bad_line, bad_at = _parse(
        data, marker, POWERS, values, starts, lines, named, others
    )
    if bad_line:
        text = bytes(data[bad_at : bad_at + 120]).split(b"\n")[0].decode(errors="replace")
        raise FormatError(
            f"{path}, line {bad_line}: expected only numbers from here on, got {text!r}"
        )
    starts[n_rows] = n_values
    texts = [
        (int(line), bytes(data[a:b]).decode(errors="replace").strip())
        for line, a, b in others[:n_others]
    ]
    return Rows(
        values[:n_values], starts[: n_rows + 1], lines[:n_rows], named[:n_rows], texts, is_cut
    )


@njit(cache=True, nogil=True)
def _count(data):  # type: ignore[no-untyped-def]
    """Upper bounds: lines, and runs of characters that are no separator."""
    n_lines, n_numbers, inside = 0, 0, False
    for byte in data:
        n_lines += byte == 10
        gap = (
            byte == 44
            or byte == 32
            or byte == 10
            or byte == 9
            or byte == 34
            or byte == 91
            or byte == 93
        )
        n_numbers += inside and gap
        inside = not gap
    return n_lines + 1, n_numbers + 1


@njit(cache=True, nogil=True)
def _parse(data, marker, powers, values, starts, lines, named, others):  # type: ignore[no-untyped-def] # noqa: C901
    n_rows, n_values, n_others, line, at = 0, 0, 0, 0, 0
    size, m = len(data), len(marker)
    while at < size:
        line += 1
        begin = at
        has_word = m > 0 and at + m <= size
        for i in range(m):
            if not has_word or data[at + i] != marker[i]:
                has_word = False
                break
        if has_word:
            at += m
        elif not (
            48 <= data[at] <= 57
        ):  # no digit: a header, or something that the caller must judge
            while at < size and data[at] != 10:
                at += 1
            blank = at - begin == 0 or (at - begin == 1 and data[begin] == 13)
            if not blank and n_others < len(others):
                others[n_others, 0], others[n_others, 1], others[n_others, 2] = line, begin, at
                n_others += 1
            at += 1
            continue
        starts[n_rows], lines[n_rows], named[n_rows] = n_values, line, has_word
        while at < size and data[at] != 10:
            byte = data[at]
            if (
                byte == 44
                or byte == 32
                or byte == 9
                or byte == 34
                or byte == 91
                or byte == 93
                or byte == 13
            ):
                at += 1
                continue
            first, negative, digits, mantissa, scale = at, False, 0, 0.0, 0
            if byte == 45 or byte == 43:
                negative = byte == 45
                at += 1
            while at < size and 48 <= data[at] <= 57:
                mantissa = mantissa * 10.0 + (data[at] - 48)
                digits += 1
                at += 1
            if at < size and data[at] == 46:
                at += 1
                while at < size and 48 <= data[at] <= 57:
                    mantissa = mantissa * 10.0 + (data[at] - 48)
                    digits += 1
                    scale -= 1
                    at += 1
            if digits and at < size and (data[at] == 101 or data[at] == 69):
                at += 1
                below = at < size and data[at] == 45
                at += at < size and (data[at] == 45 or data[at] == 43)
                power, any_digit = 0, False
                while at < size and 48 <= data[at] <= 57:
                    power = min(power * 10 + (data[at] - 48), 1000)
                    any_digit = True
                    at += 1
                scale += -power if below else power
                if not any_digit:
                    digits = 0
            if (
                digits == 0
                and at + 3 <= size
                and (data[at] | 32) == 110
                and (data[at + 1] | 32) == 97
            ):
                mantissa, digits = (
                    np.nan,
                    1,
                )  # "nan": a number for the checks to judge, not a broken line
                at += 3
            end = at >= size or data[at] == 10 or data[at] == 13 or data[at] == 44 or data[at] == 32
            end = end or data[at] == 9 or data[at] == 34 or data[at] == 93
            if digits == 0 or not end:
                return n_rows, n_values, n_others, line, first
            if scale:
                mantissa *= powers[min(max(scale, -60), 60) + 60]
            values[n_values] = -mantissa if negative else mantissa
            n_values += 1
        n_rows += 1
        at += 1
    return n_rows, n_values, n_others, 0, 0


def whole(
    path: Path, rows: Rows, values: NDArray[np.float32], below: int, what: str, chosen: Any
) -> NDArray[np.int32]:
    """The same numbers as integers in [0, below), or an error that names the line of the first that is not."""
    with np.errstate(invalid="ignore"):
        bad = ~((values >= 0) & (values < below) & (values == np.floor(values)))
    if bad.any():
        row = int(bad.reshape(len(values), -1).any(axis=1).argmax())
        raise FormatError(
            f"{path}, line {rows.lines_R[chosen][row]}: expected {what} as whole numbers from 0 to {below - 1}, "
            f"got {np.atleast_1d(values[row]).tolist()}"
        )
    return values.astype(np.int32)
