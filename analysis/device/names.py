"""What MoE is called: rules from `configs/moe_names`, and a user's own before them. It reads no profile.

A rule says what a name is (its role), how its inputs are laid out, and which number types it says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefetch import plain_yaml
from prefetch.config import CONFIGS
from prefetch.errors import ConfigError

BUILTIN = CONFIGS / "moe_names" / "builtin.yaml"
ROLES = (
    "layer", "experts", "up", "down", "gemm", "router", "routing", "prepare", "permute", "activation", "combine",
    "dispatch", "collect", "other",
)  # fmt: skip
SECTIONS = ("operations", "modules", "frames", "kernels", "hints")
PLAIN = ("not_hints", "outside", "steps", "tokens", "graph_launch", "types")
AXES = ("tokens", "hidden", "experts", "up", "inner", "top_k", "rows", "width")
SAID = ("weight", "activation", "output", "tile")
KEYS = {"match", "role", "library", "dims", "concrete", "inside", "note", *SAID}


@dataclass(frozen=True)
class Rule:
    pattern: re.Pattern[str]
    role: str
    library: str
    dims: tuple[tuple[str, ...] | None, ...] = ()
    concrete: Mapping[str, int] = field(default_factory=dict, hash=False)
    inside: bool = False
    said: Mapping[str, str] = field(default_factory=dict, hash=False)
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A rule that fits a name, and the number types and the tile that the name says."""

    rule: Rule
    said: Mapping[str, str] = field(hash=False)

    @property
    def role(self) -> str:
        return self.rule.role


class Names:
    """Asked once per distinct name: answers are kept."""

    def __init__(self, rules: Mapping[str, list[Rule]], plain: Mapping[str, Any]) -> None:
        self._rules = rules
        self._kept: dict[tuple[str, str], Found | None] = {}
        self._not_hints = [_pattern(text, "not_hints") for text in plain["not_hints"]]
        self._outside = [_pattern(text, "outside") for text in plain["outside"]]
        self.steps = [_pattern(text, "steps") for text in plain["steps"]]
        self.tokens = [_pattern(text, "tokens") for text in plain["tokens"]]
        self._graphs = [_pattern(text, "graph_launch") for text in plain["graph_launch"]]
        self.types = {
            spelt: name for name, spellings in plain["types"].items() for spelt in spellings
        }
        for one in (one for section in rules.values() for one in section):
            self._check_said(one)

    def _check_said(self, rule: Rule) -> None:
        """A type that nobody knows would be dropped, and another assumed."""
        for name, said in rule.said.items():
            is_right = said.isdigit() if name == "tile" else said in self.types
            if not is_right:
                expected = "a number" if name == "tile" else f"one of {', '.join(self.types)}"
                raise ConfigError(
                    f"diagnose.names: {rule.pattern.pattern!r}: {name}: expected {expected}; found {said!r}"
                )

    def find(self, section: str, name: str) -> Found | None:
        key = section, name
        if key not in self._kept:
            self._kept[key] = self._look(section, name)
        return self._kept[key]

    def _look(self, section: str, name: str) -> Found | None:
        for rule in self._rules[section]:
            if match := rule.pattern.search(name):
                groups = {k: v for k, v in match.groupdict().items() if v is not None}
                return Found(rule, {**rule.said, **groups})
        return None

    def hint(self, name: str) -> bool:
        """Whether a name looks like MoE that no rule knows."""
        if any(pattern.search(name) for pattern in self._not_hints):
            return False
        return self.find("hints", name) is not None

    def is_outside(self, module: str) -> bool:
        """Whether a module of this class is never inside a MoE layer."""
        return any(pattern.search(module) for pattern in self._outside)

    def is_graph_launch(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._graphs)

    def n_steps(self, annotations: Sequence[str]) -> int:
        """Steps that are annotated, by the first pattern that any fits: the others' steps hold these."""
        counts = (sum(bool(step.search(name)) for name in annotations) for step in self.steps)
        return next((n for n in counts if n), 0)

    def tokens_of(self, name: str) -> int | None:
        """Tokens of the step that an annotation names: of prompts and generated ones together."""
        told = self._tokens_by_phase(name)
        return sum(told.values()) or None

    def is_decode(self, name: str) -> bool | None:
        """Whether the annotated step only generates; None where it does not say."""
        told = self._tokens_by_phase(name)
        return None if not told else not told.get("prefill")

    def _tokens_by_phase(self, name: str) -> dict[str, int]:
        matches = (pattern.search(name) for pattern in self.tokens)
        groups = next((match.groupdict() for match in matches if match), {})
        return {phase: int(n) for phase, n in groups.items() if n}

    def type_of(self, spelt: str | None) -> str | None:
        return None if spelt is None else self.types.get(spelt)


