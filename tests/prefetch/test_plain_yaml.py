"""YAML of anybody: values as yaml itself gives them, and nothing that ends the process or fills the memory."""

import pytest
import yaml

from prefetch.config import CONFIGS
from prefetch.plain_yaml import MOST_LEVELS, MOST_NODES, load


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_ours_reads_as_before(path):
    text = path.read_text(encoding="utf-8")
    assert load(text) == yaml.safe_load(text)


def test_aliases_are_kept():
    assert load("a: &x [1, {b: 2}]\nc: *x\n") == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "flow": "[" * 100_000,
    "mappings": "{a: " * 100_000,
    "block": "- " * 100_000 + "x",
    "keys": "? " * 100_000 + "x",
    "a mountain of aliases": BOMB,
    "itself": "&a [*a]",
    "nobody": "*a",
    "a date that is none": "2001-99-99",
    "a number that is none": "9" * 5000,
    "a function": "!!python/object/apply:os.getcwd []",
    "two documents": "--- a\n--- b\n",
    "cut off": "a: [1, 2\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_as_wrong_yaml(name):
    with pytest.raises(yaml.YAMLError):
        load(HOSTILE[name])


def test_the_limits_are_far_from_what_anybody_writes():
    deep, long = "[" * (MOST_LEVELS - 1), "\n".join(f"a{i}: {i}" for i in range(1000))
    assert load(deep + "]" * len(deep)) is not None
    assert len(load(long)) == 1000 < MOST_NODES
