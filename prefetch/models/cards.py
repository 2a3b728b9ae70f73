"""Model cards: a YAML in `configs/model_card` holds what a model's own configuration file says. It opens no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml

from prefetch import plain_yaml
from prefetch.errors import ConfigError, reading
from prefetch.models.architecture import ATTENTION, Architecture, LinearAttention
from prefetch.trace.card import ModelCard

CARDS = Path(__file__).resolve().parents[2] / "configs" / "model_card"
Built = TypeVar("Built")


def load_card(
    name_or_path: str | Path,
    *,
    expert_precision: str | None = None,
    matrix_precision: str | None = None,
) -> ModelCard:
    """The card of a shipped model by name, or of a YAML by path, as published or at a precision."""
    with reading(name_or_path, "a model card"):
        return load_architecture(name_or_path).card(expert_precision, matrix_precision)


def load_architecture(name_or_path: str | Path) -> Architecture:
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CARDS / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no model card {str(name_or_path)!r}; there are {', '.join(card_names())}, "
            "or give the path of a YAML"
        )
    try:
        fields = plain_yaml.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{path.name}: a model card is a mapping of fields; found {type(fields).__name__}"
        )
    return read_architecture({k: v for k, v in fields.items() if k != "_target_"}, path.name)


def card_names() -> list[str]:
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def model_card(**fields: Any) -> ModelCard:
    """What `_target_` names: the card of this configuration, at its published precision."""
    return read_architecture(fields, str(fields.get("name", "model card"))).card()


def read_architecture(fields: Mapping[str, Any], where: str) -> Architecture:
    ready = dict(fields)
    attention = ready.get("attention")
    if isinstance(attention, Mapping):
        kind = str(attention.get("kind"))
        if kind not in ATTENTION:
            found = f"must be among {sorted(ATTENTION)}; found {kind}"
            raise ConfigError(f"{where}: attention.kind {found}")
        rest = {k: v for k, v in attention.items() if k != "kind"}
        ready["attention"] = _build(ATTENTION[kind], rest, f"{where}: attention")
    if isinstance(ready.get("linear_attention"), Mapping):
        ready["linear_attention"] = _build(
            LinearAttention, ready["linear_attention"], f"{where}: linear_attention"
        )
    left_out = ready.get("active_leaves_out", ()) or []
    if isinstance(left_out, list) and all(isinstance(name, str) for name in left_out):
        ready["active_leaves_out"] = tuple(left_out)
    return _build(Architecture, ready, where)


def _build(cls: type[Built], fields: Mapping[str, Any], where: str) -> Built:
    """The dataclass from plain values; an unknown, missing or mistyped field is named."""
    hints = get_type_hints(cls)
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = {field.name for field in known if field.default is dataclasses.MISSING}
    if unknown := sorted(map(str, set(fields) - set(hints))):
        there = ", ".join(sorted(hints))
        raise ConfigError(f"{where}: no field {', '.join(unknown)}; there are {there}")
    if missing := sorted(needed - set(fields)):
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    for name, value in fields.items():
        boolean_for_number = isinstance(value, bool) and hints[name] is not bool
        kind = tuple if get_origin(hints[name]) is tuple else hints[name]
        if boolean_for_number or not isinstance(value, kind):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise ConfigError(f"{where}: {name} must be {expected}; found {value!r}")
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
