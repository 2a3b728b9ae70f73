"""Keeps secrets out of what a run leaves: keys and tokens by their shape or their name, passwords in addresses.

It knows no stage and no tracker. What stands in the configuration or the environment under a telling name
(`hub_token`, `WANDB_API_KEY`) is hidden there and wherever else the same characters turn up.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    import pandas as pd

HIDDEN = "REDACTED"
SHORTEST, SHORTEST_OF_ENVIRONMENT = 4, 8  # characters; shorter ones stand in ordinary words
NO_PASSWORD = {"PWD", "OLDPWD"}  # a shell's folders, and the start of most paths that a run names
NUMBERS = {".csv", ".json"}
TEXT_FILES = {".csv", ".html", ".json", ".log", ".md", ".svg", ".txt", ".yaml"}
_WORD = (
    r"(?:auth|access|hub|api|hf)?token|passw(?:or)?d|passphrase|pwd|secret|credentials?"
    r"|authorization|(?:api|access|private|secret|account)[_-]?key|signature|sas"
)
# "token" alone or at the end, never "tokens" or "token_table": here a token is also a piece of text
NAME = re.compile(rf"(?:^|[_.\-+~]|(?<=[a-z])(?=[A-Z]))(?:{_WORD})$", re.IGNORECASE)
ADDRESS = re.compile(r"(?<=://)([^/\s\"'?#]+)@")
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bgh[oprsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{40,}|\bglpat-[\w-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bwandb_v\d_\w{20,}"
    r"|\blocal-[0-9a-f]{40}\b|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL,
)
AFTER = re.compile(  # in an address's query, in a header: what follows the name goes
    r"([?&](?:[\w-]*token|key|api_?key|sig|[\w-]*signature|password|secret|[\w-]*credential)=)[^&\s\"'#]+"
    r"|(\b(?:bearer|basic)\s+)[\w.~+/=-]{12,}",
    re.IGNORECASE,
)
LINE = re.compile(  # of YAML: a setting, or an override as it was typed
    rf"^(\s*(?:-\s+)?['\"]?[+~]*(?:[\w.@/\-]*[_.\-])?(?:{_WORD})['\"]?\s*(?:[:=])[ \t]*)(?!null\b|\S*\$\{{)(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


class Redactor:
    """Hides what is secret in one run: learnt from its configuration and the environment, then asked for texts."""

    def __init__(self, settings: Any = None, environment: Mapping[str, str] | None = None) -> None:
        found = {text for text in _secrets(settings) if len(text) >= SHORTEST}
        for name, text in (os.environ if environment is None else environment).items():
            if name in NO_PASSWORD or not NAME.search(name):
                continue
            if len(text) >= SHORTEST_OF_ENVIRONMENT:
                found.add(text)
        self._literals = sorted(found, key=len, reverse=True)

    def text(self, said: str, *, has_numbers: bool = False) -> str:
        """`has_numbers`: of a table or JSON, in which a password of digits is told from no count."""
        for literal in self._literals:
            if not literal.isdecimal():
                said = said.replace(literal, HIDDEN)
            elif not has_numbers:
                said = re.sub(rf"(?<![\w.]){literal}(?![\w.])", HIDDEN, said)
        said = ADDRESS.sub(f"{HIDDEN}@", said)
        said = SHAPES.sub(HIDDEN, said)
        return AFTER.sub(lambda match: f"{match[1] or match[2]}{HIDDEN}", said)

    def value(self, said: Any, name: str = "") -> Any:
        """The same value without its secrets, as deep as it goes."""
        if isinstance(said, Mapping):
            return {self.text(str(key)): self.value(one, str(key)) for key, one in said.items()}
        if isinstance(said, (list, tuple)):
            return [self.value(one, name) for one in said]
        if isinstance(said, str):
            return HIDDEN if said and NAME.search(name) else self.text(said)
        return said

    def words(self, typed: Sequence[str]) -> list[str]:
        """Overrides as they were typed: `source.hub_token=...`."""
        parts = [(word, *word.partition("=")) for word in typed]
        return [
            f"{name}={HIDDEN}" if value and NAME.search(name) else self.text(word)
            for word, name, _, value in parts
        ]

    def frame(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A table whose texts are safe; itself where there was nothing to hide."""
        for name in frame.columns[[dtype.kind == "O" for dtype in frame.dtypes]]:
            texts = {one for one in frame[name] if isinstance(one, str)}
            hidden = {one: safe for one in texts if (safe := self.text(one)) != one}
            if hidden:
                column = [
                    hidden.get(one, one) if isinstance(one, str) else one for one in frame[name]
                ]
                frame = frame.assign(**{str(name): column})
        return frame

    def yaml(self, path: Path) -> None:
        """Rewrites a YAML file if it holds something to hide: what Hydra keeps of a command line."""
        if not path.is_file():
            return
        said = path.read_text()
        safe = LINE.sub(lambda match: f"{match[1]}{HIDDEN}", self.text(said))
        if safe != said:
            _replace(path, safe)

    def command_line(self, folder: Path) -> None:
        """What Hydra wrote of it into the folder of a run, and of a sweep above."""
        for path in (*folder.glob(".hydra/*.yaml"), folder.parent / "multirun.yaml"):
            self.yaml(path)

    def seen(self, folder: Path, leave: str = "wandb") -> dict[Path, int]:
        """The text files below a folder and when each was written, in ns; none where nothing is to be hidden."""
        found = folder.rglob("*") if self._literals else ()
        texts = (path for path in found if path.suffix in TEXT_FILES and not path.is_symlink())
        ours = (path for path in texts if leave not in path.relative_to(folder).parts)
        return {path: path.stat().st_mtime_ns for path in ours if path.is_file()}

    def folder(self, folder: Path, before: Mapping[Path, int]) -> None:
        """The last resort: text files below a folder, written since it was `seen`, that hold a known secret.

        Only what is new: a run may have been told to write where the user's own files lie. Clocks are set back, so
        that another time is new, not only a later one.
        """
        known = [literal.encode() for literal in self._literals]
        for path, written_ns in self.seen(folder).items():
            if before.get(path) == written_ns:
                continue
            data = path.read_bytes()
            if any(literal in data for literal in known):
                said, has_numbers = data.decode(errors="replace"), path.suffix in NUMBERS
                if (safe := self.text(said, has_numbers=has_numbers)) != said:
                    _replace(path, safe)

    @contextmanager
    def logs(self) -> Iterator[None]:
        """While this lasts, what is logged is safe before any handler writes it."""
        handlers, hiding = list(logging.getLogger().handlers), HidingFilter(self)
        for handler in handlers:
            handler.addFilter(hiding)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(hiding)


class HidingFilter(logging.Filter):
    """On a log's handlers: a message is made safe before anybody writes it."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if (safe := self._redactor.text(said)) != said:
            record.msg, record.args = safe, ()
        return True


def _secrets(settings: Any, name: str = "") -> Iterator[str]:
    """What stands under a telling name, and passwords in addresses, also as they read decoded."""
    if isinstance(settings, Mapping):
        for key, one in settings.items():
            yield from _secrets(one, str(key))
    elif isinstance(settings, (list, tuple)):
        for one in settings:
            yield from _secrets(one, name)
    elif isinstance(settings, str):
        if NAME.search(name):
            yield settings
        for user in ADDRESS.findall(settings):
            password = user.partition(":")[2]
            yield from {password, unquote(password)}


def _replace(path: Path, text: str) -> None:
    """In place, so that a log that is still open is not lost: whoever writes it appends."""
    with path.open("r+") as file:
        file.write(text)
        file.truncate()
