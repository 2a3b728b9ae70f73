"""Experts drawn at random: the floor that any guess must clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import ConfigError
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import NOTHING, horizons_of


@dataclass
class Random:
    needs: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = NOTHING
    score: ClassVar[str] = "rank"

    horizons: tuple[int, ...] = (1,)
    seed: int = 0

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if self.seed < 0:
            raise ConfigError(f"seed: must not be negative, got {self.seed}")

    def fit(self, train: Part, validation: Part) -> Self:
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        """Drawn from where a row stands, not from when it was asked: blocks of any size give the same."""
        scores_TLE = np.empty(past.shape, np.float32)
        seed = np.uint64(self.seed * 1_000_003 + past.horizon)
        _draw(past.request_T, past.position_T, seed, scores_TLE)
        return scores_TLE


@njit(cache=True, nogil=True)
def _draw(request_T, position_T, seed, scores_TLE):  # type: ignore[no-untyped-def]
    """SplitMix64 (Steele et al. 2014) of seed, request, position, layer, expert; 24 bits of it."""
    for t in range(scores_TLE.shape[0]):
        row = _mix(_mix(seed + np.uint64(request_T[t])) + np.uint64(position_T[t]))
        for layer in range(scores_TLE.shape[1]):
            here = _mix(row + np.uint64(layer))
            for expert in range(scores_TLE.shape[2]):
                drawn = _mix(here + np.uint64(expert)) >> np.uint64(40)
                scores_TLE[t, layer, expert] = drawn / 16777216.0


@njit(cache=True, nogil=True)
def _mix(x):  # type: ignore[no-untyped-def]
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
