"""How a page holds data: JSON that no markup can end, gzip in base64, and a budget that is never exceeded.

It knows no run and no page.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

DIGITS = 6  # that are kept of a number in a table
OF_A_MEAN = 12  # digits; those behind them are of the adding up
LONGEST = 300  # characters of a cell that the page opens with


def script_json(content: Any) -> str:
    """For a script element: nothing in it can end the element or begin another, whatever names it holds."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII: no odd line ends
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(text: str) -> str:
    """base64 of gzip: a tenth of most tables. The same text gives the same letters."""
    content = text.encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def packed_json(content: Any) -> str:
    return packed(json.dumps(content, separators=(",", ":"), allow_nan=False))


def plain(value: Any, digits: int = DIGITS) -> Any:
    """A value as JSON has it: text, a short number, or None for what is not defined."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(number):
        return None
    is_count = number.is_integer() and abs(number) < 2**53  # a count stays what it is
    return int(number) if is_count else float(f"{number:.{digits}g}")


def exact(value: Any) -> Any:
    """A number with all its digits; the rest as `plain` has it."""
    is_number = isinstance(value, float) and math.isfinite(value)
    return float(value) if is_number else plain(value)


def short(value: Any) -> Any:
    """A text that a table can show; all of it stands in the run's own view."""
    is_long = isinstance(value, str) and len(value) > LONGEST
    return f"{value[:LONGEST]}\u2026 ({len(value):,} characters)" if is_long else value
