"""An older version is brought up step by step; what nobody can read is said; nothing is written over.

Version 1 is the first that was published, so the steps here are those of versions that never were.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from whole_traces import assert_same_bytes, everything, write

from prefetch.errors import FormatError
from prefetch.trace import migrate as module
from prefetch.trace import parquet
from prefetch.trace.migrate import STEPS, migrate, step_of_description, version_of
from prefetch.trace.parquet import SCHEMA, TraceReader
from prefetch.trace.version import split_schema

LENGTHS = [4, 3, 7]


def old(tmp_path: Path) -> Path:
    """A trace of a version 0 that calls layer_numbers `layers` and positions `index`."""
    folder = tmp_path / "old"
    shutil.copytree(write(tmp_path / "new", everything(LENGTHS)).folder, folder)
    about = json.loads((folder / "trace.json").read_text())
    about["schema"] = "prefetch.trace/0"
    about["card"]["layers"] = about["card"].pop("layer_numbers")
    del about["card"]["layer_stacks"]
    (folder / "trace.json").write_text(json.dumps(about))
    table = pq.read_table(folder / "tokens-00000.parquet")
    names = ["index" if name == "position" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), folder / "tokens-00000.parquet")
    return folder


def card_of_version_1(about):
    card = dict(about["card"])
    card["layer_numbers"] = card.pop("layers")
    card["layer_stacks"] = ["decoder"] * len(card["layer_numbers"])
    return {**about, "schema": "prefetch.trace/1", "card": card}


def positions_of_version_2(source: Path, into: Path) -> None:
    """The rows are written anew; the description says the next version."""
    step_of_description(lambda about: {**about, "schema": "prefetch.trace/2"})(source, into)
    for path in into.glob("tokens-*.parquet"):
        table = pq.read_table(path)
        names = ["position" if name == "index" else name for name in table.column_names]
        pq.write_table(table.rename_columns(names), path)


@pytest.fixture
def version_2(monkeypatch):
    monkeypatch.setattr(module, "SCHEMA", "prefetch.trace/2")
    monkeypatch.setattr(parquet, "SCHEMA", "prefetch.trace/2")


STEPS_TO_2 = {0: step_of_description(card_of_version_1), 1: positions_of_version_2}


def test_a_chain_of_steps_brings_a_trace_up(tmp_path, version_2):
    folder = old(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = migrate(folder, tmp_path / "now", steps=STEPS_TO_2)
    reader = TraceReader(tmp_path / "now")
    assert (done.tokens, done.requests) == (14, 3)
    assert reader.about["schema"] == "prefetch.trace/2"
    assert reader.provenance.notes == ("migrated from prefetch.trace/0",)
    assert (reader.load().position_T == everything(LENGTHS).position_T).all()
    assert reader.card.layer_numbers == (1, 2, 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "now", "old"]


def test_one_step_keeps_every_row(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(write(tmp_path / "new", everything(LENGTHS)).folder, folder)
    about = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps({**about, "schema": "prefetch.trace/0"}))
    step = step_of_description(lambda about: {**about, "schema": "prefetch.trace/1"})
    migrate(folder, tmp_path / "now", steps={0: step})
    assert_same_bytes(tmp_path / "new", tmp_path / "now")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("prefetch.trace/1", "is prefetch.trace/1 already: there is nothing to migrate"),
        (
            "prefetch.trace/2",
            "a newer version of this project wrote; this one reads up to prefetch.trace/1",
        ),
        ("prefetch.trace/0", "no step leads from version 0 to 1: that version was never published"),
        ("prefetch.counts/1", "expected a schema like prefetch.trace/1, found 'prefetch.counts/1'"),
        ("prefetch.trace/x", "expected a schema like"),
        (None, "expected a schema like prefetch.trace/1, found None"),
    ],
)
def test_what_cannot_be_migrated_is_said(tmp_path, schema, message):
    folder = write(tmp_path / "t", everything([4])).folder
    about = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps({**about, "schema": schema}))
    with pytest.raises(FormatError, match=message):
        migrate(folder, tmp_path / "now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_a_step_that_fails_or_lies_leaves_nothing(tmp_path):
    folder = old(tmp_path)

    def fails(source: Path, into: Path) -> None:
        raise KeyError("layers")

    with pytest.raises(FormatError, match=r"old: expected a trace of version 0; KeyError"):
        migrate(folder, tmp_path / "now", steps={0: fails})
    with pytest.raises(FormatError, match="with the columns"):  # index is no column of version 1
        migrate(folder, tmp_path / "now", steps={0: STEPS_TO_2[0]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_the_shipped_steps_lead_from_somewhere_to_the_version_that_is_read(tmp_path):
    latest = split_schema(SCHEMA)[1]
    assert latest is not None and set(STEPS) == set(range(min(STEPS, default=latest), latest))
    assert version_of(write(tmp_path / "t", everything([4])).folder) == latest
