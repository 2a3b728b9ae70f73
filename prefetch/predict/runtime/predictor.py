"""What all exported predictors have in common: the order of calls, and what was chosen so far. It knows none by name.

L layers, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reading import Arrays, Told

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]


class Predictor:
    """What all have in common: the order of calls, and what was chosen at this token and the one before."""

    def __init__(self, told: Told, plan: Told, arrays: Arrays, horizon: int) -> None:
        self.told = told  # all that the file says of it
        self.horizon, self.horizons = horizon, tuple(told["horizons"])
        self.n_layers, self.n_experts = int(told["n_layers"]), int(told["n_experts"])
        self.top_k = int(told["top_k"])
        self.needs_gate_input = "gate_inputs" in told["needs"]
        self._plan, self._own = plan, arrays
        self._now: list[Ids] = []
        self._before: list[Ids] = []
        self._learn()

    def start(self) -> None:
        """A request begins: nothing of another one is known."""
        self._now, self._before = [], [np.zeros(0, np.intp)] * self.n_layers
        self._begin()

    def ahead(self) -> range:
        """The layers that can be asked about now: as a token begins its first ones, then one after every layer."""
        known = len(self._now)
        first = known + self.horizon - 1 if known else 0
        return range(first, min(known + self.horizon, self.n_layers))

    def observe(
        self, layer: int, ids: Sequence[int] | NDArray[Any], gate_input: Any = None
    ) -> None:
        """The router chose these experts at this layer; none, if it did not run. The last layer ends the token."""
        if layer != len(self._now):
            raise ValueError(
                f"observe: expected layer {len(self._now)}, got {layer}; all {self.n_layers} layers of a token come in "
                "order, and start() begins a request"
            )
        if self.needs_gate_input and gate_input is None:
            raise ValueError("observe: this predictor reads the gate's input; pass gate_input")
        chosen = self._checked(ids)
        self._see(layer, chosen, gate_input)
        self._now.append(chosen)
        if len(self._now) == self.n_layers:
            self._end()
            self._before, self._now = self._now, []

    def guess(self, layer: int) -> Floats:
        """[E]: a score of every expert of this layer, one of `ahead()`; `told["score"]` says what it means."""
        if layer not in self.ahead():
            can = ", ".join(map(str, self.ahead())) or "none until the token ends"
            raise ValueError(
                f"guess: layer {layer} cannot be asked about at horizon {self.horizon} after {len(self._now)} layers "
                f"of the token; these can: {can}"
            )
        return self._scores(layer)

    def best(self, layer: int, width: int) -> Ids:
        """The ids of the best `width` experts, best first; ties go to the smaller id."""
        if not 1 <= width <= self.n_experts:
            raise ValueError(f"best: width must be from 1 to {self.n_experts}, got {width}")
        return np.argsort(-self.guess(layer), kind="stable")[:width]

    def _checked(self, ids: Sequence[int] | NDArray[Any]) -> Ids:
        given = np.asarray(ids)
        plain: list[int] = given.tolist()
        is_whole = given.ndim == 1 and (given.dtype.kind in "iu" or not plain)
        if not is_whole or len(plain) > self.top_k or len(set(plain)) < len(plain):
            raise ValueError(
                f"observe: expected at most {self.top_k} different expert ids, got {ids!r}"
            )
        if plain and not 0 <= min(plain) <= max(plain) < self.n_experts:
            raise ValueError(
                f"observe: expected expert ids from 0 to {self.n_experts - 1}, got {ids!r}"
            )
        return given.astype(np.intp)

    def _nearest(self, layer: int, back: int = 0) -> Ids:
        """This token's choices at layer - horizon - back; nobody where there is no such layer."""
        known = layer - self.horizon - back
        return self._now[known] if known >= 0 else np.zeros(0, np.intp)

    def _learn(self) -> None: ...
    def _begin(self) -> None: ...
    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None: ...
    def _end(self) -> None: ...
    def _scores(self, layer: int) -> Floats:
        raise NotImplementedError


def total(rows_EX: Floats, ids: Ids) -> Floats:
    """Of the rows of these experts."""
    return np.add.reduce(rows_EX[ids], axis=0)
