"""Few places may do what a hostile file would like to have done, and each is named here: read from the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for top in ("prefetch", "analysis") for path in (ROOT / top).rglob("*.py"))
DOORS = {  # a call, as it is written -> the files that may make it
    "eval": (),
    "exec": (
        "prefetch/sim/engines/compiled.py",
    ),  # generated here, compiled once: nothing of a file goes in
    "os.system": (),
    "os.popen": (),
    "pickle.load": (
        "prefetch/cluster/worker.py",
    ),  # what the map itself has written: see SECURITY.md
    "pickle.loads": (),
    "pickle.Unpickler": ("prefetch/cluster/worker.py",),
    "pickle._Unpickler": ("prefetch/sources/unpickle.py",),
    "cloudpickle.load": (),
    "joblib.load": (),
    "pd.read_pickle": (),
    "marshal.loads": (),
    "yaml.load": ("prefetch/plain_yaml.py",),
    "yaml.safe_load": (),
    "yaml.unsafe_load": (),
    "yaml.full_load": (),
}
MUST_SAY = {  # a call -> the keyword and the value without which it may unpickle, or run a shell
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "trainer.fit": ("weights_only", True),
}
SHORT = {"numpy": "np", "pandas": "pd"}  # what these are called


def named() -> Iterator[tuple[str, str, ast.AST]]:
    """(file, the dotted name as it is written, its node) of every call and every base class."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), node
            elif isinstance(node, ast.ClassDef):
                for base in node.bases:
                    yield str(path.relative_to(ROOT)), ast.unparse(base), node


CALLS = list(named())


@pytest.mark.parametrize("name", DOORS)
def test_only_these_files_do_it(name: str) -> None:
    assert {file for file, called, _ in CALLS if called == name} == set(DOORS[name])


@pytest.mark.parametrize("name", MUST_SAY)
def test_what_can_unpickle_is_told_not_to(name: str) -> None:
    keyword, value = MUST_SAY[name]
    calls = [(f, n) for f, called, n in CALLS if called == name and isinstance(n, ast.Call)]
    assert calls, "nobody makes this call any more, under this name"
    for file, call in calls:
        said = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg == keyword}
        assert said == {keyword: value}, f"{file}, line {call.lineno}"


def test_doors_go_by_the_names_that_are_looked_for() -> None:
    """`from pickle import load` would be another word for one."""
    doors = DOORS.keys() | MUST_SAY.keys()
    modules = {name.rpartition(".")[0] for name in doors} | SHORT.keys()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                module = SHORT.get(str(node.module), node.module)
                assert not doors & {f"{module}.{one.name}" for one in node.names}, place
            elif isinstance(node, ast.Import):
                for one in [one for one in node.names if one.name in modules]:
                    assert one.asname in (None, SHORT.get(one.name)), place


def test_nothing_runs_in_a_shell() -> None:
    for file, _, node in CALLS:
        for one in node.keywords:
            assert one.arg != "shell", f"{file}, line {node.lineno}"
