"""Whatever was typed, and whatever a library says of it, is explained in one line that a terminal can show."""

import pytest
from hydra.errors import MissingConfigException
from omegaconf.errors import ValidationError

from prefetch.errors import LONGEST, ConfigError
from prefetch.runs.typed import explain


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
