"""What goes wrong for a reason that the user can mend. It knows no stage; the entry prints it without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefetch.written import FULL

LONGEST = 4000  # characters of a message; files quote themselves in it
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"
)  # control, line ends, turned text


class PrefetchError(Exception):
    """Base of every error whose message says what was wrong, where, what was expected, and what to do.

    It is one line that every terminal and file can hold, whatever a hostile file has put into it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class ConfigError(PrefetchError):
    """The command line or a YAML file asks for something that does not exist or does not fit."""


class FormatError(PrefetchError):
    """A file is not what its reader expects."""


class ArtifactError(PrefetchError):
    """Something in the artifact store is damaged, locked, or cannot be made."""


@contextmanager
def reading(where: Path | str, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes one error that names the file: no traceback of another library."""
    try:
        yield
    except PrefetchError as error:
        place, said = one_line(str(where)), str(error)
        if place in said:
            raise
        head, _, rest = said.partition(": ")  # the file, where more is known of the place in it
        raise type(error)(
            f"{place}: {rest if rest and place.startswith(f'{head}, ') else said}"
        ) from error
    except NameError:
        raise  # a slip of ours, not of the file
    except Exception as error:  # parsers meet damaged bytes with whatever they like
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # of the place where something is written meanwhile
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise FormatError(f"{where}: expected {what}; {type(error).__name__}: {reason}") from error


class MissingData(PrefetchError):
    """This trace cannot tell that: the message says why, and what would be needed."""


def one_line(text: str) -> str:
    """Without what ends a line or moves a cursor; of a long one the beginning, and the end with what to do."""
    line = HIDDEN.sub(" ", text).encode("utf-8", "replace").decode()
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1000]} ... {line[-900:]}"
