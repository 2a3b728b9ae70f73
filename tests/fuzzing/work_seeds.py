"""What else reads a trace, which stages run on a folder that somebody sent: findings, parts, sums, other formats; and
the embedded model that a store holds.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

from fuzzing.readers import Files, Reader
from fuzzing.trace_seeds import made, trace_seeds
from prefetch import manifest
from prefetch.errors import PrefetchError
from prefetch.models.tiny import corpus, train
from prefetch.models.tiny.net import Shape
from prefetch.trace.export import OF_TRACES, SUFFIX, export
from prefetch.trace.findings import findings
from prefetch.trace.merge import merge
from prefetch.trace.selection import Selection
from prefetch.trace.subset import subset

SHAPE = Shape(layers=2, experts=4, top_k=2, d=32, ff=8, context=16, vocabulary=270)
MOST = 1000  # findings that are read: one for every row of a file may be true


@cache
def sound() -> tuple[Files, ...]:
    return tuple(trace_seeds())


def sealed_seeds() -> list[Files]:
    def write(folder: Path, files: Files) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        manifest.seal(folder, {"kind": "trace", "version": 1, "config": {}}, 1.0)

    return [
        *sound(),
        *(made(lambda folder, files=files: write(folder, files)) for files in sound()),
    ]


def find(folder: Path, _: Path) -> None:
    for found in itertools.islice(findings(folder), MOST):
        assert len(found.line().splitlines()) == 1, found


def cut(folder: Path, out: Path) -> None:
    subset(folder, out / "part", Selection(requests="1-3", phase="decode", layers="5-7"))


def add(folder: Path, out: Path) -> None:
    """To a sound one with the same columns."""
    other = sound()["router_weights.safetensors" in {path.name for path in folder.iterdir()}]
    (out / "other").mkdir()
    for name, data in other.items():
        (out / "other" / name).write_bytes(data)
    merge([out / "other", folder], out / "both", domains=["a", None])


def write_out(folder: Path, out: Path) -> None:
    """In every format, whatever one of them cannot hold."""
    errors = []
    for chosen in OF_TRACES:
        try:
            export(folder, out / f"x{SUFFIX.get(chosen, '')}", chosen)
        except PrefetchError as error:
            errors.append(error)
    if errors:
        raise errors[-1]


def model_seeds() -> list[Files]:
    def write(folder: Path) -> None:
        train.make(folder, corpus.build(["data"], 4_000), SHAPE, steps=0, seed=0)

    return [made(write)]


READERS = [
    Reader("findings", sealed_seeds, find),
    Reader("subset", lambda: list(sound()), cut),
    Reader("merge", lambda: list(sound()), add),
    Reader("export", lambda: list(sound()), write_out),
    Reader("embedded model", model_seeds, lambda folder, _: train.load(folder, SHAPE)),
]
