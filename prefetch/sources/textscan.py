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
PIECE_BYTES = 1 << 20
ENCODINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"GGUF": "GGUF",
}
OTHER, DIGIT, GAP, END = 0, 1, 2, 3  # what a byte is
KINDS = np.zeros(256, np.uint8)
KINDS[list(b"0123456789")] = DIGIT
KINDS[list(b', \t\r"[]')] = GAP
KINDS[10] = END
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
        if rows.all() and len(self.values_N) == width * len(rows):
            return self.values_N.reshape(-1, width)
        starts = self.starts_R[:-1][rows]
        return self.values_N[starts[:, None] + np.arange(width)]


def read_text(path: Path) -> NDArray[np.uint8]:
    """The bytes of a text file, gzip undone; what is no text in UTF-8 is refused by name."""
    raw = np.fromfile(path, np.uint8) if path.stat().st_size else np.empty(0, np.uint8)
    if bytes(raw[:2]) == b"\x1f\x8b":
        check_inflates(path)
        with gzip.open(path) as file:
            raw = np.frombuffer(file.read(), np.uint8)
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


def check_inflates(path: Path) -> None:
    """Refuses a gzip that is damaged or a bomb before any of it is held: its own word on its size is worth nothing."""
    left = MOST_TIMES * path.stat().st_size + (1 << 20)
    try:
        with gzip.open(path) as file:
            while piece := file.read(PIECE_BYTES):
                left -= len(piece)
                if left < 0:
                    raise FormatError(
                        f"{path}: inflates to more than {MOST_TIMES} times its size; refused"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: expected a gzip file; {error}") from error


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
    n_lines = int(np.count_nonzero(data == 10)) + 1
    n_numbers = (
        len(data) // 2 + 1
    )  # each takes two bytes; pages that are never touched cost nothing
    values = np.empty(n_numbers + 1, np.float32)
    starts, lines = np.empty(n_lines + 1, np.int64), np.empty(n_lines, np.int64)
    named, others = np.empty(n_lines, np.bool_), np.empty((1000, 3), np.int64)
    n_rows, n_values, n_others, bad_line, bad_at = _parse(
        data, KINDS, marker, POWERS, values, starts, lines, named, others
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
def _whole_numbers(data, kinds, at, values, n_values):  # type: ignore[no-untyped-def]
    """A line of nothing but whole numbers, without a branch per number; -1 where the line holds anything else."""
    value, length, kind = np.int64(0), 0, 0
    while kind != END and at < len(data):
        kind = kinds[data[at]]
        if kind == OTHER or length > 15:
            return -1, at
        digit = np.int64(kind == DIGIT)
        values[n_values] = value  # stands only if the number ends here
        n_values += np.int64(length > 0) * (1 - digit)
        value = (value * 10 + data[at] - 48) * digit
        length = (length + 1) * digit
        at += 1
    return n_values, at


@njit(cache=True, nogil=True)
def _parse(data, kinds, marker, powers, values, starts, lines, named, others):  # type: ignore[no-untyped-def] # noqa: C901
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
        if not has_word:
            n_plain, stop = _whole_numbers(data, kinds, at, values, n_values)
            if n_plain >= 0:
                n_values, at = n_plain, stop
                n_rows += 1
                continue
        while at < size and data[at] != 10:
            if kinds[data[at]] == GAP:
                at += 1
                continue
            first, negative, digits, mantissa, scale = at, False, 0, np.int64(0), 0
            if data[at] == 45 or data[at] == 43:
                negative = data[at] == 45
                at += 1
            while at < size and kinds[data[at]] == DIGIT:
                if digits < 18:
                    mantissa = mantissa * 10 + (data[at] - 48)
                else:
                    scale += 1
                digits += 1
                at += 1
            if at < size and data[at] == 46:
                at += 1
                while at < size and kinds[data[at]] == DIGIT:
                    if digits < 18:
                        mantissa = mantissa * 10 + (data[at] - 48)
                        scale -= 1
                    digits += 1
                    at += 1
            value = float(mantissa)
            if digits and at < size and (data[at] == 101 or data[at] == 69):
                at += 1
                below = at < size and data[at] == 45
                at += at < size and (data[at] == 45 or data[at] == 43)
                power, any_digit = 0, False
                while at < size and kinds[data[at]] == DIGIT:
                    power = min(power * 10 + (data[at] - 48), 1000)
                    any_digit = True
                    at += 1
                scale += -power if below else power
                if not any_digit:
                    digits = 0
            is_nan = digits == 0 and at + 3 <= size and (data[at] | 32) == 110
            if is_nan and (data[at + 1] | 32) == 97 and (data[at + 2] | 32) == 110:
                value, digits = np.nan, 1  # a number for the checks to judge, not a broken line
                at += 3
            if digits == 0 or not (at >= size or kinds[data[at]] >= GAP):
                return n_rows, n_values, n_others, line, first
            if scale:
                value *= powers[min(max(scale, -60), 60) + 60]
            values[n_values] = -value if negative else value
            n_values += 1
        n_rows += 1
        at += 1
    return n_rows, n_values, n_others, 0, 0


def whole(
    path: Path, rows: Rows, values: NDArray[np.float32], below: int, what: str, chosen: Any
) -> NDArray[np.int32]:
    """The same numbers as integers in [0, below), or an error that names the line of the first that is not."""
    with np.errstate(invalid="ignore"):
        numbers = values.astype(np.int32)
    if not values.size or (
        numbers.min() >= 0 and numbers.max() < below and (numbers == values).all()
    ):
        return numbers
    bad = (numbers < 0) | (numbers >= below) | (numbers != values)
    row = int(bad.reshape(len(values), -1).any(axis=1).argmax())
    raise FormatError(
        f"{path}, line {rows.lines_R[chosen][row]}: expected {what} as whole numbers from 0 to {below - 1}, "
        f"got {np.atleast_1d(values[row]).tolist()}"
    )
