"""Cells that cannot run are rows that say why; whoever guesses is paid for and named; memory is the same for all."""

from __future__ import annotations

import pytest

from prefetch.errors import ConfigError, MissingData
from prefetch.sim.policies.predicted_use import PredictedUse
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import CANNOT_RUN, Cell
from prefetch.sim.tables.grid import cells
from tests.prefetch.sim.test_evaluate import bench_of, evaluated

ALONE = "predictor=none"


def by_way(bench: Bench) -> dict[str, Cell]:
    found = [cell for cell in cells(bench) if isinstance(cell, Cell)]
    return {str(cell.names["way"]): cell for cell in reversed(found)}


def test_a_cell_that_cannot_run_is_a_marked_row_and_the_others_go_on(tmp_path):
    """`mrs` lacks scores, 9 of 8 experts do not exist, and 4 pinned ones have no room in 2 places."""
    words = ("evaluate.policies=[lru,mrs]", "evaluate.capacities=[0.5,9,2]", "simulator.pinned=4")
    _, table, summary = evaluated(tmp_path, ALONE, *words)
    is_refused = table["mark"].str.startswith(CANNOT_RUN)
    refused = table[is_refused & (table.way == "chosen")].set_index(["policy", "capacity"])
    assert "Mrs needs the router's scores" in refused["mark"]["mrs", "0.5"]
    assert "has 8 experts in a layer" in refused["mark"]["lru", "9"]
    assert "16 experts are pinned, and 8 of them" in refused["mark"]["lru", "2"]
    assert refused.tpot_ms.isna().all() and refused.hit_rate.isna().all()
    _, alone, _ = evaluated(tmp_path, ALONE, "simulator.pinned=4")
    one, same = (t[(t.way == "chosen") & (t.policy == "lru")].iloc[0] for t in (table, alone))
    assert one.tpot_ms == same.tpot_ms and one["mark"] == ""
    assert set(table.way[is_refused]) >= {"chosen", "lru", "static split by layer"}
    assert "none (cannot run) | 9 | - | - | - |" in summary and "cannot run: Mrs needs" in summary


def test_figures_are_drawn_of_what_ran(tmp_path):
    words = ("evaluate.policies=[lru,mrs]", "evaluate.capacities=[0.5,9]", "evaluate.figures=true")
    evaluated(tmp_path, ALONE, *words)
    assert (tmp_path / "run0" / "tpot_by_capacity.png").exists()


def test_guesses_that_cannot_be_had_at_all_are_one_error_and_no_line_per_size(
    tmp_path, monkeypatch, caplog
):
    def nobody(*_):
        raise ConfigError("guesses about something else")

    monkeypatch.setattr(Bench, "_read_guesses", nobody)
    with caplog.at_level("INFO"), pytest.raises(ConfigError, match="about something else"):
        evaluated(tmp_path, "predictor=popularity")
    assert "no cell of" not in caplog.text


