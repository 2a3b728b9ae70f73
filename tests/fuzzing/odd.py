"""Values, texts and bytes that readers tend to trip over. It knows no format."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

RAW = "@@raw:"  # a text that begins so is written without quotes: what JSON can say and Python cannot hold
OUTSIDE = ("../canary", "../../canary", "/etc/passwd", "/proc/self/environ", "a/../../canary")
TEXTS = (
    "", " ", "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\u202e\u2066", "\ud800", "\u0663", "NaN", "inf", "-1", "1e400",
    "0x10", "1_0", "null", "???", "${x}", "${oc.env:HOME}", "=1+1", "|O", "<i8", "x" * 5000, "\n\n", "\r", "\ufeff",
    "__class__", "os.system", "\N{PILE OF POO}", "i" * 70_000,
    *OUTSIDE,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, 65534, 65535, 65536, 2**24, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53,
    2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, -(10**30), 0.5, -0.0, 1e-320, 1e19, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
RAWS = tuple(
    RAW + text
    for text in ("1e400", "-1e400", "9" * 5000, "-", "01", "1.", "tru", "'a'", "[" * 2000, '{"a":' * 2000, "NaN")
)  # fmt: skip
SIZES = (0, 1, 2, 7, 8, 255, 256, 4096, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63,
2**64 - 1)  # fmt: skip
TOKENS = (
    b"-1", b"1e400", b"nan", b"inf", b"99999999999999999999", b"1.5", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b",",
    b"\t",
    b"\n", b"\r\n", b'"', b"'", b"[", b"]", b"{", b"}", b"\\u0000", b"\\ud800", b"../", b"#", b"=", b"PK\x03\x04",
    b"\x1f\x8b", b"\x80\x04", b"\xe9", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00",
)  # fmt: skip


def value(rng: Random) -> Any:
    """Any value that JSON can say, wrong more often than not."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.8:
        return rng.choice(RAWS)
    if kind < 0.84:
        return nested(rng.choice((3, 60, 900)), rng.random() < 0.5)
    few: Any = rng.choice(
        (None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}})
    )
    return few


def nested(depth: int, is_list: bool) -> Any:
    inner: Any = 0
    for _ in range(depth):
        inner = [inner] if is_list else {"a": inner}
    return inner


def integer(rng: Random) -> bytes:
    """A number as binary formats hold it."""
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(SIZES) if rng.random() < 0.7 else rng.getrandbits(8 * size)
    packed = struct.pack("<Q", number % (1 << 64))[:size]
    return packed if rng.random() < 0.8 else packed[::-1]
