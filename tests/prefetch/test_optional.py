"""Libraries that are not there, or there by halves: one line that names the package and what to do."""

import sys
import sysconfig
from pathlib import Path

import pytest

from prefetch.errors import ConfigError
from prefetch.optional import broken_install, require

HALVES = {  # what an interrupted pip can leave of a package
    "an attribute": ("import os\nos.nosuch\n", "AttributeError"),
    "a file of it": ("from .gone import x\n", "ModuleNotFoundError"),
    "a name": ("", "AttributeError: .*Reader"),
    "half a line": ("def read(:\n", "SyntaxError"),
    "bytes": ("\0\0", "SyntaxError"),
    "another library": ("import nosuch_at_all\n", "nosuch_at_all"),
    "all but the folder": (None, "its files are missing"),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_package_is_told_from_none(tmp_path, monkeypatch, name):
    text, said = HALVES[name]
    (tmp_path / "halfgguf").mkdir()
    if text is not None:
        (tmp_path / "halfgguf" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    again = f"its installation is broken \\(.*{said}.*pip install --force-reinstall halfgguf"
    with pytest.raises(ConfigError, match=f"reading GGUF needs the package halfgguf, {again}"):
        require("halfgguf", "Reader", asked_by="reading GGUF")
    sys.modules.pop("halfgguf", None)


def test_what_is_not_there_is_to_be_installed():
    with pytest.raises(
        ConfigError, match=r"^x needs the package nosuch_pkg: pip install nosuch_pkg$"
    ):
        require("nosuch_pkg", asked_by="x")


def test_an_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(
        ConfigError, match=r"package dask-jobqueue: pip install 'expert-prefetch\[cluster\]'"
    ):
        require("dask_jobqueue", asked_by="cluster=slurm")


def raised_in(folder: Path, name: str, text: str) -> Exception:
    (folder / f"{name}.py").write_text(text)
    code = compile(text, str(folder / f"{name}.py"), "exec")
    try:
        exec(code, {"__name__": name})
    except Exception as error:
        return error
    raise AssertionError


def test_an_import_that_fails_in_a_library_is_told_from_one_that_fails_in_a_users_own_file(
    tmp_path, monkeypatch
):
    error = raised_in(tmp_path, "their_library", "import os\nos.nosuch\n")
    assert broken_install(error) is None
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    told = str(broken_install(error))
    assert "the package their_library cannot be imported" in told and "AttributeError" in told
    assert broken_install(ValueError("in a function")) is None
