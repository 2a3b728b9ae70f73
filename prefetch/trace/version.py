"""Which version of a format a description file is, said in one line where it is not the one that is read.

It knows no format: a schema is `family/number`, and a family's older numbers are brought up by `migrate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefetch.errors import FormatError, reading

MIGRATED = ("prefetch.trace",)  # families whose older numbers can be brought up


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """A versioned description file; what it is not is said in one line."""
    if not path.is_file():
        raise FormatError(f"{path}: not found; expected a folder with {path.name} ({schema})")
    with reading(path, f"JSON of schema {schema}"):
        about = json.loads(path.read_text())
    if not isinstance(about, dict) or about.get("schema") != schema:
        found = about.get("schema") if isinstance(about, dict) else type(about).__name__
        raise FormatError(
            f"{path}: expected schema {schema}, found {found}{_remedy(found, schema)}"
        )
    return about


def split_schema(schema: Any) -> tuple[str, int | None]:
    """(family, number); a number that is none is None."""
    family, _, number = str(schema).rpartition("/")
    return family, int(number) if number.isascii() and number.isdecimal() else None


def _remedy(found: Any, schema: str) -> str:
    (family, wanted), (its_family, number) = split_schema(schema), split_schema(found)
    if its_family != family or number is None or wanted is None:
        return ""
    if number > wanted:
        return "; a newer version of this project wrote it: update this one"
    if family in MIGRATED:
        return "; it is older: stage=traces traces.do=migrate traces.to=DIR writes it anew"
    return "; an older version of this project wrote it: make it anew"
