"""The stage with policies that ask for more, splits, pins and warm starts: rows that fit, and clear errors."""

from __future__ import annotations

import pytest

from prefetch.errors import ConfigError, MissingData
from tests.prefetch.sim.test_evaluate import evaluated

QUICK = ("evaluate.required_recall=false", "evaluate.figures=false")


def hits(tmp_path, *words):
    _, table, _ = evaluated(tmp_path, *QUICK, *words)
    return table[table.way != "curve"].drop_duplicates("way").set_index("way")


def test_policies_that_are_told_more_have_their_rows(tmp_path):
    words = ("evaluate.policies=[predicted_use,moe_infinity,static]", "predictor=markov")
    _, table, _ = evaluated(tmp_path, *QUICK, *words)
    alone = table[table.way == "no prefetch"].set_index("policy")
    assert set(alone.index) == {"predicted_use", "moe_infinity", "static"}
    least = table[table.way == "optimum"].demand_loads.item()
    assert (alone.demand_loads >= least).all()
    assert alone.hit_rate["static"] == pytest.approx(
        table[table.way == "host compute"].hit_rate.item()
    )


def test_true_guesses_evict_better_than_none(tmp_path):
    true = hits(tmp_path, "policy=predicted_use", "predictor=oracle", "simulator.scope=global")
    assert true.hit_rate["no prefetch"] > 0 and true.mark["no prefetch"] == "cheats"


def test_splits_pins_and_warm_starts(tmp_path):
    equal = hits(tmp_path, "predictor=popularity")
    given = hits(tmp_path, "predictor=popularity", "simulator.split=[4,4,4,4]")
    assert (given.hit_rate == equal.hit_rate).all()
    for words in (("split=fitted",), ("split=fitted_optimum",), ("pinned=2",), ("start=warm",)):
        one = hits(tmp_path, "predictor=popularity", *(f"simulator.{word}" for word in words))
        assert one.capacity_experts["chosen"] == equal.capacity_experts["chosen"]
        assert (one.tpot_ms["chosen"] >= one.tpot_bound_ms.dropna()).all()
        assert one.mark["lru"] == ""
    seen = hits(tmp_path, "predictor=none", "simulator.requests=all", "simulator.start=warm")
    assert seen.mark["lru"] == "cheats"


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (
            ("policy=mrs",),
            MissingData,
            "Mrs needs the router's scores of all 8 experts; the trace of",
        ),
        (("policy=hobbit",), MissingData, "Hobbit needs the router's weights"),
        (("policy=predicted_use",), MissingData, "predictor=none makes none"),
        (("simulator.split=even",), ConfigError, "expected one of equal, fitted"),
        (("simulator.split=[4,4]",), ConfigError, "2 numbers for 4 layers"),
        (("simulator.split=[4,4,4,5]",), ConfigError, "together 17 experts, and the cache has 16"),
        (("simulator.split=fitted", "simulator.scope=global"), ConfigError, "one cache for all"),
        (("simulator.pinned=5",), ConfigError, "20 experts are pinned, and 4 of them"),
        (("simulator.pinned=-1",), ConfigError, "at least 0"),
        (("simulator.start=hot",), ConfigError, "expected one of cold, warm"),
        (("policy=static", "simulator.semantics=overshoot"), ConfigError, "Static never evicts"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, words, kind, said):
    with pytest.raises(kind, match=said):
        evaluated(tmp_path, *QUICK, "predictor=none", *words)
