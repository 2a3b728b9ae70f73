"""Every figure is drawn from what there is, whatever that is: it is there, or the log says why not."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from prefetch.figures import Key
from prefetch.sim.engines.pool import HIT
from prefetch.sim.engines.run import replay
from prefetch.sim.limits.curves import lru_by_stacks
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables import pictures
from prefetch.sim.tables.panels import Lanes, Stacked, looks, with_intervals
from prefetch.sim.tables.rows import counted_S
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.test_evaluate import evaluated

FIGURES = (
    "hit_rate_by_capacity", "tpot_by_capacity", "tpot_by_policy", "savings_and_slowdown", "stall_breakdown",
    "required_recall", "timeline",
)  # fmt: skip


def test_every_figure_is_there(tmp_path, caplog):
    words = ("evaluate.policies=[lru,lfu]", "predictor=markov", "evaluate.required_recall=true")
    evaluated(tmp_path, *words, "evaluate.figures=true")
    files = {path.name for path in (tmp_path / "run0").iterdir()}
    assert files >= {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert "timeline.json" in files and "no figure" not in caplog.text


def test_the_log_says_why_a_figure_is_missing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        evaluated(tmp_path, "predictor=none", "evaluate.figures=true", "simulator.phase=prefill")
    why = dict.fromkeys(FIGURES[1:], "no token is generated")
    why["required_recall"] = "evaluate.required_recall=false"
    for name, reason in why.items():
        assert f"no figure {name}: {reason}" in caplog.text
        assert not (tmp_path / "run0" / f"{name}.png").exists()
    assert (tmp_path / "run0" / f"{FIGURES[0]}.png").exists()


@pytest.mark.parametrize(("batch", "phase"), [(1, "decode"), (1, "auto"), (3, "decode")])
def test_curves_of_all_sizes_are_the_replays_of_each(batch, phase):
    for seed in range(5):
        work = drawn(seed, n_tokens=80, batch=batch, phase=phase)
        accesses_S, rates = np.diff(work.start_V[:: work.card.n_layers]), lru_by_stacks(work)
        assert max(rates) == work.card.n_experts
        for size, rate in rates.items():
            is_hit_A = replay(work, Lru(), [size] * 3, [1] * 3) == HIT
            assert rate == pytest.approx(
                is_hit_A[np.repeat(counted_S(work), accesses_S)].mean(), abs=1e-12
            )


def rows_of(policies: int, predictors: int, capacities: int) -> pd.DataFrame:
    """A table as `evaluate` makes it, of made-up numbers."""
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    for c in range(capacities):
        names = [
            ("chosen", f"policy{p}", f"guesser{g}" if g else "none")
            for p in range(policies)
            for g in range(predictors)
        ]
        names += [("no prefetch", f"policy{p}", "none") for p in range(policies)]
        names += [("lru", "lru", "none"), *((way, "lru", "none") for way in pictures.WAYS)]
        for way, policy, predictor in names:
            ms = float(rng.uniform(5, 9)) / (c + 1)
            rows.append(
                {
                    "way": way, "policy": policy, "predictor": predictor, "capacity": f"0.{c + 1}",
                    "horizon": 4 * (predictor != "none"), "mark": "cheats" if way == "optimum" else "",
                    "capacity_experts": 8 * (c + 1), "tpot_ms": ms, "tpot_ms_low": ms - 0.3, "tpot_ms_high": ms + 0.3,
                    "hit_rate": 0.5, "hit_rate_low": np.nan, "hit_rate_high": np.nan, "slowdown": ms,
                    "interval_over": "requests",
                    "tpot_bound_ms": 1.0 if way == "chosen" else np.nan, "memory_savings": 1 - 0.1 * (c + 1),
                    **dict.fromkeys(pictures.PARTS, ms / 4),
                }
            )  # fmt: skip
    return pictures.prepared(pd.DataFrame(rows), 80)


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 2, 3)])
def test_figures_of_few_and_of_many(tmp_path, shape):
    """One policy or twelve, with guesses or without; every policy has a look of its own."""
    table, curves = rows_of(*shape), pd.DataFrame()
    drawn_files = [
        *pictures.hit_rate_by_capacity(table, curves, tmp_path, "note"),
        *pictures.tpot_by_capacity(table, tmp_path, "note", full_ms=1.0),
        *pictures.tpot_by_policy(table, tmp_path, "note", full_ms=1.0),
        *pictures.savings_and_slowdown(table, tmp_path, "note"),
        *pictures.stall_breakdown(table, tmp_path, "note"),
    ]
    assert len(drawn_files) == 10 and all(path.stat().st_size > 1000 for path in drawn_files)
    text = (tmp_path / "tpot_by_policy.svg").read_text()
    assert all(f"policy{p}" in text for p in range(shape[0]))


def test_whoever_cheats_is_marked_in_every_figure(tmp_path):
    """As in the tables: a policy that reads the answer in the legend, guesses that do in their panel's title."""
    table = rows_of(2, 2, 2).replace({"policy1": "belady", "guesser1": "oracle"})
    table.loc[(table.policy == "belady") | (table.predictor == "oracle"), "mark"] = "cheats"
    curves = pd.DataFrame({"share": [0.1, 1.0], "lru": [0.1, 1.0], "optimum": [0.2, 1.0]})
    pictures.hit_rate_by_capacity(table, curves, tmp_path, "note")
    pictures.tpot_by_capacity(table, tmp_path, "note", full_ms=1.0)
    pictures.tpot_by_policy(table, tmp_path, "note", full_ms=1.0)
    pictures.stall_breakdown(table, tmp_path, "note")
    pictures.savings_and_slowdown(table, tmp_path, "note")

    def text(name: str) -> str:
        return (tmp_path / f"{name}.svg").read_text()

    for name in ("hit_rate_by_capacity", "tpot_by_policy"):
        assert "belady (cheats)" in text(name) and "oracle, 4 ahead (cheats)" in text(name)
        assert "policy0 (cheats)" not in text(name)
    assert "optimum, no guesses (cheats)" in text("hit_rate_by_capacity")
    assert "oracle, 4 ahead (cheats)" in text("tpot_by_capacity")
    assert "other policies (cheats)" in text("savings_and_slowdown")
    bars = text("stall_breakdown")
    assert "belady (cheats)" in bars and "policy0 + oracle, 4 ahead (cheats)" in bars
    assert "optimum (cheats)" in bars


