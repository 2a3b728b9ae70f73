"""Text to run a model on: files, folders, jsonl, or a set of the datasets library. It knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.optional import require
from prefetch.sources.files import domain_of


@dataclass(frozen=True)
class Text:
    content: str
    domain: str
    where: str  # file and line, for errors


@dataclass(frozen=True)
class Request:
    tokens: list[int]
    domain: str


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold the text and, optionally, its domain."""

    text: str = "text"
    domain: str | None = None

    def read(self, record: Any, *, domain: str, where: str) -> Text:
        wanted = [self.text] if self.domain is None else [self.text, self.domain]
        if not isinstance(record, Mapping):
            raise FormatError(
                f"{where}: expected an object with the fields {wanted}, got {record!r:.80}"
            )
        for name in wanted:
            if not isinstance(record.get(name), str):
                raise FormatError(
                    f"{where}: expected text in the field {name!r}, got {record.get(name)!r:.80}; the fields are "
                    f"{sorted(record)}: pass source.field=..."
                )
        return Text(record[self.text], record[self.domain] if self.domain else domain, where)


def file_texts(files: Mapping[str, Path], fields: Fields) -> Iterator[Text]:
    """One text per file, or per line of a .jsonl; the subfolder, else the file's name, is the domain."""
    for name, path in files.items():
        parent = PurePath(name).parent.name
        domain = parent if parent and not PurePath(name).is_absolute() else domain_of(name)
        try:
            if path.suffix == ".jsonl":
                yield from _lines(path, domain, fields)
            else:
                yield Text(path.read_text(encoding="utf-8"), domain, str(path))
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: expected UTF-8 text; {error}") from error


def _lines(path: Path, domain: str, fields: Fields) -> Iterator[Text]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.isspace():
                continue
            with reading(where, "one JSON object per line"):
                record = json.loads(line)
            yield fields.read(record, domain=domain, where=where)


def dataset_texts(
    name: str, *, part: str | None, split: str, revision: str, fields: Fields
) -> Iterator[Text]:
    """The rows of a set on the hub, at the commit that was pinned."""
    datasets = require("datasets", "load_dataset", asked_by=f"source.dataset={name}")
    try:
        rows = datasets.load_dataset(name, part, split=split, revision=revision, streaming=True)
    except Exception as error:  # a class of its own for every way to fail
        first_line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"source.dataset={name}: cannot be loaded ({type(error).__name__}: {first_line})"
        ) from error
    for number, row in enumerate(rows):
        yield fields.read(row, domain=domain_of(name), where=f"{name}, row {number}")


def windows(tokenizer: Any, text: Text, size: int) -> list[list[int]]:
    """A text as consecutive requests of at most `size` tokens, each with the special tokens that the model expects."""
    if not tokenizer.is_fast:
        tokens = tokenizer(text.content)["input_ids"]
        return [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if size <= tokenizer.num_special_tokens_to_add():
        raise ConfigError(
            f"source.request_tokens={size}: the special tokens of this tokenizer alone are "
            f"{tokenizer.num_special_tokens_to_add()}"
        )
    if not text.content:
        return []
    cut = tokenizer(text.content, truncation=True, max_length=size, return_overflowing_tokens=True)[
        "input_ids"
    ]
    return [tokens for tokens in cut if tokens]
