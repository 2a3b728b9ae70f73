"""What routing says, for notebooks: every analysis is a function from a trace (or its folder) to a data frame."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "balance": ("balance", "expert_load"),
    "cache": ("cache_curve",),
    "coactivation": ("coactivation", "expert_clusters"),
    "domains": ("domain_accuracy", "domain_information", "domain_usage"),
    "families": ("expert_families",),
    "gates": ("gate_distances", "gate_lookahead"),
    "locality": ("burstiness", "drift", "working_sets"),
    "paths": ("sample_paths",),
    "recall": ("recall_from_counts",),
    "router": ("router_statistics",),
    "statistics": ("statistics",),
    "transfer": ("domain_transfer",),
    "transitions": ("next_tokens", "transitions"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imported when first asked for: a stage need not pay for the libraries of another."""
    if name not in _MODULES:
        raise AttributeError(f"module analysis has no {name}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"analysis.routing.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
