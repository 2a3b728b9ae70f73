"""Predictors that look up what was counted. E experts, F places of known experts, R stored requests, Q = R + 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from .predictor import Floats, Ids, Predictor, total


class Popularity(Predictor):
    def _scores(self, layer: int) -> Floats:
        return np.array(self._own["chance_LE"][layer])


class PreviousToken(Predictor):
    def _scores(self, layer: int) -> Floats:
        scores_E = np.array(self._own["chance_LE"][layer])
        scores_E[self._before[layer]] += 2  # a chance is at most 1
        return scores_E


class Markov(Predictor):
    def _scores(self, layer: int) -> Floats:
        known = self._nearest(layer) if layer >= self.horizon else self._before[layer]
        if not len(known):
            return np.array(self._own["chance_LE"][layer])
        return total(self._own["rows_LEE"][layer], known)


class Markov2(Predictor):
    def _scores(self, layer: int) -> Floats:
        prior_E, tiny = self._own["prior_LE"][layer], np.float32(self._plan["tiny"])
        scores_E = np.array(prior_E)
        told = ((self._nearest(layer), "above_LEE"), (self._before[layer], "before_LEE"))
        for known, rows in told:
            if len(known):
                mean_E = total(self._own[rows][layer], known) / np.float32(self.top_k)
                scores_E += np.log(mean_E + tiny) - prior_E
        return scores_E


class Linear(Predictor):
    def _scores(self, layer: int) -> Floats:
        depth, edge = self._plan["depth"], np.float32(self._plan["edge"])
        known = [*(self._nearest(layer, back) for back in range(depth)), self._before[layer]]
        places = np.concatenate([ids + i * self.n_experts for i, ids in enumerate(known)])
        x_E = self._own["chance_LE"][layer] + total(self._own["rows_LFE"][layer], places)
        low_E = edge / (2 - np.minimum(x_E, edge) / edge)  # the ends are bent into 0..1
        high_E = 1 - edge / (2 - (1 - np.maximum(x_E, 1 - edge)) / edge)
        return np.where(x_E < edge, low_E, np.where(x_E > 1 - edge, high_E, x_E))


class ActivationMatrix(Predictor):
    """The training request whose counts are most like those of this one: mean cosine of their layers' rows."""

    def _begin(self) -> None:
        n_layers, _, n_stored = self._own["unit_LER"].shape
        self._counts_LE = np.zeros((n_layers, self.n_experts))
        self._dot_LR = np.zeros((n_layers, n_stored))
        self._cosine_LR = np.zeros((n_layers, n_stored))

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        self._counts_LE[layer, ids] += 1
        self._dot_LR[layer] += self._own["unit_LER"][layer, ids].sum(axis=0)
        length = np.sqrt((self._counts_LE[layer] ** 2).sum())
        if length > 0:
            self._cosine_LR[layer] = self._dot_LR[layer] / length

    def _scores(self, layer: int) -> Floats:
        first = 0 if self._plan["compares_all"] else len(self._now)
        alike_R, tie = self._cosine_LR[first:].sum(axis=0), self._plan["tie"]
        best = self._plan["fallback"]
        if alike_R.max() > tie:
            best = int(np.argmax(alike_R >= alike_R.max() - tie))  # the first of equally alike ones
        return np.array(self._own["share_QLE"][best, layer] * self._own["decay_L"][layer])
