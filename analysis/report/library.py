"""The plotting library's script and licence: the only file that imports it."""

from __future__ import annotations

import importlib.metadata

from plotly.offline import get_plotlyjs

NAME = "plotly"


def script() -> str:
    """The whole of it, with the notice of its licence on top."""
    return str(get_plotlyjs())


def licence() -> str:
    """As it lies in the wheel."""
    for path in importlib.metadata.files(NAME) or ():
        if path.name.startswith("LICENSE"):
            return path.read_text().strip()
    return "MIT License; see https://github.com/plotly/plotly.py"


def version() -> str:
    return importlib.metadata.version(NAME)
