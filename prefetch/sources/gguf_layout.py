"""What a GGUF file says of its own layout, walked through before the gguf library reads it, which believes any count.

Layout: ggml-org/ggml, docs/gguf.md. It knows no tensor and no meaning of a key.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from prefetch.errors import FormatError

# keys, entries of lists and tensors together: an importance matrix has a few thousand
MOST_ENTRIES = 1 << 16
MOST_AXES = 4
# bytes of a value, by its type
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9


def check_layout(path: Path) -> None:
    """Every key, value and tensor's description ends within the file, and there are not too many of them."""
    _Walk(path).check()


class _Walk:
    def __init__(self, path: Path) -> None:
        self.data: Any = np.memmap(path, np.uint8, "r")
        self.at, self.entries = 4, 0
        self.order = "<" if int.from_bytes(bytes(self.data[4:8]), "little") & 0xFFFF else ">"

    def check(self) -> None:
        self._number("I")  # version
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        self._count(n_tensors + n_keys)
        for _ in range(n_keys):
            self._text()
            self._value(self._number("I"))
        for _ in range(n_tensors):
            self._text()
            n_axes = self._number("I")
            if n_axes > MOST_AXES:
                raise FormatError(f"a tensor of {n_axes} axes")
            self._pass(8 * n_axes + 4 + 8)  # sizes, type, place

    def _value(self, kind: int) -> None:
        if kind == TEXT:
            self._text()
        elif kind == LIST:
            inner, n_entries = self._number("I"), self._number("Q")
            self._count(n_entries)
            for _ in range(n_entries):
                self._value(inner)
        elif kind in SIZES:
            self._pass(SIZES[kind])
        else:
            raise FormatError(f"a value of the unknown type {kind}")

    def _count(self, n: int) -> None:
        self.entries += n
        if self.entries > MOST_ENTRIES:
            raise FormatError(f"promises more than {MOST_ENTRIES:,} entries")

    def _text(self) -> None:
        self._pass(self._number("Q"))

    def _number(self, kind: str) -> int:
        (number,) = struct.unpack_from(f"{self.order}{kind}", self.data, self.at)
        self._pass(struct.calcsize(kind))
        return int(number)

    def _pass(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.data):
            raise FormatError(
                f"its description ends behind the file, which has {len(self.data):,} bytes"
            )