def test_guesses_that_cannot_be_had_for_one_horizon(tmp_path, monkeypatch):
    read, asked = Bench._read_guesses, list[str]()

    def of_one_horizon(bench, name, horizon):
        asked.append(f"{name} {horizon}")
        if horizon == 2:
            raise ConfigError("has guessed [1] layers ahead")
        return read(bench, name, horizon)

    monkeypatch.setattr(Bench, "_read_guesses", of_one_horizon)
    words = ("predictor=popularity", "evaluate.horizons=[1,2]", "simulator.horizon=1")
    _, table, _ = evaluated(tmp_path, *words, "evaluate.capacities=[0.5,0.25]")
    chosen = table[table.way == "chosen"]
    assert (chosen.tpot_ms.isna() == (chosen.horizon == 2)).all() and len(chosen) == 4
    assert chosen["mark"][chosen.horizon == 2].str.contains(r"has guessed \[1\]").all()
    assert asked.count("popularity 2") == 1  # found once, for all its cells


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("policy=mrs", "evaluate.policies=[lru,mrs]"), MissingData, "Mrs needs the router's"),
        (("simulator.cache=9", "evaluate.capacities=[0.5,9]"), ConfigError, "has 8 experts"),
        (("simulator.pinned=5",), ConfigError, "20 experts are pinned"),
    ],
)
def test_the_cell_chosen_at_the_root_must_run(tmp_path, words, kind, said):
    with pytest.raises(kind, match=said):
        evaluated(tmp_path, ALONE, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate.policies=[lru,mru]",),
        ("evaluate.predictors=[none,crystal_ball]",),
        ("simulator.admit=later",),
        ("hardware.link.latency_ns=-1",),
    ],
)
def test_what_concerns_every_cell_is_said_before_anything_is_made(tmp_path, words):
    with pytest.raises(ConfigError):
        evaluated(tmp_path, ALONE, *words)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_whoever_is_evicted_by_guesses_pays_for_them_and_names_them(tmp_path):
    words = "predictor=markov", "policy=predicted_use"
    bench = bench_of(tmp_path, *words)
    foretold, reader = bench.guesses("markov", 2)
    object.__setattr__(reader.card, "event_us", 700.0)
    found = by_way(bench)
    chosen, alone, lru = (found[way] for way in ("chosen", "no prefetch", "lru"))
    assert isinstance(alone.policy, PredictedUse) and len(foretold.ids_VW)
    assert alone.budget.predictor_bytes == chosen.budget.predictor_bytes > 0
    assert alone.machine.predict_ns == chosen.machine.predict_ns == 700_000
    assert (alone.names["predictor"], alone.names["evicts_by"]) == ("none", "markov, 2 ahead")
    assert (lru.names["evicts_by"], lru.machine.predict_ns) == ("", 0)
    paid, free = (
        cell.run(bench.work) for cell in (alone, by_way(bench_of(tmp_path, *words))["no prefetch"])
    )
    assert paid.counts["prefetch_loads"] == paid.counts["prefetch_dropped"] == 0
    assert paid.outcome_A.tolist() == free.outcome_A.tolist()
    assert paid.counts["now_ns"] > free.counts["now_ns"]


def test_the_summary_names_who_evicts(tmp_path):
    words = ("evaluate.policies=[predicted_use]", "predictor=markov")
    _, table, summary = evaluated(tmp_path, *words)
    assert "none (evicts by markov)" in summary
    assert set(table.evicts_by) == {"", "markov, 2 ahead", "oracle, 2 ahead"}


def test_what_people_use_today_may_use_the_memory_that_guesses_take(tmp_path):
    """Two places for guesses are two experts more; in a cache per layer, of the first layers."""
    bench = bench_of(tmp_path, "predictor=markov", "simulator.admit=on_hit")
    found, expert = by_way(bench), max(bench.card.expert_bytes_L or ())
    chosen = found["chosen"].budget
    for way in ("static split by layer", "host compute", "host compute and uploads"):
        budget = found[way].budget
        assert 0 <= chosen.whole_model_bytes - budget.whole_model_bytes < expert
        assert budget.experts == chosen.experts + 2 and budget.predictor_bytes == 0
    assert found["host compute"].budget.room_G == (5, 5, 4, 4)
    for way in ("no prefetch", "lru", "optimum"):
        assert found[way].budget.room_G == chosen.room_G  # the same capacity


def test_what_the_caches_begin_with_has_its_own_columns(tmp_path):
    words = ("simulator.pinned=2", "policy=lru")
    bench = bench_of(tmp_path, ALONE, *words)
    found, expert = by_way(bench), max(bench.card.expert_bytes_L or ())
    rows = {way: bench.row(found[way]) for way in ("chosen", "host compute")}
    assert rows["chosen"]["start_bytes"] == 2 * 4 * expert
    copies_ms = 8 * int(found["chosen"].machine.whole_ns_L[0]) / 1e6
    assert rows["chosen"]["start_ms"] == pytest.approx(copies_ms)
    assert rows["host compute"]["start_bytes"] == found["host compute"].budget.cache_bytes
    cold = by_way(bench_of(tmp_path, ALONE))["chosen"]
    assert bench.row(cold)["start_bytes"] == bench.row(cold)["start_ms"] == 0
