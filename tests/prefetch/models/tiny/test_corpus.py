"""The corpus: there on every install, in a fixed order, and the same wherever the files lie."""

import mimetypes
import sys
from itertools import islice
from pathlib import Path

import pytest

from prefetch.errors import ConfigError
from prefetch.models.tiny import corpus
from prefetch.models.tiny.tables import tables

N_BYTES = 20_000


def test_every_domain_is_there_in_the_order_asked_for():
    names = ["data", "python", "prose", "maths", "cpp"]
    texts = corpus.build(names, N_BYTES)
    assert list(texts) == names
    assert {len(text) for text in texts.values()} == {N_BYTES}
    assert texts == corpus.build(names, N_BYTES)
    assert not any(sys.prefix.encode() in text for text in texts.values())


def test_more_bytes_continue_the_same_text():
    few, many = (corpus.build(["prose"], n)["prose"] for n in (1_000, 3_000))
    assert many.startswith(few)


def test_the_order_of_files_does_not_depend_on_where_they_lie(tmp_path):
    names = ["a.py", "b.py", "deep/c.py", "deep/d.py", "test/left_out.py", "_sysconfigdata_x.py"]
    orders = []
    for prefix in ("here", "somewhere/else"):
        root = tmp_path / prefix
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        orders.append([path.relative_to(root).as_posix() for path in corpus.paths(root, ".py")])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == ["a.py", "b.py", "deep/c.py", "deep/d.py"]


def test_python_is_split_into_code_and_docstrings():
    code, docstrings = corpus.split_python(
        '"""About."""\nimport a  # why\n\ndef f():\n    """What.\n\n    More."""\n    return 1\n'
    )
    assert docstrings == ["About.", "What.\n\n    More."]
    assert code.split() == ["import", "a", "def", "f():", "return", "1"]


def test_tables_do_not_depend_on_what_the_machine_adds(monkeypatch):
    before = list(islice(tables(), 200))
    monkeypatch.setattr(mimetypes, "types_map", {".odd": "application/odd"})
    assert list(islice(tables(), 200)) == before
    assert len(set(before)) == len(before)


def test_own_text_has_a_domain_for_every_file_and_folder():
    here = Path(__file__)
    files = {"letters/a.txt": here, "letters/b.txt": here, "code.py": here}
    texts = corpus.of_files(files, 10**6)
    assert list(texts) == ["letters", "code.py"]
    assert len(texts["letters"]) == 2 * len(texts["code.py"])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sympy, which is not installed"):
        corpus.build(["maths"], N_BYTES)
