"""Route memory: a token goes on like the tokens that routed alike so far.

L layers, E experts, K choices, M remembered tokens of the training requests, S earlier tokens of the request, X any of
these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .predictor import Floats, Ids, Predictor

Weights = NDArray[np.float64]


class RouteMemory(Predictor):
    """Who routed alike so far: earlier tokens of the request, and remembered tokens of the training requests."""

    def _learn(self) -> None:
        ids_MLK = self._ids_MLK = self._own["ids_MLK"].astype(np.intp)
        row = self.n_experts + 1  # the last one is nobody
        key_X = (ids_MLK + row * np.arange(self.n_layers)[:, None]).ravel()
        users_X = np.argsort(key_X, kind="stable") // (self.n_layers * self.top_k)
        lengths = np.bincount(key_X, minlength=self.n_layers * row)
        self._users_of = np.split(users_X.astype(np.int32), np.cumsum(lengths)[:-1])
        self._begins_M = self._own["goes_on_M"] == 0
        shape = self.n_layers, int(self._plan["window"]), self.top_k
        self._ids_LSK = np.full(shape, self.n_experts, np.intp)

    def _begin(self) -> None:
        self._alike_M = np.zeros(len(self._ids_MLK), np.float32)
        self._alike_S = np.zeros(self._ids_LSK.shape[1], np.float32)
        self._n_tokens = self._n_kept = 0
        self._found: Ids | None = None

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        """Everyone who used these experts here becomes more alike."""
        self._found = None
        gain = np.float32(self._plan["decay"] ** -layer)
        for expert in ids.tolist():
            self._alike_M[self._users_of[layer * (self.n_experts + 1) + expert]] += gain
        is_chosen_E = np.zeros(self.n_experts + 1, np.float32)
        is_chosen_E[ids] = 1
        shared_S = is_chosen_E[self._ids_LSK[layer, : self._n_kept]].sum(axis=1)
        self._alike_S[: self._n_kept] += gain * shared_S

    def _end(self) -> None:
        """The token is remembered, and what was alike passes on in part to who comes next."""
        self._found = None
        plan, n, window = self._plan, self._n_tokens, len(self._alike_S)
        passed = np.float32(plan["carry"] * plan["decay"] ** (self.n_layers - 1))
        self._alike_M = np.roll(self._alike_M * passed, 1)
        self._alike_M[self._begins_M] = 0
        place, moved_S = n % window, np.roll(self._alike_S * passed, 1)
        newest = moved_S[place] if n else 0
        moved_S[(n + 1) % window if n >= window else 0] = 0  # nobody stands before the oldest
        moved_S[place] = newest
        self._ids_LSK[:, place] = self.n_experts
        for layer, ids in enumerate(self._now):
            self._ids_LSK[layer, place, : len(ids)] = ids
        self._alike_S, self._n_tokens, self._n_kept = moved_S, n + 1, min(n + 1, window)

    def _scores(self, layer: int) -> Floats:
        (inside, outside, weight), prior = self._own["mix_3"].tolist(), self._plan["prior"]
        scale, total = self._scale(), prior
        scores_E = prior * self._own["chance_LE"][layer].astype(float)
        if self._n_kept:
            scores_E += self._inside(layer, inside * scale)
            total += 1
        if len(self._alike_M) and weight > 0:
            scores_E += weight * self._outside(layer, outside * scale, self._near())
            total += weight
        return (scores_E / total).astype(np.float32)

    def _scale(self) -> float:
        """What is alike grows by 1 / decay a layer."""
        return float(self._plan["decay"] ** max(0, len(self._now) - 1))

    def _inside(self, layer: int, sharp: float) -> Weights:
        """What earlier tokens of the request say, the most alike with the most weight."""
        return self._kept_votes(layer, _weights(sharp, self._alike_S[: self._n_kept]))

    def _outside(self, layer: int, sharp: float, near: Ids) -> Weights:
        """What remembered tokens say."""
        return self._votes(self._ids_MLK[near, layer], _weights(sharp, self._alike_M[near]))

    def _kept_votes(self, layer: int, weight_S: NDArray[Any]) -> Weights:
        loud = np.flatnonzero(weight_S > self._plan["least_weight"])
        return self._votes(self._ids_LSK[layer, loud], weight_S[loud])

    def _votes(self, ids_XK: Ids, weight_X: NDArray[Any]) -> Weights:
        weights = np.repeat(weight_X, ids_XK.shape[1])
        votes_E: Weights = np.bincount(ids_XK.ravel(), weights, self.n_experts + 1)[:-1]  # type: ignore[assignment]
        return votes_E

    def _near(self) -> Ids:
        """The most alike remembered tokens: of several layers that are asked about together the same."""
        if self._found is None:
            self._found = self._most_alike()
        return self._found

    def _most_alike(self) -> Ids:
        """Of those as alike as the last of them, the first ones."""
        most, alike_M = self._plan["nearest"], self._alike_M
        if len(alike_M) <= most:
            return np.arange(len(alike_M))
        least = np.partition(alike_M, -most)[-most]
        found = np.flatnonzero(alike_M >= least)
        if not (alike_M[found[most:]] > least).any():
            return found[:most]
        return self._walked(most)  # first ones gave up their places: only a walk tells which

    def _walked(self, most: int) -> Ids:
        """From the first token to the last: whoever is more alike takes the place of the least alike."""
        near, who = self._alike_M[:most].tolist(), list(range(most))
        least = near.index(min(near))
        first = most
        while first < len(self._alike_M):  # each time as many as before: few of them take a place
            alike_X = self._alike_M[first : 2 * first]
            for m in np.flatnonzero(alike_X > near[least]).tolist():
                if alike_X[m] > near[least]:
                    near[least], who[least] = float(alike_X[m]), first + m
                    least = near.index(min(near))
            first *= 2
        return np.array(who)

    def _tell(self, layer: int) -> tuple[Floats, Floats]:
        """[4, E] what the request, its share of both, the remembered, and both say; [2] how alike the nearest are."""
        told_4E, sure_2, scale = np.zeros((4, self.n_experts)), np.zeros(2), self._scale()
        sharp_in, sharp_out, sharp_both = (scale * sharp for sharp in self._plan["sharp"])
        n, near = self._n_kept, self._near()
        both_X = np.concatenate([self._alike_S[:n], self._alike_M[near]])
        if n:
            told_4E[0], sure_2[0] = self._inside(layer, sharp_in), scale * both_X[:n].max()
        if len(near):
            told_4E[2], sure_2[1] = self._outside(layer, sharp_out, near), scale * both_X[n:].max()
        if len(both_X):
            weight_X = _weights(sharp_both, both_X)
            told_4E[1] = self._kept_votes(layer, weight_X[:n])
            told_4E[3] = told_4E[1] + self._votes(self._ids_MLK[near, layer], weight_X[n:])
        return told_4E.astype(np.float32), sure_2.astype(np.float32)


def _weights(sharp: float, alike_X: Floats) -> Weights:
    """Summing to one, the most alike with the most."""
    weight_X = np.exp(sharp * (alike_X - alike_X.max()).astype(float))
    return weight_X / weight_X.sum()
