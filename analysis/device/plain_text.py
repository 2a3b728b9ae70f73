"""Names from a profile as text that changes nothing round it: on a Markdown page, in a table, in a terminal.

Operations, kernels, files and devices are called what their authors like. It knows no page.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"
)  # control, line ends, turned text
MARKS = re.compile(  # code, emphasis, cells, formulas; emphasis by underscores at an end of a word; links
    r"[\\`*|~$]|(?<![^\W_])__|__(?![^\W_])|!?\[(?=[^\[\]]*\]\()"
)
LONGEST = 300  # characters of one name


def one_line(text: str) -> str:
    """Without what moves a cursor or ends a line."""
    return HIDDEN.sub(" ", text).strip()


def shown(text: str) -> str:
    """As Markdown that reads as the text itself."""
    return MARKS.sub(_escaped, one_line(text)).replace("<", "&lt;")


def short(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _escaped(found: re.Match[str]) -> str:
    return "".join("\\" + character for character in found[0])
