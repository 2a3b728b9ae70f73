"""What differs is a column, what is the same is said once, and seeds are an axis."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.report.comparing import compare, estimate, has_effect, seed_groups, setting
from analysis.report.runs import Run

HERE = Path("a")


def run(seed=0, stage="train", state="finished", choices=None, metrics=None, **settings):
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return Run(
        HERE,
        stage,
        state,
        settings={"seed": seed, **named},
        choices=choices or {},
        metrics=metrics or {},
    )


def test_only_what_differs_is_a_column():
    one = run(simulator__cache=0.1, simulator__batch=1, store="x", choices={"predictor": "mlp"})
    two = run(simulator__cache=0.5, simulator__batch=1, store="y", choices={"predictor": "markov"})
    told = compare([one, two])
    assert told.columns == ("predictor", "simulator.cache") and told.without_effect == ("store",)
    assert dict(told.common) == {"simulator.batch": 1}
    assert compare([one]).columns == () and compare([]).columns == ()


values = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from(["a", "b"]))
names = st.sampled_from(
    [
        "simulator.cache",
        "train.folds",
        "evaluate.horizons",
        "tracker.mode",
        "predictor.hidden",
        "memory",
    ]
)


@given(st.lists(st.dictionaries(names, values), min_size=1, max_size=6))
def test_every_setting_is_said_exactly_once(all_settings):
    """Outside of choices: a column, or common, or without effect; and a column does differ."""
    runs = [
        Run(HERE, "train", "finished", settings=settings, choices={"predictor": "mlp"})
        for settings in all_settings
    ]
    told = compare(runs)
    said = [*told.columns, *(name for name, _ in told.common), *told.without_effect]
    everything = {name for settings in all_settings for name in settings}
    extra = {"predictor"}  # the choice itself
    assert sorted(said) == sorted(
        (everything | extra) - {n for n in everything if not _is_said(n, all_settings)}
    )
    for name in told.columns:
        assert len({repr(s[name]) for s in all_settings if name in s}) > 1
        assert all(isinstance(setting(one, name), (int, str, float, type(None))) for one in runs)


def _is_said(name, all_settings):
    """What has no effect is told only if it differs."""
    return has_effect(name) or len({repr(s[name]) for s in all_settings if name in s}) > 1


def test_settings_of_different_choices_are_not_compared():
    runs = [
        run(predictor__hidden=64, choices={"predictor": "mlp"}),
        run(predictor__order=2, choices={"predictor": "markov2"}),
        run(predictor__hidden=128, choices={"predictor": "recurrent"}),
    ]
    assert compare(runs).columns == ("predictor",)
    runs.append(run(predictor__hidden=256, choices={"predictor": "mlp"}))
    assert compare(runs).columns == ("predictor", "predictor.hidden")


def test_a_setting_that_another_version_lacks_is_no_difference():
    assert compare([run(simulator__cache=0.1), run()]).columns == ()


def test_what_a_tracker_does_not_know_is_no_difference():
    """A folder has Hydra's record and what was typed; an offline run of the tracker has resolved settings only."""
    folder = run(choices={"policy": "lru", "experiment": "quick"}, train__horizons="[1, 4]")
    folder = replace(
        folder, overrides=[], settings=folder.settings | {"policy.h": "${train.horizons}"}
    )
    tracked = run(choices={"policy": "lru"}, train__horizons="[1, 4]", policy__h="[1, 4]")
    assert compare([folder, tracked]).columns == ()
    assert setting(tracked, "experiment") is None
    plain = replace(tracked, overrides=[])
    assert setting(plain, "experiment") == "not set" and compare([folder, plain]).columns


def test_runs_that_differ_only_in_the_seed_are_one_group():
    runs = [
        run(seed, source__seed="${seed}", store=str(seed), metrics={"m": float(seed)})
        for seed in (0, 1, 2)
    ]
    runs += [
        run(5, source__seed=5, metrics={"m": 7.0}),
        run(0, train__folds=1, source__seed="${seed}", metrics={"m": 9.0}),
    ]
    groups = {group.runs: group.seeds for group in seed_groups(runs)}
    assert groups == {(0, 1, 2, 3): (0, 1, 2, 5), (4,): (0,)}


def test_a_failed_run_is_in_its_group_and_in_no_mean():
    runs = [
        run(0, metrics={"m": 1.0}),
        run(1, metrics={"m": 3.0}),
        run(2, state="failed", metrics={"m": 99.0}),
    ]
    (group,) = seed_groups(runs)
    assert (group.runs, group.seeds) == ((0, 1, 2), (0, 1))
    told = group.metrics["m"]
    assert told.mean == 2.0 and told.n == 2


def test_of_one_seed_the_newest_run_counts():
    (group,) = seed_groups([run(0, metrics={"m": 1.0}), run(0, metrics={"m": 5.0})])
    assert group.metrics["m"].mean == 5.0 and group.metrics["m"].low is None


def test_the_interval_is_students():
    """R 4.3: t.test(c(1, 2, 3, 4))$conf.int is 0.4457397 4.5542603."""
    told = estimate(dict(enumerate([1.0, 2.0, 3.0, 4.0])))
    assert (told.mean, told.n) == (2.5, 4)
    assert (told.low, told.high) == pytest.approx((0.4457397, 4.5542603), abs=1e-6)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(-1e3, 1e3), st.floats(0.1, 10)
)
def test_an_interval_holds_its_mean_and_moves_with_the_values(values, shift, scale):
    told = estimate(dict(enumerate(values)))
    assert told.low <= told.mean <= told.high
    moved = estimate({i: scale * value + shift for i, value in enumerate(values)})
    tolerance = 1e-6 * (1 + max(map(abs, values)) * scale + abs(shift))  # sums of floats
    assert math.isclose(moved.high - moved.low, scale * (told.high - told.low), abs_tol=tolerance)
