"""What was asked of a table, checked as it is written: before a trace is made, or a predictor is fitted.

It knows no trace: what a number means for a model is said where the model is known.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.models.cards import load_architecture
from prefetch.sim.clock import check_clock
from prefetch.sim.engines.machine import ADMITS, MISSES
from prefetch.sim.engines.pool import ATOMIC, OVERSHOOT
from prefetch.sim.memory import SCOPES, bytes_of, check_written
from prefetch.sim.tables.prior import check_prior

SEMANTICS = {"atomic": ATOMIC, "overshoot": OVERSHOOT}
CHOICES = {
    "semantics": tuple(SEMANTICS),
    "requests": ("test", "all"),
    "admit": ADMITS,
    "misses": MISSES,
    "scope": SCOPES,
}


def check_asked(cfg: Config, predictors: Sequence[str]) -> None:
    told = cfg.simulator
    for name, choices in CHOICES.items():
        if (value := getattr(told, name)) not in choices:
            raise ConfigError(f"simulator.{name}={value}: expected one of {', '.join(choices)}")
    _check_sizes(cfg)
    if cfg.train.test_trace is not None:
        raise ConfigError(
            f"train.test_trace={cfg.train.test_trace}: guesses would be about that trace, and this one is "
            "replayed; leave it out, or replay that trace with trace=FOLDER"
        )
    check_prior(told)
    check_clock(cfg)
    if told.requests == "all" and any(name != "none" for name in predictors):
        raise ConfigError(
            "simulator.requests=all: predictors are fitted on some of them; pass predictor=none, "
            "or simulator.requests=test"
        )


def _check_sizes(cfg: Config) -> None:
    told = cfg.simulator
    if cfg.memory is not None:
        bytes_of(cfg.memory)
    for cache in (*(cfg.evaluate.capacities or ()), told.cache, told.host_cache):
        if cache is not None:
            check_written(cache)
    if told.model_card is not None:
        load_architecture(told.model_card)
