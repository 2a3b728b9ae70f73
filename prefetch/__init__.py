"""Speculative expert prefetching for Mixture-of-Experts models: collect, analyze, train, evaluate."""

__version__ = "0.1.0"
