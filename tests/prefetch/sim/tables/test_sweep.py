"""Rows are the same however many cells run at once, and whatever was finished before; nothing damaged is believed."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest

from prefetch.artifacts import Store
from prefetch.errors import ConfigError
from prefetch.sim import code
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.random import Random
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.sweep import Job, Kept, run_all
from prefetch.stock import drop_unfinished
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import guesses_of, machine_of
from tests.prefetch.sim.test_evaluate import evaluated


def jobs_of(n, ran, *, fails_at=None, error=RuntimeError):
    """Cells that note that they ran; one of them may fail."""

    def job(i):
        def run():
            if i == fails_at:
                raise error(f"cell {i}")
            ran.append(i)
            return {"i": i, "third": np.float64(i) / 3, "none": np.nan, "is_even": i % 2 == 0}

        return Job(run, ("test", i, np.arange(i)))

    return [job(i) for i in range(n)]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_rows_stand_in_their_order_and_come_back_as_they_were(tmp_path, workers):
    ran = []
    rows = run_all(jobs_of(20, ran), Kept(tmp_path), workers=workers)
    assert [row["i"] for row in rows] == sorted(ran) == list(range(20))
    again = run_all(jobs_of(20, ran), Kept(tmp_path), workers=workers)
    assert len(ran) == 20 and repr(again) == repr(rows)
    assert {type(value) for row in again for value in row.values()} == {int, float, bool}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, error):
    ran = []
    with pytest.raises(error):
        run_all(jobs_of(9, ran, fails_at=5, error=error), Kept(tmp_path), workers=1)
    assert set(ran) >= {0, 1, 2, 3, 4} and 5 not in ran  # whoever has begun is finished
    kept = Kept(tmp_path)
    assert len(list(kept.folder.glob("*.json"))) == len(list(kept.folder.iterdir())) == len(ran)
    rows = run_all(jobs_of(9, ran), kept)
    assert sorted(ran) == list(range(9)) and [row["i"] for row in rows] == list(range(9))


@pytest.mark.parametrize("harm", ["cut", "changed", "foreign", "empty", "folder"])
def test_what_is_damaged_or_of_another_cell_is_told_and_run_again(tmp_path, harm, caplog):
    ran, kept = [], Kept(tmp_path)
    jobs = jobs_of(3, ran)
    rows = run_all(jobs, kept)
    path, other = (kept.folder / f"{kept.key(job)}.json" for job in jobs[:2])
    text = path.read_text()
    if harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        told = json.loads(text) | {"row": {"i": 5}}
        harmed = {"cut": text[:40], "empty": "", "changed": json.dumps(told)}
        path.write_text(harmed.get(harm, other.read_text()))
    with caplog.at_level(logging.WARNING):
        again = run_all(jobs, kept)
    assert repr(again) == repr(rows) and len(ran) == 4
    assert f"{path.name}: cannot be used" in caplog.text and "run again" in caplog.text


def test_a_store_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    (tmp_path / "cells").write_text("in the way")
    rows = run_all(jobs_of(4, []), Kept(tmp_path), workers=1)
    assert len(rows) == 4 and caplog.text.count("rows cannot be kept") == 1


def test_kept_rows_go_with_what_is_unused(tmp_path):
    kept = Kept(tmp_path)
    run_all(jobs_of(2, []), kept)
    assert drop_unfinished(Store(tmp_path)) == [kept.folder] and not kept.folder.exists()


def cell_of(seed=0, policy=None, **changes):
    work = drawn(seed, n_tokens=20)
    machine = machine_of(work, seed)
    guesses = guesses_of(work, seed, 1, 2, 0.5)
    return work, Cell({"way": "chosen"}, policy or Lru(), None, machine, guesses, **changes)


def test_a_key_says_everything_that_a_row_depends_on(tmp_path):
    """Equal content has equal keys, whoever made it; any change has another."""
    work, cell = cell_of()
    kept = Kept(tmp_path)

    def key(*depends):
        return kept.key(Job(dict, depends))

    assert key(work, cell) == Kept(tmp_path).key(Job(dict, cell_of()))
    slower = cell.machine._replace(before_S=cell.machine.before_S + 1)
    guessed = cell.guesses._replace(ids_VW=np.flip(cell.guesses.ids_VW, axis=1))
    changed = [
        key(cell_of(1)[0], cell),
        key(work, dataclasses.replace(cell, machine=slower)),
        key(work, dataclasses.replace(cell, guesses=guessed)),
        key(work, dataclasses.replace(cell, guesses=None)),
        key(work, dataclasses.replace(cell, semantics=2)),
        key(work, dataclasses.replace(cell, warm=np.arange(2))),
        key(work, dataclasses.replace(cell, policy=Random(seed=1))),
        key(work, dataclasses.replace(cell, policy=Random(seed=2))),
        key(work, dataclasses.replace(cell, names={"way": "optimum"})),
        key(work, cell, 1),
        key(work, cell, 1.0),
        key(work, cell, "1"),
    ]
    assert len({key(work, cell), *changed}) == 1 + len(changed)


def test_another_version_of_the_code_has_another_place(tmp_path, monkeypatch):
    assert code._simulator() == code.CODE_KEY
    monkeypatch.setattr(code, "library_version", lambda name: "another")
    assert code._simulator() != code.CODE_KEY


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot be told"):
        Kept(tmp_path).key(Job(dict, object()))


def test_policies_that_differ_in_a_function_have_rows_of_their_own(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Worth:
        of: object

    def key(of: object) -> str:
        return Kept(tmp_path).key(Job(dict, Worth(of)))

    functions = [jobs_of, cell_of, partial(jobs_of, 1), partial(jobs_of, 2), partial(jobs_of, n=1)]
    assert len({*map(key, functions)}) == len(functions) and key(jobs_of) == key(jobs_of)
    with pytest.raises(ConfigError, match=r"cannot be told from another.*function of a module"):
        key(lambda: 1)


def test_no_number_depends_on_how_many_cells_run_at_once(tmp_path):
    words = (
        "predictor=popularity",
        "evaluate.policies=[lru,sieve]",
        "evaluate.capacities=[0.25,0.5]",
    )
    one, first, _ = evaluated(tmp_path, *words, "evaluate.workers=1")
    shutil.rmtree(tmp_path / "store" / "cells")
    many, again, _ = evaluated(tmp_path, *words, "evaluate.workers=5")
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert one == many


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path, monkeypatch):
    """Every finished cell is found again; the table is that of a run that nobody interrupted."""
    _, whole, _ = evaluated(tmp_path / "whole", "predictor=none")
    ran, row = list[str](), Bench.row

    def stopped(bench, cell):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(str(cell.names))
        return row(bench, cell)

    monkeypatch.setattr(Bench, "row", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, "predictor=none", "evaluate.workers=1")
    assert not list((tmp_path / "run0").glob("results*"))
    before = [*ran]
    monkeypatch.setattr(
        Bench, "row", lambda bench, cell: ran.append(str(cell.names)) or row(bench, cell)
    )
    _, resumed, _ = evaluated(tmp_path, "predictor=none")
    assert len(before) == 4 and len(ran) == len(whole) == len(set(ran))
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    evaluated(tmp_path, "predictor=none")
    assert len(ran) == len(whole)  # a repeated run runs no cell
    evaluated(tmp_path, "predictor=none", "simulator.staging=3")
    assert len(ran) > len(whole)
