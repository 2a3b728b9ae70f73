"""Every warning is said where it is so, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from prefetch.sim.tables.summary import gap_closed, warnings
from tests.prefetch.sim.test_evaluate import evaluated


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("simulator.scope=global", "simulator.cache=0.2", "predictor=none"),
            (
                "holds 0.75 of what one token touches: a global LRU hits next to nothing there",
                "would delay",
            ),
        ),
        (
            ("simulator.cache=2", "predictor=random"),
            (
                "the link is busy 99%",
                "prefetch is slower than none",
                "computing misses on the host is faster",
            ),
        ),
        (
            ("simulator.phase=decode", "simulator.cache=1", "predictor=none"),
            ("holds 0.50 of what one token touches: in some layers", "teacher-forced"),
        ),
        (("source.new_tokens=0", "predictor=none"), ("teacher-forced", "the routing is synthetic")),
    ],
)
def test_what_would_mislead_is_said(tmp_path, words, told, caplog):
    _, _, summary = evaluated(tmp_path, *words)
    for said in told:
        assert said in summary and said in caplog.text


def row(**changes: Any) -> dict[str, Any]:
    usual = {
        "way": "chosen", "policy": "lru", "predictor": "markov", "capacity": "0.5", "tpot_ms": 8.0, "hit_rate": 0.6,
        "capacity_token_cycles": 4.0, "link_utilisation": 0.5, "overshoot_bytes": 0, "mark": "", "hit_rate_bound": 0.9,
        "capacity_experts": 64,
    }  # fmt: skip
    return usual | changes


def bench(kind: str = "real", scope: str = "per_layer", is_forced: bool = False) -> Any:
    return SimpleNamespace(
        reader=SimpleNamespace(provenance=SimpleNamespace(kind=kind)),
        simulator=SimpleNamespace(scope=scope),
        work=SimpleNamespace(is_teacher_forced=is_forced),
    )


def said(about: Any, alone_ms: float = 9.0, host_ms: float = 9.0, **changes: Any) -> list[str]:
    rows = [
        row(**changes),
        row(way="no prefetch", predictor="none", tpot_ms=alone_ms),
        row(way="host compute", predictor="none", tpot_ms=host_ms),
    ]
    table = pd.DataFrame(rows)
    return list(warnings(about, table, table.iloc[0]))


def test_each_warning_alone_and_none_without_a_reason():
    assert said(bench()) == []
    assert len(said(bench("synthetic"))) == len(said(bench(is_forced=True))) == 1
    assert "hits next to nothing" in said(bench(scope="global"), capacity_token_cycles=0.9)[0]
    assert "in parts" in said(bench(), capacity_token_cycles=0.9)[0]
    assert said(bench(), capacity_token_cycles=1.0) == []
    assert "delay what" in said(bench(), link_utilisation=0.95)[0]
    assert said(bench(), link_utilisation=0.9) == []
    assert said(bench(), alone_ms=7.0) == [
        "prefetch is slower than none: 8.00 ms against 7.00 ms per token"
    ]
    assert said(bench(), host_ms=7.0) == [
        "computing misses on the host is faster: 7.00 ms against 8.00 ms"
    ]
    assert said(bench(), alone_ms=8.0, host_ms=8.0) == []


def measured(ms: float, least: float, most: float, runs: int = 3) -> dict[str, Any]:
    return {"tpot_ms": ms, "tpot_ms_least_run": least, "tpot_ms_most_run": most, "runs": runs}


@pytest.mark.parametrize(
    ("with_it", "without", "told"),
    [
        (
            measured(8.0, 7.9, 8.3),
            measured(7.0, 6.8, 7.2),
            ["prefetch is slower than none: 8.00 [7.90..8.30] ms against 7.00 [6.80..7.20] ms per token"],
        ),
        (
            measured(8.0, 7.1, 8.3),
            measured(7.0, 6.8, 7.2),
            ["prefetch and none: no difference beyond the spread of their runs: 8.00 [7.10..8.30] ms against "
             "7.00 [6.80..7.20] ms per token"],
        ),
        (
            measured(7.0, 6.8, 7.2),
            measured(7.1, 7.0, 8.3),
            ["prefetch and none: no difference beyond the spread of their runs: 7.00 [6.80..7.20] ms against "
             "7.10 [7.00..8.30] ms per token"],
        ),
        (measured(7.0, 6.8, 7.0), measured(8.0, 7.9, 8.3), []),
        (
            measured(8.0, 8.0, 8.0, 1),
            measured(7.0, 7.0, 7.0, 1),
            ["prefetch is slower than none: 8.00 ms against 7.00 ms per token; one run each, whose spread nobody "
             "knows: simulator.rounds=3 tells"],
        ),
    ],
)  # fmt: skip
def test_of_a_device_only_what_is_beyond_the_spread_of_its_runs(with_it, without, told):
    host = row(way="host compute", predictor="none", tpot_ms=float("nan"))
    alone = row(way="no prefetch", predictor="none", **without)
    table = pd.DataFrame([row(**with_it), alone, host])
    assert list(warnings(bench(), table, table.iloc[0])) == told


def test_the_gap_that_is_closed():
    table = pd.DataFrame(
        [row(), row(way="lru", hit_rate=0.5), row(way="optimum", hit_rate=0.9), row(capacity="1")]
    )
    closed = gap_closed(table).tolist()
    assert closed[:3] == pytest.approx([0.25, 0.0, 1.0]) and closed[3] != closed[3]


def test_times_below_a_millisecond_can_be_told_apart():
    assert said(bench(), tpot_ms=0.2448, alone_ms=0.2443) == [
        "prefetch is slower than none: 0.2448 ms against 0.2443 ms per token"
    ]


def test_ways_that_hold_more_in_the_same_memory_are_named():
    large = row(way="host compute", predictor="none", tpot_ms=9.0, capacity_experts=240)
    table = pd.DataFrame([row(), row(way="no prefetch", predictor="none", tpot_ms=9.0), large])
    assert list(warnings(bench(), table, table.iloc[0])) == [
        "markov takes memory too: host compute have it for experts, 240 in all, the chosen cache holds 64"
    ]
