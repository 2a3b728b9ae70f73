"""Charts exist where their data does, average over seeds, name what differs, and keep their marks."""

import json
import shutil

import pandas as pd
import pytest
from report_runs import Told, write_run

from analysis.report.charts import charts, times_are
from analysis.report.comparing import estimate, seed_groups
from analysis.report.reading import read_run
from analysis.report.runs import Run


def runs_of(folder, *told):
    return [read_run(write_run(folder / str(i), one)) for i, one in enumerate(told)]


def by_id(runs):
    return {chart.id: chart for chart in charts(runs)}


def series_of(chart, name, variant=None):
    variant = next(iter(chart.variants)) if variant is None else variant
    return next(one for one in chart.variants[variant] if one.name == name)


def test_no_data_no_chart(tmp_path):
    assert charts([]) == []
    assert charts(runs_of(tmp_path, Told(has_tables=False), Told(stage="collect"))) == []
    assert set(by_id(runs_of(tmp_path / "t", Told(stage="train")))) == {
        "recall-by-layer",
        "recall-by-horizon",
    }


def test_every_chart_of_the_issue(tmp_path):
    found = by_id(runs_of(tmp_path, Told(), Told(stage="train")))
    assert list(found) == [
        "hit-rate", "time-per-token", "pareto", "recall-by-layer", "recall-by-horizon", "required-recall",
    ]  # fmt: skip


def test_points_are_means_over_seeds_with_their_interval(tmp_path):
    runs = runs_of(tmp_path, *(Told(seed=seed) for seed in (0, 1, 2)))
    (x, y, low, high, over) = (getattr(series_of(by_id(runs)["hit-rate"], "lru + markov"), name)[0]
                               for name in ("x", "y", "low", "high", "over"))  # fmt: skip
    told = estimate({seed: run.metrics["hit_rate"] for seed, run in enumerate(runs)})
    assert (x, over) == (0.25, "3 seeds")
    assert (y, low, high) == pytest.approx((told.mean, told.low, told.high))


def test_one_seed_has_the_interval_of_its_table(tmp_path):
    (run,) = runs_of(tmp_path, Told())
    series = series_of(by_id([run])["time-per-token"], "lru + markov")
    row = run.table("results").iloc[0]
    assert (series.low, series.high) == ([row.tpot_ms_low], [row.tpot_ms_high])
    assert series.over == ["requests"]


def test_what_cheats_keeps_its_mark(tmp_path):
    runs = runs_of(
        tmp_path,
        Told(choices={"predictor": "oracle"}),
        Told(stage="train", choices={"predictor": "oracle"}),
    )
    found = by_id(runs)
    assert (
        series_of(found["hit-rate"], "lru + oracle").cheats
        and series_of(found["hit-rate"], "belady").cheats
    )
    assert not series_of(found["hit-rate"], "host compute").cheats
    for name in ("recall-by-layer", "recall-by-horizon"):
        assert series_of(found[name], "oracle").cheats


def test_a_setting_that_differs_stands_in_the_name(tmp_path):
    runs = runs_of(
        tmp_path,
        *(Told(settings={"simulator.batch": b, "simulator.cache": b / 10}) for b in (1, 2)),
    )
    names = {one.name for one in by_id(runs)["hit-rate"].variants[""]}
    assert {"lru + markov (batch=1)", "lru + markov (batch=2)"} <= names


def about(folder, **said):
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(told | said))


def test_another_version_is_another_line_and_no_second_seed(tmp_path):
    folders = [write_run(tmp_path / str(i), Told(seed=i)) for i in range(2)]
    about(folders[0], version="0.1.0")
    about(folders[1], version="0.2.0")
    runs = [read_run(folder) for folder in folders]
    assert len(seed_groups(runs)) == 2
    names = [one.name for one in by_id(runs)["hit-rate"].variants[""]]
    assert {"lru + markov (version 0.1.0)", "lru + markov (version 0.2.0)"} <= set(names)


