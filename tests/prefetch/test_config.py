"""Leaves become objects in one place, and a wrong one is refused by its full name."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from prefetch import config
from prefetch.config import choices, stage_names
from prefetch.errors import ConfigError, FormatError
from prefetch.leaves import instantiate

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Leaf:
    size: int
    rate: float = 1.0
    name: str | None = None
    names: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)
    path: str | list[str] | None = None
    stack: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise FormatError(f"size must not be negative, got {self.size}")


def make(**values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefetch.leaves.locate", lambda dotted: Leaf)
        return instantiate(OmegaConf.create({"_target_": "Leaf", **values}), "leaf")


def test_a_leaf_becomes_its_class():
    assert make(size=3, rate=2, names=["a"], table={"a": "b"}) == Leaf(
        3, 2.0, None, ["a"], {"a": "b"}
    )
    assert isinstance(make(size=3, rate=2).rate, float)
    assert make(size=1, path="x").path == "x" and make(size=1, path=["x"]).path == ["x"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"leaf.size: must be given"),
        ({"size": "abc"}, r"leaf.size: expected int, got 'abc' \(str\)"),
        ({"size": 1.5}, r"leaf.size: expected int, got 1.5 \(float\)"),
        ({"size": True}, r"leaf.size: expected int, got True \(bool\)"),
        ({"size": 1, "rate": "x"}, r"leaf.rate: expected float"),
        ({"size": 1, "name": 3}, r"leaf.name: expected str \| None, got 3"),
        ({"size": 1, "names": [1]}, r"leaf.names: expected list\[str\], got \[1\]"),
        ({"size": 1, "names": "x"}, r"leaf.names: expected list\[str\], got 'x'"),
        ({"size": 1, "table": {"a": 1}}, r"leaf.table: expected dict\[str, str\]"),
        (
            {"size": 1, "sizee": 2},
            r"leaf.sizee: does not exist; leaf has name, names, path, rate, size, stack, table",
        ),
        ({"size": 1, "stack": "c"}, r"leaf.stack: expected one of 'a', 'b', got 'c'"),
        ({"size": -1}, r"leaf: size must not be negative, got -1"),
    ],
)
def test_a_wrong_leaf_is_refused_by_its_full_name(values, message):
    with pytest.raises((ConfigError, FormatError), match=message):
        make(**values)


def choking(**settings):
    return settings["n"] // settings["k"]


def test_settings_that_a_class_chokes_on_are_an_error_of_the_leaf():
    leaf = OmegaConf.create({"_target_": "somewhere.choking", "n": 1, "k": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefetch.leaves.locate", lambda _: choking)
        with pytest.raises(ConfigError, match=r"source: integer division or modulo by zero"):
            instantiate(leaf, "source")


def test_a_target_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"_target_=no\.such\.Thing: cannot be imported"):
        instantiate(OmegaConf.create({"_target_": "no.such.Thing"}), "leaf")
    with pytest.raises(ConfigError, match="expected a mapping with _target_"):
        instantiate(OmegaConf.create({"size": 1}), "leaf")


def test_every_stage_has_a_line_and_every_source_a_first_comment():
    assert {"all", "artifacts", "collect", "list"} <= set(stage_names())
    assert all(stage_names().values())
    assert {"none", "wandb"} <= set(choices("tracker"))


def _written() -> Iterator[tuple[Path, str]]:
    """Pages, and every text in the code."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        yield path, path.read_text()
    for path in (*(ROOT / "prefetch").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


def test_every_option_that_a_page_or_a_message_names_exists():
    blocks = {
        field.name: {option.name for option in dataclasses.fields(field.default_factory)}
        for field in dataclasses.fields(config.Config)
        if dataclasses.is_dataclass(field.default_factory)
    }
    named = re.compile(rf"(?<![\w./])({'|'.join(blocks)})\.([a-z_]+)(?!\w)")
    files = {"py", "md", "log", "json", "html", "png"}
    found = [(path, *option) for path, text in _written() for option in named.findall(text)]
    assert len(found) > 100
    assert not [place for place in found if place[2] not in blocks[place[1]] | files]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"seed": 10**30}, "seed: a whole number beyond 64 bits"),
        ({"a": {"b": [1, -(2**63) - 1]}}, r"a\.b: a whole number beyond"),
        ({"a": {"b": float("nan")}}, r"a\.b=nan: expected a finite number"),
        ({"a": [1.0, float("-inf")]}, "a=-inf: expected a finite number"),
    ],
)
def test_numbers_that_nothing_can_mean_are_refused_whatever_the_option(value, said):
    with pytest.raises(ConfigError, match=said):
        config.check_numbers(value)


def test_all_other_numbers_are_left_to_their_options():
    config.check_numbers({"a": [0, -1, 2**63 - 1, 1e308, True, None, "1e400"], "b": {}})


@pytest.mark.parametrize("word", ["store=", "trace=", "store='  '"])
def test_a_folder_without_a_name_is_not_the_folder_one_stands_in(word):
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[word])
    with pytest.raises(ConfigError, match=rf"{word.split('=')[0]}=: must name a folder"):
        config.check_values(cfg)
