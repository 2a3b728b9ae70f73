"""Files first, tracker second; a tracker that fails takes nothing with it; nothing secret is written."""

import json
import os

import pandas as pd
import pytest

from prefetch.artifacts import Recipe, Store
from prefetch.errors import ConfigError
from prefetch.runs.naming import About
from prefetch.runs.outputs import PATIENCE, Outputs, write_json
from prefetch.runs.redaction import HIDDEN, Redactor
from prefetch.tracking import NoTracker


class Recorder(NoTracker):
    """Remembers what it is told, after looking that the files are there."""

    def __init__(self, folder):
        self.folder, self.seen, self.told = folder, [], {}

    def log(self, metrics):
        assert json.loads((self.folder / "metrics.json").read_text()) == metrics
        self.seen.append("metrics")

    def table(self, name, frame):
        assert (self.folder / f"{name}.csv").exists() and (self.folder / f"{name}.parquet").exists()
        self.seen.append(name)
        self.told[name] = frame

    def lineage(self, used):
        assert list(json.loads((self.folder / "lineage.json").read_text())) == [
            f"{u.kind}/{u.key}" for u in used
        ]
        self.seen.append("lineage")
        self.told["lineage"] = used

    def finish(self, error=None, exit_code=1):
        self.told["end"] = (error, exit_code)


def test_everything_is_on_disk_before_the_tracker_hears_of_it(tmp_path):
    tracker = Recorder(tmp_path)
    outputs = Outputs(tmp_path, tracker)
    outputs.metrics({"a": 1, "b": 0.5})
    outputs.table("t", pd.DataFrame({"x": [1, 2]}))
    outputs.lineage({"trace/abc": {}})
    assert tracker.seen == ["metrics", "t", "lineage"]
    assert pd.read_parquet(tmp_path / "t.parquet")["x"].tolist() == [1, 2]


@pytest.mark.parametrize("odd", ["x", None, float("nan"), float("inf"), True, [1]])
def test_metrics_are_finite_numbers(tmp_path, odd):
    with pytest.raises(AssertionError, match="metrics are finite numbers"):
        Outputs(tmp_path, NoTracker()).metrics({"a": odd})
    assert not (tmp_path / "metrics.json").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def built(folder, upstream):
    (folder / "a.txt").write_text("a")


def test_a_run_made_what_was_sealed_since_it_began_and_found_the_rest(tmp_path):
    store, tracker = Store(tmp_path / "store"), Recorder(tmp_path / "run")
    old = store.make(Recipe("trace", 1, {}, built))
    new = store.make(
        Recipe("predictor", 1, {}, built, upstream={"trace": Recipe("trace", 1, {}, built)})
    )
    os.utime(old.folder / "manifest.json", (100, 100))
    Outputs(tmp_path / "run", tracker, store=store).lineage(
        store.used | {"trace/mine": {"outside": True}}, 200.0
    )
    told = {one.key: one for one in tracker.told["lineage"]}
    assert [told[key].is_made for key in (old.key, new.key, "mine")] == [False, True, False]
    assert told[new.key].folder == new.folder.resolve() and told["mine"].folder is None
    assert (
        told[new.key].upstream == {"trace": old.key}
        and told[new.key].name == f"predictor-{new.key}"
    )


def test_what_a_run_stood_on_is_written_as_it_goes(tmp_path):
    store = Store(tmp_path / "store")
    outputs = Outputs(tmp_path / "run", NoTracker(), store=store)
    store.make(Recipe("trace", 1, {}, built))
    outputs.table("t", pd.DataFrame({"x": [1]}))
    assert list(json.loads((tmp_path / "run" / "lineage.json").read_text())) == list(store.used)


class Dying(NoTracker):
    def __init__(self):
        self.asked = []

    def log(self, *details):
        self.asked.append(details)
        raise ConnectionResetError("the tracker's service died")

    table = figure = lineage = finish = curve = log


def test_a_tracker_that_dies_takes_nothing_with_it(tmp_path, caplog):
    outputs = Outputs(tmp_path, Dying())
    outputs.metrics({"a": 1})
    outputs.table("t", pd.DataFrame({"x": [1]}))
    outputs.lineage({})
    outputs.finish(None)
    assert len(caplog.records) == 1 and "the tracker failed (log: the tracker's" in caplog.text
    assert {"metrics.json", "t.csv", "lineage.json"} <= {path.name for path in tmp_path.iterdir()}


def test_one_failure_costs_one_thing_and_many_end_it_but_for_its_end(tmp_path):
    class Picky(Recorder):
        def table(self, name, frame):
            self.seen.append(name)
            raise TypeError("a column of two types")

    tracker = Picky(tmp_path)
    outputs = Outputs(tmp_path, tracker)
    outputs.table("odd", pd.DataFrame({"x": [1]}))
    outputs.metrics({"a": 1})
    assert tracker.seen == ["odd", "metrics"]
    for _ in range(PATIENCE):
        outputs.table("odd", pd.DataFrame({"x": [1]}))
    assert tracker.seen == ["odd", "metrics", *["odd"] * (PATIENCE - 1)]
    outputs.finish("ValueError: x", 1)
    assert tracker.told["end"] == ("ValueError: x", 1)


def about(folder):
    return About("collect", folder, ["stage=collect"], {"source": "synthetic"}, {})


def test_a_tracker_that_cannot_start_is_a_warning_and_a_wrong_setting_an_error(tmp_path, caplog):
    class Broken(Dying):
        def start(self, about):
            raise OSError("no space for the client's folder")

    outputs = Outputs(tmp_path, broken := Broken())
    outputs.start(about(tmp_path))
    outputs.metrics({"a": 1})
    assert "no space" in caplog.text and broken.asked == []

    class Wrong(NoTracker):
        def start(self, about):
            raise ConfigError("mode: wrong")

    with pytest.raises(ConfigError, match="mode: wrong"):
        Outputs(tmp_path, Wrong()).start(about(tmp_path))


def test_no_secret_is_written_or_told(tmp_path):
    hidden = Redactor({"hub_token": "xyzzy"}, environment={})
    tracker = Recorder(tmp_path)
    outputs = Outputs(tmp_path, tracker, hidden=hidden)
    outputs.start(about(tmp_path))
    outputs.table("t", pd.DataFrame({"why": ["xyzzy was refused"]}))
    outputs.data("d", pd.DataFrame({"why": ["xyzzy"]}))
    outputs.lineage({"trace/abc": {"config": {"path": "xyzzy"}}})
    (tmp_path / "summary.md").write_text("from xyzzy")  # of a stage, by its own hand
    outputs.finish("Refused: xyzzy", 1)
    assert tracker.told["t"]["why"].tolist() == [f"{HIDDEN} was refused"]
    assert tracker.told["end"] == (f"Refused: {HIDDEN}", 1)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"xyzzy" not in path.read_bytes(), path
    assert pd.read_parquet(tmp_path / "d.parquet")["why"].tolist() == [HIDDEN]


def test_a_run_ends_for_its_tracker_even_where_nothing_can_be_written(tmp_path):
    store, tracker = Store(tmp_path / "store"), Recorder(tmp_path)
    outputs = Outputs(tmp_path / "run", tracker, store=store)
    (tmp_path / "run").rmdir()  # as a disk that is gone
    outputs.finish("OSError: no space", 1)  # the error that ended it is the one to be told
    assert tracker.told["end"] == ("OSError: no space", 1)
    with pytest.raises(OSError, match=r"lineage\.json"):
        outputs.finish(None)
