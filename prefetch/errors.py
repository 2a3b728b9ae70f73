"""What goes wrong for a reason that the user can mend. It knows no stage; the entry prints it without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PrefetchError(Exception):
    """Base of every error whose message says what was wrong, where, what was expected, and what to do."""


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
        if str(where) in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
    except NameError:
        raise  # a slip of ours, not of the file
    except Exception as error:  # parsers meet damaged bytes with whatever they like
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise FormatError(f"{where}: expected {what}; {type(error).__name__}: {reason}") from error


class MissingData(PrefetchError):
    """This trace cannot tell that: the message says why, and what would be needed."""
