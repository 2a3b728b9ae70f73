"""Real text that every install has, in five domains, without a download: what the embedded model reads.

It knows no tokens and no model. The same versions give the same bytes, wherever they are installed.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import importlib.util
import itertools
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prefetch.errors import ConfigError
from prefetch.models.tiny.tables import tables

# parts of the standard library that distributions package apart, generate at build time, or fill with odd text
SKIPPED = (
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"),
    *("pydoc_data", "turtledemo", "ensurepip", "tkinter", "distutils", "__pycache__"),
    *("_sysconfigdata*", "config-*"),
)
FILE_CHARACTERS = 20_000  # of one file at most, so that no large file is a domain of its own
FORMULA = re.compile(r"\\|\^|[=+*]|>>>")
DOCSTRING_CHARACTERS = 200  # shorter ones are not prose
FORMULA_LINES = 5

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def build(domains: Iterable[str], n_bytes: int) -> dict[str, bytes]:
    """`n_bytes` of every domain, in the order asked for."""
    return {name: _join(DOMAINS[name](), n_bytes) for name in domains}


def of_files(files: Mapping[str, Path], n_bytes: int) -> dict[str, bytes]:
    """The user's own text: the folder that a name starts with, or the file's own name, is its domain."""
    texts: dict[str, bytes] = {}
    for name, path in files.items():
        domain = path.name if Path(name).is_absolute() else Path(name).parts[0]
        texts[domain] = (texts.get(domain, b"") + path.read_bytes())[:n_bytes]
    return texts


def md5_of(text: bytes) -> str:
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def _join(pieces: Iterable[str], n_bytes: int) -> bytes:
    """Pieces of some length, none twice, until there are enough bytes."""
    seen, taken, size = set(), [], 0
    for piece in pieces:
        text = piece.strip().encode("utf-8", "ignore")
        if len(text) < 40 or text in seen:
            continue
        seen.add(text)
        taken.append(text)
        size += len(text) + 1
        if size > n_bytes:
            break
    return b"\n".join(taken)[:n_bytes]


def paths(root: Path, suffix: str, skipped: Iterable[str] = SKIPPED) -> list[Path]:
    """Files in an order that looks random, so that neighbours are unrelated, and that no prefix changes."""
    is_skipped = re.compile("|".join(map(fnmatch.translate, skipped)) or r"(?!)").match
    found: dict[str, Path] = {}
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not is_skipped(name)]
        for name in files:
            if name.endswith(suffix) and not is_skipped(name):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    return [found[name] for name in sorted(found, key=lambda name: md5_of(name.encode()))]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def split_python(source: str) -> tuple[str, list[str]]:
    """The code without docstrings and comments, and the docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the escapes of somebody else's strings
        tree = ast.parse(source)
    lines, docstrings = source.split("\n"), []
    for node in _definitions(tree):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            docstrings.append(textwrap.dedent(text).strip())
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    code = re.sub(r"(^|[ \t]+)#.*$", "", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"\n\s*\n+", "\n\n", code), docstrings


def _definitions(node: Definition) -> Iterator[Definition]:
    """What may have a docstring; those inside a condition are left alone, because finding them takes a full walk."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child)


def _split_files(files: Iterable[Path]) -> Iterator[tuple[str, list[str]]]:
    for path in files:
        try:
            yield split_python(_read(path))
        except (SyntaxError, ValueError):
            continue  # a template, or a file for another Python version, is no example of code


def _standard_library() -> list[Path]:
    return paths(Path(sysconfig.get_path("stdlib")), ".py")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds, does not import
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the corpus takes text from {name}, which is not installed; pip install {name}, or leave its "
            "domain out of source.domains"
        )
    return Path(spec.origin).parent


def python() -> Iterator[str]:
    """Code of the standard library."""
    return (code[:FILE_CHARACTERS] for code, _ in _split_files(_standard_library()))


def prose() -> Iterator[str]:
    """The language reference, then long docstrings of the standard library."""
    spec = importlib.util.find_spec("pydoc_data")
    if spec is not None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics, key=lambda n: md5_of(n.encode())))
    for _, docstrings in _split_files(_standard_library()):
        yield from (text for text in docstrings if len(text) > DOCSTRING_CHARACTERS)


def maths() -> Iterator[str]:
    """Formulas and worked examples in sympy's docstrings."""
    files = paths(_package("sympy"), ".py", ("__pycache__", "tests", "benchmarks"))
    for _, docstrings in _split_files(files):
        for text in docstrings:
            lines = [line for line in text.splitlines() if FORMULA.search(line)]
            if len(lines) >= FORMULA_LINES:
                yield "\n".join(lines)


def cpp() -> Iterator[str]:
    """C++ headers that torch ships, without comments."""
    include = _package("torch") / "include"
    headers = (paths(include / "ATen", ".h", ("ops",)), paths(include / "c10", ".h", ()))
    for path in itertools.chain(*headers):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", _read(path), flags=re.DOTALL)
        yield re.sub(r"\n\s*\n+", "\n", text)[:FILE_CHARACTERS]


DOMAINS: Mapping[str, Callable[[], Iterator[str]]] = {
    "python": python,
    "prose": prose,
    "maths": maths,
    "cpp": cpp,
    "data": tables,
}
