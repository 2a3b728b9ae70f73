"""Whatever was typed, and whatever a library says of it, is explained in one line that a terminal can show."""

import pytest
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import ValidationError

from prefetch.errors import LONGEST, ConfigError
from prefetch.runs.typed import at_home, explain


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a=\x1b[31m\n\u202eb: no"),
        OSError(2, "No such file", "a\nb\x07"),
        ValidationError("Value 'a\x1b[31m\nb' could not be converted\n    full_key: a"),
        ValidationError("x" * 100_000),
    ],
)
def test_an_error_is_one_line_without_control_characters(error):
    line = explain(error)
    assert line and not any(ord(letter) < 32 or letter == "\u202e" for letter in line)
    assert len(line) <= LONGEST


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_says_what_to_install(launcher):
    said = (
        f"In 'hydra/config': Could not find 'hydra/launcher/{launcher}'\n\nAvailable options: basic"
    )
    assert "pip install 'expert-prefetch[sweep]'" in explain(MissingConfigException(said))
    other = "In 'hydra/config': Could not find 'hydra/launcher/jobs'"
    assert "pip install" not in explain(MissingConfigException(other))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("analyze", "analyze: expected key=value; did you mean stage=analyze?"),
        ("mlp", "mlp: expected key=value; did you mean predictor=mlp?"),
        ("trace.parquet", "trace.parquet: expected key=value"),
        ("source.path=[~/x.npz]", "write the path in full, such as source.path=$HOME/..."),
        ("source.path=a[", "need quotes of their own"),
    ],
)
def test_a_word_that_cannot_be_parsed_says_what_was_probably_meant(word, said):
    assert said in explain(OverrideParseException(word, f"Error parsing override '{word}'"))


def test_a_value_that_begins_with_a_tilde_is_at_home_whatever_the_shell_left(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["source.path=~/x", "store='~/a b'", "hydra.run.dir=~/out", "trace=x~/y", "-m", "a=~b"]
    assert at_home(words) == [
        "source.path=/home/me/x", "store='/home/me/a b'", "hydra.run.dir=/home/me/out", "trace=x~/y", "-m", "a=~b",
    ]  # fmt: skip


def test_several_values_without_a_sweep_say_how_to_sweep():
    said = "Ambiguous value for argument 'policy=lru,lfu'\n1. To use it as a list, use key=[value1,value2]\n2. ..."
    assert explain(ConfigCompositionException(said)).startswith(
        "policy=lru,lfu: several values; to run each, add -m;"
    )