def test_another_trace_at_the_same_path_is_another_line(tmp_path):
    folders = [
        write_run(tmp_path / str(i), Told(seed=i, settings={"trace": "t"})) for i in range(2)
    ]
    (folders[1] / "lineage.json").write_text('{"trace/fedcba9876543210": {"kind": "trace"}}')
    runs = [read_run(folder) for folder in folders]
    assert len(seed_groups(runs)) == 2
    names = [one.name for one in by_id(runs)["hit-rate"].variants[""]]
    assert {"lru + markov (trace 01234567)", "lru + markov (trace fedcba98)"} <= set(names)


def test_a_setting_that_one_version_lacks_is_another_line(tmp_path):
    runs = runs_of(tmp_path, Told(), Told(seed=1, settings={"simulator.semantics": "sequential"}))
    names = [one.name for one in by_id(runs)["time-per-token"].variants[""]]
    assert {"lru + markov", "lru + markov (no simulator.semantics)"} <= set(names)


def test_runs_that_left_no_settings_stand_for_themselves(tmp_path):
    for name in ("a", "b"):
        shutil.rmtree(write_run(tmp_path / name, Told()) / ".hydra")
    runs = [read_run(tmp_path / name) for name in ("a", "b")]
    names = [one.name for one in by_id(runs)["hit-rate"].variants[""]]
    assert sum(name.startswith("lru + markov (") for name in names) == 2


def test_drawn_guesses_of_two_horizons_are_two_lines(tmp_path):
    folders = [
        write_run(tmp_path / str(h), Told(settings={"simulator.horizon": h})) for h in (1, 4)
    ]
    for folder, h in zip(folders, (1, 4), strict=True):
        table = pd.read_csv(folder / "required_recall.csv").assign(horizon=h)
        table.to_csv(folder / "required_recall.csv", index=False)
    chart = by_id([read_run(folder) for folder in folders])["required-recall"]
    names = [one.name for one in next(iter(chart.variants.values()))]
    assert {"lru, cache 0.25, 1 ahead", "lru, cache 0.25, 4 ahead"} <= set(names)


def test_a_predictors_setting_names_only_its_own_rows(tmp_path):
    runs = runs_of(
        tmp_path,
        *(Told(settings={"predictor.hidden": n}, choices={"predictor": "mlp"}) for n in (64, 128)),
    )
    names = {one.name for one in by_id(runs)["hit-rate"].variants[""]}
    assert names == {"lru + mlp (hidden=64)", "lru + mlp (hidden=128)", "belady", "host compute"}


def test_times_say_where_they_come_from(tmp_path):
    simulated, device = runs_of(tmp_path, Told(), Told(settings={"simulator.clock": "device"}))
    for runs, said in (
        ([simulated], "simulated"),
        ([device], "measured"),
        ([simulated, device], "simulated or measured"),
    ):
        assert times_are(runs, by_id(runs)["time-per-token"]) == said
    names = {one.name for one in by_id([simulated, device])["time-per-token"].variants[""]}
    assert {"lru + markov (simulated)", "lru + markov (measured)"} <= names
    assert times_are([simulated], by_id([simulated])["hit-rate"]) == ""


def test_four_layers_ahead_come_first(tmp_path):
    chart = by_id(runs_of(tmp_path, Told(stage="train")))["recall-by-layer"]
    assert list(chart.variants) == ["4 layers ahead", "1 layer ahead"]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"policy": ["lru"], "memory_savings": ["much"], "hit_rate": [None]}),
        pd.DataFrame({"policy": ["lru"], "memory_savings": [0.5], "slowdown": [float("inf")]}),
        pd.DataFrame({"anything": [1]}),
        pd.DataFrame({"predictor": ["a"], "horizon": ["x"], "layer": [None], "recall_at_k": ["y"]}),
    ],
)
def test_tables_of_another_version_break_nothing(tmp_path, frame):
    names = ("results", "predictors", "by_layer", "required_recall")
    run = Run(tmp_path, "evaluate", "finished", tables={name: lambda: frame for name in names})
    assert charts([run]) == []
