"""docs/formats.md names every field that the code writes, and no other: a new field must be documented."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from recorded_traces import full_trace, on_disk
from safetensors import safe_open

from prefetch import config
from prefetch.artifacts import Recipe, Store
from prefetch.predict import export
from prefetch.predict.popularity import Popularity
from prefetch.runs.index import RUNS, write_index
from prefetch.runs.standing import Standing
from prefetch.sim.hardware import hardware, numeric_fields
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.parquet import SMALL, WIDE, TraceReader
from prefetch.trace.predictions import Predictions, PredictionsCard, PredictionsWriter
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import id_dtype, no_expert

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "formats.md").read_text()
CODE = re.compile(r"`([^`]+)`")
Rows = dict[str, list[str]]  # name -> the cells behind it


def tables() -> dict[str, Rows]:
    """Heading -> the fields or columns of the table below it; a row may name several."""
    found = dict[str, Rows]()
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line[:1] == "|"]
        if rows and rows[0][0].strip() in ("field", "column"):
            names = {name: row[1:] for row in rows[2:] for name in CODE.findall(row[0])}
            assert len(names) == sum(len(CODE.findall(row[0])) for row in rows[2:]), heading
            found[heading] = names
    return found


def named(written: dict[str, Any], rows: Iterable[str]) -> set[str]:
    """The fields of a file, opened where the page opens them: `card.trace`, `shards[].rows`."""
    found = set[str]()
    for key, value in written.items():
        inner = {name.removeprefix(f"{key}.") for name in rows if name.startswith(f"{key}.")}
        many = {name.removeprefix(f"{key}[].") for name in rows if name.startswith(f"{key}[].")}
        if inner:
            found |= {f"{key}.{name}" for name in named(value, inner)}
        elif many:
            parts = value.values() if isinstance(value, dict) else value
            assert parts, f"{key}: the sample holds none"
            found |= {f"{key}[].{name}" for part in parts for name in part}
        else:
            found.add(key)
    return found


def trace(folder: Path) -> TraceReader:
    return on_disk(full_trace(n_requests=2, tokens=4), folder)


def trace_json(folder: Path) -> dict[str, Any]:
    return trace(folder / "trace").about


def counts_json(folder: Path) -> dict[str, Any]:
    card = full_trace(n_requests=1, tokens=1).card
    counts_LE = np.ones((card.n_layers, card.n_experts), np.int64)
    ExpertCounts(card, counts_LE, Provenance("synthetic", "test")).save(folder)
    return json.loads((folder / "counts.json").read_text())


def predictions_json(folder: Path) -> dict[str, Any]:
    card = PredictionsCard("key", "none", 16, 4, 2, (1,), "decode", "rank", (0,), ())
    writer, shape = PredictionsWriter(folder, card), (1, 1, 4, 2)
    one = np.zeros(1, np.int32)
    ids = np.full(shape, no_expert(16), id_dtype(16))
    writer.append(Predictions(card, one, one, ids, np.zeros(shape, np.float16)))
    writer.close()
    return json.loads((folder / "predictions.json").read_text())


def shipped_hardware() -> Any:
    given = yaml.safe_load((config.CONFIGS / "hardware" / "rtx4090_pcie4.yaml").read_text())
    return hardware(**{name: value for name, value in given.items() if name != "_target_"})


def hardware_file(_: Path) -> dict[str, Any]:
    """Flat, because the page names numbers as `sources` does."""
    whole, flat = shipped_hardware().to_dict(), dict[str, Any]()
    todo = list(whole.items())
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict) and name != "sources":
            todo += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
    return flat


def exported(folder: Path) -> dict[str, Any]:
    reader = trace(folder / "trace")
    predictor = Popularity(horizons=(1,))
    predictor.chance_LE_ = np.full((reader.card.n_layers, reader.card.n_experts), 0.1, np.float32)
    about = {"predictor": "popularity", "settings": {}, "fold": 0, "split": "requests"}
    path = export.write(predictor, {**about, "card": reader.card.to_json()}, "key", folder / "out")
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def sealed(folder: Path) -> tuple[Store, Path]:
    def build(target: Path, _: Any) -> None:
        (target / "file").write_text("x")

    store = Store(folder / "store")
    return store, store.make(Recipe("trace", 1, {}, build)).folder


def manifest_json(folder: Path) -> dict[str, Any]:
    return json.loads((sealed(folder)[1] / "manifest.json").read_text())


def run_json(folder: Path) -> dict[str, Any]:
    with Standing(folder, "list", [], {}).kept():
        pass
    return json.loads((folder / "run.json").read_text())


WRITTEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "Trace": trace_json,
    "Model card": lambda folder: trace_json(folder)["card"],
    "Provenance": lambda folder: trace_json(folder)["provenance"],
    "Counts": counts_json,
    "Predictions": predictions_json,
    "Hardware": hardware_file,
    "Exported predictor": exported,
    "Artifacts": manifest_json,
    "Runs": run_json,
}


@pytest.mark.parametrize("heading", WRITTEN)
def test_every_field_that_is_written_is_documented_and_the_other_way_round(heading, tmp_path):
    rows = tables()[heading]
    assert named(WRITTEN[heading](tmp_path), rows) == set(rows)


def test_every_table_is_compared():
    assert set(tables()) == {*WRITTEN, "Columns of a trace", "Columns of predictions"}
    assert set(tables()["Model card"]) == {field.name for field in fields(ModelCard)}


def test_columns_are_stored_as_the_page_says(tmp_path):
    rows = tables()["Columns of a trace"]
    assert set(rows) == {*SMALL, *WIDE}
    schema = pq.read_schema(trace(tmp_path / "trace").folder / "tokens-00000.parquet")
    for name in SMALL:
        assert CODE.findall(rows[name][1]) == [str(schema.field(name).type)], name
    for name, (stem, _) in WIDE.items():
        assert CODE.findall(rows[name][0]) == [stem] or stem == name, name
    predictions_json(tmp_path)
    schema = pq.read_schema(tmp_path / "predictions-00000.parquet")
    rows = tables()["Columns of predictions"]
    assert set(rows) == set(schema.names)
    assert {str(schema.field(name).type) for name in ("request", "position")} == {"int32"}


def test_sources_name_what_the_page_names():
    """Every number of a hardware file has a source, by the name that the table gives it."""
    assert set(dict(numeric_fields(shipped_hardware()))) <= set(tables()["Hardware"])


def test_every_schema_of_the_code_stands_on_the_page_and_no_other():
    code = [path.read_text() for path in (ROOT / "prefetch").rglob("*.py")]
    known = {name for text in code for name in re.findall(r'^SCHEMA = "([^"]+)"', text, re.M)}
    assert set(re.findall(r"^\| `(prefetch\.\w+/\d+)` \|", PAGE, re.M)) == known
    assert known >= {"prefetch.trace/1", "prefetch.exported/1"}


def test_sentinels_are_what_the_page_says():
    assert (id_dtype(255), id_dtype(256)) == (np.uint8, np.uint16)
    assert f"({no_expert(255)} or {no_expert(256)})" in PAGE


def test_the_index_of_runs_is_named(tmp_path):
    store, _ = sealed(tmp_path)
    write_index(store, stage="collect", folder=tmp_path, failed=False)
    (entry,) = (store.root / RUNS).glob("*.json")
    line = next(line for line in PAGE.splitlines() if line.startswith(f"`STORE/{RUNS}/"))
    assert set(json.loads(entry.read_text())) <= set(CODE.findall(line))
