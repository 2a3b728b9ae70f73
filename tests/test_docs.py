"""What the pages say can be typed, opened and imported exists.

That every `stage.option` is in the schema is asked in test_config, that every command composes in test_commands; the
README's commands run in test_readme, Python examples in test_snippets; the tables of docs/formats.md are compared in
test_formats. Here: links, choices, options of the choices, values, code.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

import analysis
from prefetch import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GROUPS = (
    "stage", "source", "predictor", "policy", "hardware", "tracker", "cluster", "experiment",
)  # fmt: skip
LEAVES = tuple(group for group in GROUPS if group not in ("stage", "experiment"))
LISTS = {  # options whose values are choices of a group, or names of model cards
    "evaluate.policies": "policy", "evaluate.predictors": "predictor", "validate.policies": "policy",
    "advise.policies": "policy", "advise.predictors": "predictor", "predictor.members": "predictor",
    "simulator.model_card": "model_card", "source.model_card": "model_card",
    "diagnose.model_card": "model_card", "validate.model_cards": "model_card",
}  # fmt: skip
ELSEWHERE = {"own"}  # of validate.model_cards: no card
SUFFIXES = {"json", "safetensors", "yaml", "py", "md", "csv"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
WORD = re.compile(r"(?<![\w./\"-])([a-z_]+(?:\.[a-z_0-9]+)*=(?:\[[^\]]*\]+|[^\s;]*))")
NAMED = re.compile(rf"(?<![\w./\"-])({'|'.join(LEAVES)})\.([a-z_]+)(?![\w(])")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|\.\.\.|\$")
OURS = {"last_layer"}  # what a page shows how to add


@cache
def text(path: Path) -> str:
    return path.read_text()


def fences(path: Path, *kinds: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text(path)) if kind in kinds]


def typed(path: Path) -> list[str]:
    """Code spans of the prose, and the lines of what a shell is given, as one line each."""
    spans = SPAN.findall(FENCE.sub("", text(path)))
    blocks = [block.replace("\\\n", " ") for block in fences(path, "bash", "text", "")]
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    variables = [shlex.split(line)[0] for line in lines if re.match(r'[A-Z]+="', line)]
    commands = [line for line in lines if "scripts/run.py" in line]
    return [*spans, *commands, *(line.partition("=")[2] for line in variables)]


def words(line: str) -> Iterator[Override]:
    """Overrides that can be read as such; a placeholder says nothing."""
    parser = OverridesParser.create()
    for word in shlex.split(line) if "run.py" in line or "'" in line else WORD.findall(line):
        word = word.rstrip(",.:")
        if word.endswith("=") or PLACEHOLDER.search(word) or "(" in word:
            continue
        key = word.partition("=")[0]
        if key in GROUPS or key.partition(".")[0] in (*LEAVES, *blocks()):
            yield parser.parse_override(word)


def values(override: Override) -> list[Any]:
    """Every value of a sweep; what stands alone, alone."""
    if not override.is_sweep_override():
        return [override.value()]
    return [yaml.safe_load(value) for value in override.sweep_string_iterator()]


@cache
def blocks() -> dict[str, DictConfig]:
    """The typed blocks of the root: analyze, train, simulator, ..."""
    return {
        one.name: OmegaConf.structured(one.default_factory)
        for one in fields(config.Config)
        if is_dataclass(one.default_factory)
    }


@cache
def leaves(group: str) -> dict[str, dict[str, Any]]:
    paths = (config.CONFIGS / group).glob("*.yaml")
    return {path.stem: yaml.safe_load(path.read_text()) for path in paths}


def has(leaf: dict[str, Any], key: str) -> bool:
    """Is there such a setting? What is null in the file may hold settings of its own."""
    head, _, rest = key.partition(".")
    if not rest or head not in leaf or leaf[head] is None:
        return head in leaf
    return isinstance(leaf[head], dict) and has(leaf[head], rest)


def names_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(name) for name in value]
    return [name for one in value for name in names_in(one)] if isinstance(value, list) else [value]


def wrong(line: str) -> Iterator[str]:
    """What of a line nobody could type."""
    told = list(words(line))
    chosen = {one.key_or_group: values(one) for one in told if one.key_or_group in GROUPS}
    for group, names in chosen.items():
        known = {*config.choices(group), *OURS}
        yield from (f"{group}={name}" for name in names if name not in known)
    for one in told:
        key = one.get_key_element()
        head, _, rest = key.partition(".")
        if rest and head in LEAVES:
            among = chosen.get(head) or list(leaves(head))
            if not any(has(leaves(head).get(str(name), {}), rest) for name in among):
                yield f"{key}: no setting of {head}={among}"
        elif rest and head in blocks():
            yield from (f"{key}={value}" for value in values(one) if not takes(head, rest, value))
        if key in LISTS:
            known = {*config.choices(LISTS[key]), *ELSEWHERE}
            named = [name for value in values(one) if value for name in names_in(value)]
            yield from (f"{key}: {name}" for name in named if not is_known(name, known))


def is_known(name: Any, known: set[str]) -> bool:
    return name in known or (str(name).endswith(".yaml") and (ROOT / str(name)).exists())


def takes(block: str, option: str, value: Any) -> bool:
    if option not in blocks()[block]:
        return False
    try:
        OmegaConf.merge(blocks()[block], {option: value})
    except Exception:  # OmegaConf's own, of several kinds
        return False
    return True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_whatever_a_page_says_to_type_can_be_typed(path):
    assert not [fault for line in typed(path) for fault in wrong(line)]


def test_faults_are_found():
    """Each kind of them; so that a page that passes says something."""
    for line in (
        "stage=evalute", "predictor=markov,mpl", "hardware=rtx9090", "simulator.chunks=3", "train.folds=five",
        "evaluate.policies=[lru,lfuu]", "source=esft source.tokens=3", "source.nothing=1", "simulator.model_card=qwen",
        "experiment=quik", "cluster=dask cluster.worker=3", "predictor.members=[linear,{mlpp:{hidden:64}}]",
    ):  # fmt: skip
        assert list(wrong(f"python scripts/run.py {line}")), line
    sound = "python scripts/run.py -m stage=train predictor=markov2,mlp cluster.slurm.queue=cpu train.folds=1,5"
    assert not list(wrong(sound)) and len(list(words(sound))) == 4
    assert sum(len(list(words(line))) for path in PAGES for line in typed(path)) > 300


def test_every_setting_of_a_choice_that_a_page_names_exists():
    for path in PAGES:
        for span in SPAN.findall(FENCE.sub("", text(path))):
            for group, name in NAMED.findall(span):
                found = name in SUFFIXES or any(name in leaf for leaf in leaves(group).values())
                assert found, f"{path.name}: {group}.{name}"


def slugs(path: Path) -> set[str]:
    """Headings as a link names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text(path))):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not heading or heading in slugs(there), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_is_code_and_what_it_imports_of_the_project_is_there(path):
    for block in fences(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                package = node.module.partition(".")[0]
                if package in ("prefetch", "analysis"):
                    assert {name.name for name in node.names} <= offered(node.module), block
    for block in fences(path, "json"):
        json.loads(block)
    for block in fences(path, "yaml"):
        yaml.safe_load(block)


@cache
def offered(module: str) -> set[str]:
    """What a module defines or imports, without importing it; packages offer by name what they load when asked."""
    if module == "analysis":
        return set(analysis.__all__)
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    found = set[str]()
    if path.name == "__init__.py":
        found = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            inside = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            found |= {name.id for name in inside if isinstance(name.ctx, ast.Store)}
    return found
