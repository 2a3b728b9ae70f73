"""Changes of bytes and of lines of text, for any format. A mutator is (bytes, draws) -> bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from fuzzing import odd

LARGEST = 1 << 20  # bytes of an input: what is larger only takes longer
Mutator = Callable[[bytes, Random], bytes]
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORD = re.compile(rb"[A-Za-z_][\w./+-]*")


def bytewise(data: bytes, rng: Random) -> bytes:
    """One to four small accidents of a disk, a copy, or somebody with a hex editor."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(ACCIDENTS)(data, rng)[:LARGEST]
    return data


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 512)))


def _flip(data: bytes, rng: Random) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _overwrite(data: bytes, rng: Random) -> bytes:
    fresh = odd.integer(rng) if rng.random() < 0.7 else rng.choice(odd.TOKENS)
    at = rng.randrange(max(1, len(data)))
    return data[:at] + fresh + data[at + len(fresh) :]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    fresh = rng.choice(
        (rng.choice(odd.TOKENS), odd.integer(rng), rng.randbytes(rng.randrange(1, 9)))
    )
    return data[:at] + fresh + data[at:]


def _delete(data: bytes, rng: Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: Random) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 9, 200)) + data[stop:]


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _swap(data: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, rng), _span(data, rng)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((data, b"\x00" * 64, rng.randbytes(32), b"\n"))


ACCIDENTS = (_flip, _flip, _overwrite, _overwrite, _insert, _delete, _repeat, _truncate, _swap, _append)  # fmt: skip


def text(data: bytes, rng: Random) -> bytes:
    """Numbers, words and lines of a log or a table."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((_number, _number, _number, _word, _line, _line, _encoding, bytewise))(
            data, rng
        )
    return data[:LARGEST]


def _replaced(data: bytes, pattern: re.Pattern[bytes], fresh: bytes, rng: Random) -> bytes:
    found = list(pattern.finditer(data, *_window(data, rng)))
    if not found:
        return data
    one = rng.choice(found)
    return data[: one.start()] + fresh + data[one.end() :]


def _window(data: bytes, rng: Random) -> tuple[int, int]:
    """Where to look: at the beginning as often as anywhere, since headers stand there."""
    start = 0 if rng.random() < 0.5 else rng.randrange(len(data) + 1)
    return start, start + 400


def _number(data: bytes, rng: Random) -> bytes:
    number = rng.choice(odd.NUMBERS) if rng.random() < 0.6 else rng.randrange(-3, 40)
    fresh = repr(number).encode() if rng.random() < 0.85 else rng.choice(odd.TOKENS)
    return _replaced(data, NUMBER, fresh, rng)


def _word(data: bytes, rng: Random) -> bytes:
    fresh = rng.choice(odd.TEXTS)[:6000].encode("utf-8", "surrogatepass")
    return _replaced(data, WORD, fresh, rng)


def _line(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if not lines:
        return b"\n"
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(6)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(j, lines[i])
    elif how == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif how == 3:
        lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
    elif how == 4:
        lines = lines[: i + 1]
    else:
        lines[i] = (
            lines[i].replace(b",", rng.choice((b",,", b";", b"\t", b" "))).replace(b" ", b"  ")
        )
    return b"".join(lines)


def _encoding(data: bytes, rng: Random) -> bytes:
    how = rng.randrange(5)
    if how == 0:
        return b"\xef\xbb\xbf" + data
    if how == 1:
        return data.replace(b"\n", b"\r\n")
    if how == 2:
        return data.decode("utf-8", "replace").encode("utf-16")
    if how == 3:
        return data.rstrip(b"\n")
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"\xe9", b"\x00", b"\xed\xa0\x80")) + data[at:]


def splice(data: bytes, other: bytes, rng: Random) -> bytes:
    """The beginning of one file and the end of another."""
    return (data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :])[:LARGEST]
