"""Which code a number is made by: a digest of the simulator's own files, and of a user's policy with all it imports.

Both are taken once, when the code is imported: what is edited later does not run in this process. It knows no cell.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from prefetch.artifacts import library_version
from prefetch.manifest import sha256_of

VERSION = 2  # raise it when rows mean something else and no file says so
HERE = Path(__file__).parent
# of this folder, what shows rows and makes none; a file that is not named here is taken to make them
SHOWING = ("evaluate", "gallery", "notebook", "panels", "pictures", "summary", "sweep", "timeline")
BESIDE = ("scoring.py", "agreement.py")  # intervals
LIBRARIES = ("numpy", "numba", "python")
PACKAGES = ("site-packages", "dist-packages")


def _simulator() -> str:
    paths = [path for path in sorted(HERE.rglob("*.py")) if path.stem not in SHOWING]
    paths += [HERE.parent / name for name in BESIDE if (HERE.parent / name).is_file()]
    told = {str(path.relative_to(HERE.parent)): sha256_of(path) for path in paths}
    told |= {name: library_version(name) for name in LIBRARIES}
    return hashlib.sha256(json.dumps([VERSION, told]).encode()).hexdigest()[:16]


CODE_KEY = _simulator()


@cache
def own_code(module: str) -> str:
    """Of a module of one's own: its file, and those of all local modules that it imports. Empty for this package."""
    told = {name: sha256_of(path) for name, path in sorted(_local(module).items())}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] if told else ""


def _local(module: str) -> dict[str, Path]:
    """Names and files. An import that only running would show (`importlib`) is not seen."""
    found, waiting = dict[str, Path](), [module]
    while waiting:
        name = waiting.pop()
        path = None if name in found else _file_of(name)
        if path is not None and _is_local(name, path):
            found[name] = path
            waiting += _imported(name, path)
    return found


def _file_of(name: str) -> Path | None:
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        return Path(file) if file else None
    spec = _spec_of(name)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _spec_of(name: str) -> ModuleSpec | None:
    """Without importing anything: what a function imports late may be large."""
    above, _, _ = name.rpartition(".")
    if not above:
        return PathFinder.find_spec(name)
    package = _spec_of(above)
    places = package.submodule_search_locations if package is not None else None
    return PathFinder.find_spec(name, places) if places else None


def _is_local(name: str, path: Path) -> bool:
    if name.partition(".")[0] == "prefetch" or path.suffix != ".py" or not path.is_file():
        return False
    library = Path(sysconfig.get_path("stdlib")).resolve()
    is_installed = any(part in PACKAGES for part in path.parts)
    return not is_installed and not path.resolve().is_relative_to(library)


def _imported(name: str, path: Path) -> Iterator[str]:
    """Every name that an import may mean, in functions too."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _and_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = [*above, node.module] if node.level else [node.module]
            whole = ".".join(part for part in parts if part)
            yield from _and_parents(whole)
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def _and_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
