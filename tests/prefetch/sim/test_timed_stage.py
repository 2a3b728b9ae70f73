"""Options of the timed engine as the stage passes them on: rows, columns, memory, and clear errors."""

from __future__ import annotations

import pytest

from prefetch.errors import ConfigError
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.cell import Cell
from prefetch.sim.tables.grid import cells
from tests.prefetch.sim.test_evaluate import bench_of


def chosen(bench: Bench) -> Cell:
    return next(cell for cell in cells(bench) if cell.names["way"] == "chosen")


def test_guesses_that_are_held_back_move_less_and_their_places_count(tmp_path):
    free, held = bench_of(tmp_path), bench_of(tmp_path, "simulator.admit=on_hit")
    words = "simulator.budget=400MiB", "simulator.queue=by_score"
    tight = bench_of(tmp_path, *words)
    rows = [bench.row(chosen(bench)) for bench in (free, held, tight)]
    assert rows[2]["prefetch_loads"] < rows[0]["prefetch_loads"]
    assert rows[1]["memory_savings"] < rows[0]["memory_savings"] == rows[2]["memory_savings"]
    expert = max(free.card.expert_bytes_L or ())
    more = chosen(held).budget.staging_bytes - chosen(free).budget.staging_bytes
    assert more == free.card.top_k * expert
    alone = next(cell for cell in cells(held) if cell.names["predictor"] == "none")
    assert alone.machine.landing == 0  # without guesses no places for them


def test_a_host_memory_that_cannot_hold_all_reads_from_the_disk(tmp_path):
    all_there, half = bench_of(tmp_path), bench_of(tmp_path, "simulator.host_cache=0.5")
    fast, slow = (bench.row(chosen(bench)) for bench in (all_there, half))
    assert fast["disk_loads"] == fast["disk_utilisation"] == 0 < slow["disk_loads"]
    assert slow["tpot_ms"] > fast["tpot_ms"] and slow["disk_stall_ms_per_token"] > 0
    parts = ("stall", "late_stall", "host_stall", "disk_stall")
    waited = sum(slow[f"{part}_ms_per_token"] for part in parts)
    total = waited + slow["compute_ms_per_token"]
    assert slow["stall_fraction"] == pytest.approx(waited / total)
    ways = {cell.names["way"] for cell in cells(half)}
    assert "layer streaming" not in ways


def test_layers_are_streamed_where_there_are_prompts(tmp_path):
    bench = bench_of(tmp_path)
    streamed = [cell for cell in cells(bench) if cell.names["way"] == "layer streaming"]
    assert len(streamed) == (1 if (bench.work.prefill_S > 0).any() else 0)
    row = bench.row(streamed[0])
    assert row["ttft_ms"] > 0 and row["late_hit_rate"] == 0
    lru = bench.row(next(cell for cell in cells(bench) if cell.names["way"] == "lru"))
    assert row["memory_savings"] < lru["memory_savings"]  # two buffers of a layer's experts
    forced = bench_of(tmp_path, "simulator.phase=decode")
    assert all(cell.names["way"] != "layer streaming" for cell in cells(forced))


def test_a_model_that_host_memory_does_not_hold_is_refused(tmp_path):
    words = ("source.n_layers=32", "simulator.cache=0.1")
    with pytest.raises(ConfigError, match=r"rtx4090_pcie4 has 64.00 GiB of host memory, shortfall"):
        bench_of(tmp_path, *words)
    bench_of(tmp_path, *words, "simulator.host_cache=32GiB")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("simulator.admit=later", "simulator.admit=later: expected one of at_start, on_hit"),
        ("simulator.queue=fifo", "simulator.queue='fifo': must be one of by_layer, by_score"),
        ("simulator.budget=1MiB", "simulator.budget=1MiB: an expert is"),
        ("simulator.budget=some", "simulator.budget=some: expected a size"),
        ("simulator.host_cache=1TiB", "of host memory"),
        ("simulator.host_cache=2.5", "simulator.host_cache: cache=2.5: a fraction"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, word, message):
    with pytest.raises(ConfigError, match=message):
        chosen(bench_of(tmp_path, word))
