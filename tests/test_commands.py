"""Every command that a page or a configuration file shows can be typed: it composes, and its values are taken.

What runs them is elsewhere (the README's in test_readme, an experiment's cells in test_experiments): here nothing runs,
so that commands for other machines, models and hours are asked as well. Options and links: test_docs.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.runs import typed

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FILES = [
    path
    for path in [*PAGES, *sorted(config.CONFIGS.rglob("*.yaml"))]
    if "run.py" in path.read_text()
]
ENTRY = "scripts/run.py"
FENCE = re.compile(r"^```(?:bash|text|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:python scripts/run\.py|-m|stage=\w+) [^`\n]+)`")
COMMENT = re.compile(r"# *((?:.*: )?python scripts/run\.py(?:.*\\\n#)*[^;\n]*)")
FILLED_IN = re.compile(
    r"^\.\.\.$|=\.\.\.$|^\w+=[A-Z]+$|^[A-Z_]+=|^torchrun|^python"
)  # by the reader
CHECKED = ("source", "predictor", "policy", "tracker", "cluster")  # hardware is read from its file


def shell(path: Path) -> Iterator[str]:
    """What a page gives to a shell, a continued line as one, with what a variable stands for put in."""
    for block in FENCE.findall(path.read_text()):
        variables = dict[str, list[str]]()
        for line in block.replace("\\\n", " ").splitlines():
            told = re.split(r"\s#|^#", line)[0].strip()
            if named := re.fullmatch(r'([A-Z]+)="(.*)"', told):
                variables.setdefault(named[1], []).append(named[2])
                continue
            used = [name for name in variables if f"${name}" in told]
            for values in product(*(variables[name] for name in used)):
                whole = told
                for name, value in zip(used, values, strict=True):
                    whole = whole.replace(f"${name}", value)
                yield whole


def commands(path: Path) -> list[str]:
    """What follows the entry, of every command of a page or a configuration file."""
    if path.suffix == ".yaml":
        found = [one.replace("\\\n#", " ") for one in COMMENT.findall(path.read_text())]
    else:
        found = [*shell(path), *SPAN.findall(FENCE.sub("", path.read_text()))]
    return [
        one.partition(ENTRY)[2] if ENTRY in one else one
        for one in found
        if ENTRY in one or one.startswith(("-m ", "stage="))
    ]


def jobs(command: str) -> Iterator[tuple[str, ...]]:
    """The overrides of its jobs: of a sweep the first one, and every further value of every axis."""
    told = [word for word in shlex.split(command) if not FILLED_IN.search(word)]
    is_sweep = bool(set(typed.SWEEP) & set(told))
    words = [word for word in told if word not in typed.SWEEP]
    typed.refuse(words)
    parsed = OverridesParser.create().parse_overrides(words)
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [word]
        for one, word in zip(parsed, words, strict=True)
    ]
    assert is_sweep or all(len(axis) == 1 for axis in axes), f"several values without -m: {command}"
    first = tuple(axis[0] for axis in axes)
    yield first
    for place, axis in enumerate(axes):
        yield from ((*first[:place], value, *first[place + 1 :]) for value in axis[1:])


@cache
def check(words: tuple[str, ...]) -> None:
    """What is asked before a stage begins: keys, types, values of the trunk, and types of the choices' settings."""
    needs_hydra = any(word.startswith("hydra/") for word in words)
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg: Any = compose("config", overrides=list(words), return_hydra_config=needs_hydra)
    config.check_values(cfg)
    typed.refuse_dead_words(cfg, words)
    for group in CHECKED:
        target = leaves.locate(cfg[group]._target_)
        if is_dataclass(target):
            leaves.check_types(target, settings(cfg[group]), group)


def settings(leaf: DictConfig) -> dict[str, Any]:
    """Without what a page leaves to its reader: a model, a file."""
    plain = OmegaConf.to_container(leaf, resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items() if name != "_target_"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_composes(path):
    for command in commands(path):
        for words in jobs(command):
            check(words)


def test_none_is_overlooked():
    """A page that shows the entry in another way would be asked nothing."""
    for path in FILES:
        shown = [
            line
            for line in path.read_text().splitlines()
            if re.search(r"python scripts/run\.py [-\w]", line)
        ]
        assert len(commands(path)) >= len(shown), path
    assert sum(len(commands(path)) for path in FILES) > 80


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("-m stage=train predictor=markov,mlp predictor.hidden=64,128", "Could not override 'predictor.hidden'"),
        ("stage=train predictor=markov,mlp", "several values without -m"),
        ("stage=evaluate trace=mine source=synthetic source.n_experts=8", "trace=mine is used as it is"),
        ("stage=collect source=esft source.tokens=3", "Could not override 'source.tokens'"),
        ("stage=train train.folds=9", "train.folds=9: must be from 1 to 5"),
        ("stage=collect source.steps=few", "source.steps: expected int, got 'few'"),
        ("-m experiment=quik", "Could not find 'experiment/quik'"),
    ],
)  # fmt: skip
def test_faults_are_found(command, told):
    """By what asks for it: another error would hide that nobody does."""
    with pytest.raises(Exception, match=re.escape(told)):  # Hydra's, OmegaConf's or ours
        for words in jobs(command):
            check(words)


def test_whatever_else_is_named_exists():
    """Files and folders of the project, targets of make, extras of the package."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    places = re.compile(r"(?<![\w./-])(?:prefetch|analysis|configs|scripts|tests|docs)/[\w/.-]+")
    for path in PAGES:
        text = path.read_text()
        lines = [*shell(path), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
        for line in lines:
            assert not (made := re.match(r"make ([\w-]+)", line)) or made[1] in targets, line
            for place in places.findall(line):
                is_named = not re.search(
                    r"NAME|bench-data|last_layer", place
                )  # the reader's own, and another repository's
                assert not is_named or (ROOT / place).exists(), f"{path.name}: {place}"
        for extra in re.findall(r"expert-prefetch\[(\w+)\]", text):
            assert extra in project["optional-dependencies"], f"{path.name}: {extra}"
