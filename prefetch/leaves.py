"""Leaves of the configuration: what a choice of a group names by `_target_`, made from its other keys.

The one place that turns YAML into objects. It knows no group.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefetch.config import CONFIGS, Config, choices
from prefetch.errors import ConfigError, PrefetchError


def with_choice(cfg: Config, group: str, name: str) -> Config:
    """The same configuration with another choice of a group, at its default settings."""
    path = CONFIGS / group / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{group} {name!r}: does not exist; there are {', '.join(choices(group))}"
        )
    return with_leaf(cfg, group, OmegaConf.load(path))


def with_leaf(cfg: Config, group: str, leaf: Any) -> Config:
    whole = typing.cast(
        DictConfig, OmegaConf.create(OmegaConf.to_container(typing.cast(DictConfig, cfg)))
    )
    whole[group] = leaf
    return typing.cast(Config, whole)


def locate(dotted: str) -> Any:
    """The function or class of this name."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"_target_={dotted}: cannot be imported ({error}){hint}") from error


def instantiate(leaf: DictConfig, where: str) -> Any:
    """The object that a leaf describes: its `_target_` called with the leaf's other keys."""
    settings = OmegaConf.to_container(leaf, resolve=True)
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise ConfigError(f"{where}: expected a mapping with _target_, got {settings!r}")
    target = locate(str(settings.pop("_target_")))
    values = {str(name): value for name, value in settings.items()}
    if dataclasses.is_dataclass(target):
        check_types(target, values, where)
    try:
        return target(**values)
    except PrefetchError as error:
        is_told = str(error).startswith(f"{where}.")  # by the name of the setting
        raise type(error)(f"{'' if is_told else f'{where}: '}{error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_types(target: Any, values: dict[str, Any], where: str) -> None:
    """A leaf's keys are its class's fields, with values of their types; whole numbers pass for fractions."""
    hints = typing.get_type_hints(target)
    fields = {item.name: item for item in dataclasses.fields(target) if item.init}
    for name in fields.keys() - values.keys():
        if fields[name].default is fields[name].default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: must be given")
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(
                f"{where}.{name}: does not exist; {where} has {', '.join(sorted(fields))}"
            )
        if value == "???":
            raise ConfigError(f"{where}.{name}: must be given")
        if not _fits(value, hints[name]):
            kind = _words(hints[name])
            raise ConfigError(
                f"{where}.{name}: expected {kind}, got {value!r} ({type(value).__name__})"
            )
        if hints[name] is float and isinstance(value, int):
            values[name] = float(value)


def _words(hint: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return str(hint) if typing.get_args(hint) else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