def test_the_curve_of_sizes_is_joined_to_its_own_cell_only():
    table = rows_of(1, 2, 1)
    size = table[(table.way == "chosen") & (table.predictor == "guesser1")].assign(
        way="curve", percent=77.0
    )
    whole = pd.concat([table, size])
    for title, rows in pictures._by_guesses(whole):
        joined = pictures._with_curve(rows, whole)
        assert (77.0 in joined.percent.tolist()) == title.startswith("guesser1")


def test_looks_are_all_different():
    assert len(set(looks(24, pictures.CATEGORIES))) == 24
    ways = [*pictures.WAYS.values(), pictures.WITHOUT, *looks(9, pictures.GUESSING)]
    assert len(set(ways)) == len(ways)


def test_points_carry_their_intervals():
    lines = with_intervals([1, 2], [5, 6], [4, np.nan], [7, np.nan], "name", colour="#000000")
    assert len(lines) == 2 and lines[0].label == "" and lines[1].label == "name"
    assert list(lines[0].x) == [1, 1] and list(lines[0].y) == [4, 7]


def test_bars_stand_behind_one_another_and_lanes_from_above():
    axes = Figure().add_subplot()
    kinds = [Key("a", "#000000", shape="bar"), Key("b", "#111111", shape="bar")]
    parts_KN = np.array([[1.0, 2.0], [3.0, 0.0]])
    axis = pictures.Axis("x")
    panel = Stacked("t", axis, axis, names=["one", "two"], parts_KN=parts_KN, kinds=kinds)
    panel.paint(axes)
    ends = sorted(patch.get_x() + patch.get_width() for patch in axes.patches)
    assert ends == [1.0, 2.0, 2.0, 4.0] and panel.keys == tuple(kinds)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    lanes = Lanes("t", axis, axis, lanes=["GPU", "link"], pieces=[(1, kinds[0], [(0.0, 2.0)])])
    lanes.paint(axes)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["GPU", "link"]
    assert lanes.keys == (kinds[0],)


def test_figures_are_the_same_bytes_twice(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pictures.stall_breakdown(rows_of(1, 2, 1), tmp_path / name, "note")
    one, two = ((tmp_path / name / "stall_breakdown.svg").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("fastest", [0.4, 0.9, 1.0])
def test_no_slowdown_is_cut_off(tmp_path, monkeypatch, fastest):
    """A device's runs spread: a cell may be measured faster than the run with every expert there."""
    table, drawn_panels = rows_of(2, 2, 2), list[Any]()
    low, high = table.slowdown.min(), table.slowdown.max()
    table["slowdown"] = fastest + (table.slowdown - low) / (high - low) * 3
    monkeypatch.setattr(pictures, "draw", lambda _, __, panels, **___: drawn_panels.extend(panels))
    pictures.savings_and_slowdown(table, tmp_path, "note")
    assert len(drawn_panels) == 2
    for panel in drawn_panels:
        assert panel.y.low < fastest
