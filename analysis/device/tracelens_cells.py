"""Cells of TraceLens's tables: numbers, texts and printed Python values; None where a cell is none of these."""

from __future__ import annotations

import ast
import math
import re
from typing import Any


def nested(value: Any) -> Any:
    """A printed Python value, with NumPy's wrappers taken off; None where it is none."""
    if not isinstance(value, str):
        return None
    try:
        return ast.literal_eval(re.sub(r"np\.\w+\(([^()]*)\)", r"\1", value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def text_of_id(value: Any) -> str:
    """A column with empty cells has its numbers as fractions."""
    found = number(value)
    return str(int(found)) if found is not None and found == int(found) else str(value)
