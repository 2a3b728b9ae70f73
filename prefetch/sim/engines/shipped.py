"""The policies that come with the project: those with a key share a compiled timed engine, those with a state another.

An engine takes half a minute to compile, so that a table of all policies would wait for many. It knows no engine.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from prefetch.sim import policies
from prefetch.sim.policy import KeyRules, Rules


@cache
def kinds(is_keyed: bool) -> tuple[Rules, ...]:
    """Their rules, each once, in the order of their modules' names."""
    found = dict[Rules, None]()
    for module in pkgutil.iter_modules(policies.__path__):
        name = f"{policies.__name__}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            rules = getattr(value, "rules", None)
            if isinstance(value, type) and value.__module__ == name and isinstance(rules, Rules):
                found[rules] = None
    return tuple(rules for rules in found if isinstance(rules, KeyRules) == is_keyed)


def kind_of(rules: Rules) -> int:
    """Its place among those that share its engine; 0 of a policy of one's own."""
    own = kinds(isinstance(rules, KeyRules))
    return own.index(rules) if rules in own else 0
