"""Every experiment asks one question, says how long it takes, and is a valid delta: all its cells can be composed."""

import itertools
import json
import re
from pathlib import Path

import pytest
from entry import run
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from prefetch import config, leaves

FOLDER = config.CONFIGS / "experiment"
NO_QUESTION = {"quick", "published_ab"}  # a smaller default, and a check against others' numbers
QUESTIONS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NO_QUESTION)
DURATION = re.compile(r"\? \((about )?\d+ (seconds|minutes)\b.*on two cores\)$")


def comment(name: str) -> list[str]:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def test_the_questions_that_were_promised_are_asked():
    assert {
        "predictor_comparison", "capacity_curve", "policies_and_predictors", "horizon_and_bandwidth",
        "required_recall", "domain_shift", "batch_size", "model_scaling", "published_protocols",
    } <= set(QUESTIONS)  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_begins_with_one_question_and_its_duration(name):
    package, question, command = comment(name)[:3]
    assert package == "@package _global_"
    assert DURATION.search(question), question
    assert question.count("?") == 1 and question[0].isupper()
    assert f"scripts/run.py -m experiment={name}" in command


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_cell_of_it_is_valid(name):
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        whole = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
        assert whole.hydra.mode.name == "MULTIRUN", "forgetting -m must not run another thing"
        params = whole.hydra.sweeper.params or {}
        parser = OverridesParser.create()
        words = [f"{key}={value}" for key, value in params.items()]
        axes = [
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            for one in parser.parse_overrides(words)
        ]
        assert all(len(axis) > 1 for axis in axes)
        cells = list(itertools.product(*axes))
        assert 1 <= len(cells) <= 20
        for cell in cells:
            cfg = compose("config", overrides=[f"experiment={name}", *cell])
            config.check_values(cfg)
            leaves.instantiate(cfg.predictor, "predictor")
            assert max(cfg.train.horizons) < cfg.source.layers, "nothing is so many layers ahead"
        for group, named in (("policy", "policies"), ("predictor", "predictors")):
            assert set(whole.evaluate[named] or ()) <= set(config.choices(group))


TINY = (
    "source=synthetic", "source.n_requests=20", "source.prompt_tokens=6", "source.new_tokens=10", "source.n_layers=6",
    "source.n_experts=32", "source.top_k=2", "predictor.epochs=1", "tracker=none", "evaluate.figures=false",
)  # fmt: skip


def test_a_question_is_answered_by_its_sweep(tmp_path):
    """The whole way, on little: every cell in a folder of its own, with its numbers."""
    words = ("-m", "experiment=horizon_and_bandwidth", *TINY, "train.horizons=[1,2,4]")
    done = run(tmp_path, *words, "evaluate.horizons=[1,4]", "hardware=laptop_rtx4070,rtx5090_pcie5")
    assert done.returncode == 0, done.stderr
    standings = [json.loads(p.read_text()) for p in tmp_path.glob("multirun/*/*/run.json")]
    assert [one["state"] for one in standings] == ["finished"] * 2
    slow, fast = (
        json.loads(next(tmp_path.glob(f"multirun/*/{job}/metrics.json")).read_text())["tpot_ms"]
        for job in "01"
    )
    assert fast < slow
    assert (
        len(list(Path(tmp_path / "artifacts" / "predictor").glob("*/"))) == 3
    )  # none, mlp, oracle
