"""Several exported predictors as one. E experts, A members."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .networks import sigmoid
from .predictor import Floats, Ids, Predictor


class Ensemble(Predictor):
    """Several predictors: their log-odds are added, the first layers of a token with weights of their own."""

    members: dict[str, Predictor]

    def _begin(self) -> None:
        for member in self.members.values():
            member.start()

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        for member in self.members.values():
            member.observe(layer, ids, gate_input)

    def _scores(self, layer: int) -> Floats:
        place = int(layer >= self.horizon)
        odds_E = np.full(self.n_experts, self._own["bias_2"][place])
        for name, weight in zip(self.members, self._own["weight_2A"][place].tolist(), strict=True):
            if weight:
                odds_E += weight * self._odds(self.members[name].guess(layer), name)
        return sigmoid(odds_E).astype(np.float32)

    def _odds(self, scores_E: Floats, name: str) -> NDArray[np.float64]:
        floor, score = self._plan["floor"], self._plan["scores"][name]
        if score == "logit":
            return np.clip(scores_E.astype(float), -self._plan["farthest"], self._plan["farthest"])
        if score == "probability":
            chance_E = np.clip(scores_E.astype(float), 0, 1)
            return np.log((chance_E + floor) / (1 - chance_E + floor))
        odds_E, rank_E = np.zeros(self.n_experts), np.arange(self.n_experts) + 0.5
        odds_E[np.argsort(-scores_E, kind="stable")] = np.log((self.n_experts - rank_E) / rank_E)
        return odds_E
