"""The digest of a policy of one's own knows every local file that it is made of, as it was imported."""

from __future__ import annotations

import importlib
import sys

import pytest

from prefetch.sim import code

FILES = {
    "own_policy.py": "import numpy\nfrom own_helper import HALF\nimport own_pack.deep\n",
    "own_helper.py": "HALF = 2\ndef late():\n    import own_late\n",
    "own_late.py": "LATE = 1\n",
    "own_pack/__init__.py": "",
    "own_pack/deep.py": "from . import beside\nfrom .side import name\n",
    "own_pack/beside.py": "HERE = 1\n",
    "own_pack/side.py": "name = 1\n",
    "own_stranger.py": "NOT = 1\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    importlib.import_module("own_policy")
    code.own_code.cache_clear()
    yield tmp_path
    code.own_code.cache_clear()
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", [name for name in FILES if name != "own_pack/__init__.py"])
def test_whoever_is_imported_counts_and_nobody_else(folder, name):
    before = code.own_code("own_policy")
    (folder / name).write_text(FILES[name] + "MORE = 1\n")
    assert code.own_code("own_policy") == before  # what was imported still runs
    code.own_code.cache_clear()
    is_foreign = name == "own_stranger.py"
    assert (code.own_code("own_policy") == before) == is_foreign


def test_libraries_and_this_package_have_keys_of_their_own():
    assert code.own_code("numpy") == code.own_code("json") == code.own_code("builtins") == ""
    assert code.own_code("prefetch.sim.policies.lru") == ""


def test_an_edit_after_the_import_changes_nothing(monkeypatch):
    """The key is of what runs: taken once, with the engines' sources."""
    monkeypatch.setattr(code, "HERE", code.HERE / "policies")
    assert code._simulator() != code.CODE_KEY
    from prefetch.sim.engines import compiled
    from prefetch.sim.tables import sweep

    assert sweep.CODE_KEY == code.CODE_KEY
    assert compiled.SOURCES["timed.py"] == (compiled.HERE / "timed.py").read_text()
