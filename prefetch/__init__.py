"""Speculative expert prefetching for Mixture-of-Experts models: collect, analyze, train, evaluate."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`from prefetch import simulate, OffloadedMoE`, named and not imported: nobody else loads what they need."""
    if name == "simulate":
        return importlib.import_module("prefetch.sim.notebook").simulate
    if name == "OffloadedMoE":
        return importlib.import_module("prefetch.engine.offloaded").OffloadedMoE
    raise AttributeError(f"module 'prefetch' has no attribute {name!r}")
