"""Structured data for the corpus: CSV, JSON, XML and logs made of tables that Python itself holds.

It knows no file. The draws have a seed of their own, so that the text depends on Python's version alone.
"""

from __future__ import annotations

import datetime
import html.entities
import http
import json
import mimetypes
import random
import unicodedata
from collections.abc import Iterator

SEED = 0
CSV_ROWS, JSON_ROWS, XML_ROWS, LOG_ROWS = 14, 8, 10, 8
CHARACTERS = range(33, 0x3400)  # up to the ideographs, whose names are all alike


def tables() -> Iterator[str]:
    """Small tables of four kinds in random order, without end; what they list repeats as late as possible."""
    rng = random.Random(SEED)
    kinds = (_characters(rng), _media_types(rng), _entities(rng), _requests(rng))
    while True:
        yield next(rng.choice(kinds))


def _starts(rng: random.Random, stop: int, step: int) -> Iterator[int]:
    """Where the next rows start: every part once, in random order, then again."""
    starts = list(range(0, stop, step))
    while True:
        rng.shuffle(starts)
        yield from starts


def _characters(rng: random.Random) -> Iterator[str]:
    for start in _starts(rng, len(CHARACTERS), CSV_ROWS):
        rows = ["code,char,name,category,bidi,decimal"]
        for code in CHARACTERS[start : start + CSV_ROWS]:
            c = chr(code)
            if name := unicodedata.name(c, ""):
                kind, side = unicodedata.category(c), unicodedata.bidirectional(c)
                rows.append(
                    f"{code},U+{code:04X},{name},{kind},{side},{unicodedata.decimal(c, -1)}"
                )
        yield "\n".join(rows)


def _media_types(rng: random.Random) -> Iterator[str]:
    # a fresh MimeTypes holds Python's own table; the module's includes what the machine's files add
    types = sorted(mimetypes.MimeTypes().types_map[True].items())
    for start in _starts(rng, len(types), JSON_ROWS):
        yield "\n".join(
            json.dumps(
                {
                    "ext": extension,
                    "mime": mime,
                    "id": rng.randrange(10**6),
                    "size": round(rng.random() * 100, 2),
                    "tags": [mime.split("/")[0]],
                }
            )
            for extension, mime in types[start : start + JSON_ROWS]
        )


def _entities(rng: random.Random) -> Iterator[str]:
    entities = sorted(html.entities.html5.items())
    for start in _starts(rng, len(entities), XML_ROWS):
        rows = [
            f'  <row id="{rng.randrange(10**4)}"><name>{name.rstrip(";")}</name><cp>{ord(text[0])}</cp></row>'
            for name, text in entities[start : start + XML_ROWS]
        ]
        yield "\n".join(["<table>", *rows, "</table>"])


def _requests(rng: random.Random) -> Iterator[str]:
    statuses = sorted(http.HTTPStatus)
    while True:
        time = datetime.datetime(2020, 1, 1) + datetime.timedelta(seconds=rng.randrange(10**8))
        rows = []
        for _ in range(LOG_ROWS):
            time += datetime.timedelta(seconds=rng.randrange(60))
            status, level = rng.choice(statuses), rng.choice(("INFO", "WARN", "ERROR"))
            rows.append(
                f"{time.isoformat()} [{level}] pid={rng.randrange(10**4)} {status.value}: {status.phrase}"
            )
        yield "\n".join(rows)
