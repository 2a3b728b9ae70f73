"""What a run is called: short enough for a tracker, telling runs of a sweep apart, silent about secrets."""

from pathlib import Path

import yaml

from prefetch.config import CONFIGS, choices, stage_names
from prefetch.runs.naming import About
from prefetch.runs.redaction import HIDDEN, Redactor

CHOICES = {
    "stage": "evaluate",
    "source": "tiny_moe",
    "predictor": "mlp",
    "policy": "lru",
    "experiment": None,
}


def about(*words, stage="evaluate", group=None, experiment=None, config=None):
    return About.safe(
        stage=stage, folder=Path("outputs"), words=[f"stage={stage}", *words],
        choices={**CHOICES, "experiment": experiment, "hydra/launcher": "basic"}, config=config or {}, group=group,
        hidden=Redactor(config, environment={}),
    )  # fmt: skip


def test_a_run_is_called_by_what_was_typed_for_it():
    assert about("policy=lfu", "simulator.cache=0.5", "tracker.mode=online", "store=/x").name == (
        "evaluate policy=lfu simulator.cache=0.5"
    )
    assert about().name == "evaluate source=tiny_moe"
    assert (
        about("trace=/data/gpt-oss", config={"trace": "/data/gpt-oss"}).name
        == "evaluate trace=gpt-oss"
    )
    long = about(*[f"a{i}=1" for i in range(100)], "seed=3").name
    assert len(long) == 128 and long.startswith("evaluate a0=1 ") and long.endswith(" seed=3")


def test_the_group_is_the_sweep_the_experiment_or_both():
    assert about().group is None
    assert about(group="20261122-0700").group == "20261122-0700"
    assert about(experiment="quick").group == "quick"
    assert about(group="20261122-0700", experiment="quick").group == "quick-20261122-0700"


def test_tags_are_the_choices_that_the_stage_reads():
    groups = {"evaluate": ["source", "predictor", "policy"]}
    assert about(experiment="quick").tags(groups) == [
        "experiment=quick", "source=tiny_moe", "predictor=mlp", "policy=lru",
    ]  # fmt: skip
    assert about(stage="collect").tags(groups) == []
    lists = {
        "evaluate": {"predictors": ["none", "mlp"], "policies": None},
        "trace": f"/data/{'x' * 99}",
    }
    trace, *others = about(config=lists).tags(groups)
    assert others == ["predictor=none", "predictor=mlp", "policy=lru"]
    assert trace.startswith("trace=xxx") and len(trace) == 64


def test_a_tag_names_groups_and_stages_that_exist():
    told = yaml.safe_load((CONFIGS / "tracker" / "wandb.yaml").read_text())["tag_choices"]
    assert set(told) <= set(stage_names())
    assert all(choices(group) for groups in told.values() for group in groups)


def test_a_secret_is_in_no_part_of_it():
    config = {"source": {"hub_token": "xyzzy", "path": "https://a:plugh@b"}, "trace": "t/xyzzy"}
    told = about("source.hub_token=xyzzy", "source.path=https://a:plugh@b", config=config)
    parts = str([told.name, told.tags({"evaluate": ["source"]}), told.facts, told.config])
    assert "xyzzy" not in parts and "plugh" not in parts and HIDDEN in parts