def load_names(own: str | Path | None = None) -> Names:
    """The project's rules; those of `own` go before them."""
    tables = [_read(Path(path)) for path in (own, BUILTIN) if path is not None]
    rules = {name: [rule for table in tables for rule in table[0][name]] for name in SECTIONS}
    plain: dict[str, Any] = {
        name: [text for table in tables for text in table[1].get(name, [])]
        for name in PLAIN
        if name != "types"
    }
    types: dict[str, list[str]] = {}
    builtin = tables[-1][1]["types"]
    for _, given in tables:
        if unknown := sorted(set(given.get("types", {})) - set(builtin)):
            raise ConfigError(
                f"{own}: types: expected some of {', '.join(builtin)}; found {unknown}"
            )
        for name, spellings in given.get("types", {}).items():
            types.setdefault(name, []).extend(spellings)
    return Names(rules, {**plain, "types": types})


def _read(path: Path) -> tuple[dict[str, list[Rule]], dict[str, Any]]:
    try:
        table = plain_yaml.load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"diagnose.names={path}: cannot be read as YAML ({told})") from error
    known = (*SECTIONS, *PLAIN)
    if not isinstance(table, dict) or (unknown := sorted(set(table) - set(known))):
        found = table if not isinstance(table, dict) else unknown
        raise ConfigError(
            f"{path}: a table of names has the sections {', '.join(known)}; found {found}"
        )
    rules = {
        name: [_rule(row, f"{path}: {name}[{i}]") for i, row in enumerate(_rows(table, name, path))]
        for name in SECTIONS
    }
    plain = {name: _listed(table[name], f"{path}: {name}") for name in PLAIN if name in table}
    return rules, plain


def _rows(table: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    rows = table.get(name) or []
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: {name}: expected a list of rules, found {rows!r}")
    return rows


def _listed(value: Any, where: str) -> Any:
    """A text, several, or (types) several under each of several names."""
    if where.endswith(": types"):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected {{type: [how it is spelt]}}, found {value!r}")
        return {str(name): _listed(spelt, f"{where}.{name}") for name, spelt in value.items()}
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where}: expected a text or a list of texts, found {value!r}")
    return texts


def _rule(row: Any, where: str) -> Rule:
    if not isinstance(row, dict) or "match" not in row or (unknown := sorted(set(row) - KEYS)):
        found = row if not isinstance(row, dict) or "match" not in row else unknown
        raise ConfigError(f"{where}: a rule needs match and may have {sorted(KEYS)}; found {found}")
    role = row.get("role", "other")
    if role not in ROLES:
        raise ConfigError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    return Rule(
        pattern=_pattern(row["match"], where),
        role=role,
        library=str(row.get("library", "")),
        dims=_dims(row, where),
        concrete=_concrete(row, where),
        inside=bool(row.get("inside", False)),
        said={name: str(row[name]) for name in SAID if name in row},
        note=str(row.get("note", "")),
    )


def _dims(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...] | None, ...]:
    dims = row.get("dims") or []
    if not isinstance(dims, list) or not all(axes is None or _are_axes(axes) for axes in dims):
        raise ConfigError(
            f"{where}: dims: expected for each input null or a list of {', '.join(AXES)}, found {dims!r}"
        )
    return tuple(None if axes is None else tuple(axes) for axes in dims)


def _are_axes(axes: Any) -> bool:
    return isinstance(axes, list) and bool(axes) and set(map(str, axes)) <= set(AXES)


def _concrete(row: Mapping[str, Any], where: str) -> dict[str, int]:
    told = row.get("concrete") or {}
    is_right = isinstance(told, dict) and all(
        axis in AXES and type(place) is int and place >= 0 for axis, place in told.items()
    )
    if not is_right:
        raise ConfigError(
            f"{where}: concrete: expected {{axis: place of the input}}, found {told!r}"
        )
    return dict(told)


def _pattern(text: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{where}: {text!r} is no regular expression ({error})") from error
