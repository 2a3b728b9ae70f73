"""Networks, one event at a time.

L layers, E experts, N hidden units, W of them within, C contexts, U averages, G units of a state, V = 3 G, D width of a
gate's input, Z = N + E, P = C L E, Q and R all that is read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .memory import RouteMemory
from .predictor import Floats, Ids, Predictor, total
from .reading import Arrays

NORM_EPSILON = 1e-5
LARGEST = 80  # of an exponent: single precision holds no more than 88


class Gate(Predictor):
    """Layers of a router or a small net on the gate's input; the most used experts where there is no such input."""

    def _begin(self) -> None:
        self._inputs_LD = np.zeros((self.n_layers, self._plan["axes"]["D"]), np.float32)

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        x_D, width = np.nan_to_num(gate_input).astype(np.float32), self._plan["axes"]["D"]
        if x_D.shape != (width,):
            raise ValueError(f"observe: expected {width} numbers of gate_input, got {x_D.shape}")
        self._inputs_LD[layer] = x_D

    def _scores(self, layer: int) -> Floats:
        own, x_D = self._own, self._inputs_LD[layer - self.horizon]
        if layer < self.horizon or not x_D.any() or not own["is_learnt_L"][layer]:
            return np.array(own["popular_LE"][layer])
        scores_N: Floats = x_D @ own["first_LDN"][layer]
        if "second_LNE" not in own:
            return scores_N
        inner_N = np.maximum(scores_N + own["first_bias_LN"][layer], 0)
        return inner_N @ own["second_LNE"][layer] + own["second_bias_LE"][layer]


class Mlp(Predictor):
    """A network that is told sets of experts, so that its first layer is sums of rows, and what fades is moved on."""

    def _learn(self) -> None:
        self._n = len(self._own["gain_N"])
        self._decay_C1 = np.array(self._plan["decays"], np.float32)[:, None]

    def _begin(self) -> None:
        n_contexts, (n_layers, width) = len(self._decay_C1), self._own["start_LZ"].shape
        self._token_X = np.zeros((1 + n_contexts) * self._n, np.float32)
        self._past_CN = np.zeros((n_contexts, self._n), np.float32)
        self._own_LCZ = np.zeros((n_layers, n_contexts, width), np.float32)

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        row_X, own_CZ = total(self._own["told_LEX"][layer], ids), self._own_LCZ[layer]
        self._token_X += row_X[: len(self._token_X)]
        own_CZ *= self._decay_C1
        own_CZ += row_X[len(self._token_X) :].reshape(own_CZ.shape)

    def _end(self) -> None:
        told_CN = self._token_X[self._n :].reshape(self._past_CN.shape)
        self._past_CN = self._decay_C1 * self._past_CN + told_CN
        self._token_X[:] = 0

    def _scores(self, layer: int) -> Floats:
        own, n = self._own, self._n
        z_Z = own["start_LZ"][layer] + self._own_LCZ[layer].sum(axis=0)
        z_Z[:n] += self._past_CN.sum(axis=0) + self._token_X[:n]
        z_Z += total(own["near_LEZ"][layer], self._nearest(layer))
        return sigmoid(z_Z[n:] + _hidden(own, z_Z[:n]) @ own["out_LNE"][layer])


class MemoryMlp(RouteMemory):
    """A network that is told what route memory says. Its usage and that word have half precision, as when it learnt."""

    def _begin(self) -> None:
        super()._begin()
        self._decay_C1 = np.array(self._plan["decays"], np.float32)[:, None]
        shape = len(self._decay_C1), self.n_layers, self.n_experts
        self._usage_CLE = np.zeros(shape, np.float32)
        self._above_N, self._past_N = (np.zeros_like(self._own["gain_N"]) for _ in range(2))

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        super()._see(layer, ids, gate_input)
        self._above_N += total(self._own["above_LEN"][layer], ids)

    def _end(self) -> None:
        super()._end()
        _fade(self._usage_CLE, self._decay_C1, self._now)
        self._past_N = _half(self._usage_CLE).ravel() @ self._own["context_PN"]
        self._above_N[:] = 0

    def _scores(self, layer: int) -> Floats:
        own, near, least = self._own, self._nearest(layer), self._plan["least_chance"]
        told_4E, sure_2 = self._tell(layer)
        sure_2, told_4E = (sure_2 - own["sure_22"][0]) / own["sure_22"][1], _half(told_4E)
        logs_4E = np.log(told_4E + np.float32(least)) - np.float32(0.5 * math.log(least))
        read_Q = np.concatenate([_half(self._usage_CLE[:, layer]).ravel(), told_4E.ravel()])
        read_R = np.concatenate([read_Q, logs_4E.ravel(), sure_2])
        x_N = self._above_N + self._past_N + own["bias_LN"][layer] + read_R @ own["read_LRN"][layer]
        x_N += total(own["nearest_LEN"][layer], near)
        y_E = own["prior_LE"][layer] + read_Q @ own["skip_LQE"][layer]
        y_E += total(own["nearest_skip_LEE"][layer], near)
        trust_8 = own["trust_L8"][layer] + own["trust_by_sure_L82"][layer] @ sure_2
        y_E += trust_8 @ np.concatenate([told_4E, logs_4E])
        x_N = norm(x_N, own["gain_N"], own["shift_N"])
        x_N = x_N * sigmoid(x_N)
        inner_N = norm(x_N, own["inner_gain_N"], own["inner_shift_N"])
        inner_W = _gelu(inner_N @ own["inner_NW"] + own["inner_bias_W"])
        x_N = x_N + inner_W @ own["outer_WN"] + own["outer_bias_N"]
        return sigmoid(y_E + x_N @ own["out_LNE"][layer])


class Recurrent(Predictor):
    """A network whose gated recurrent unit reads every finished token."""

    def _begin(self) -> None:
        self._units_G = np.zeros(self._own["token_LEG"].shape[2], np.float32)
        self._token_G = np.array(self._own["token_shift_G"])  # of a token that used nobody
        shape = len(self._own["kept_U1"]), self.n_layers, self.n_experts
        self._fading_ULE = np.zeros(shape, np.float32)
        self._begin_token()

    def _begin_token(self) -> None:
        self._above_N = np.zeros_like(self._own["gain_N"])
        self._used_G = np.zeros_like(self._units_G)

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        self._above_N += total(self._own["above_LEN"][layer], ids)
        self._used_G += total(self._own["token_LEG"][layer], ids)

    def _end(self) -> None:
        own = self._own
        self._token_G = norm(self._used_G, own["token_gain_G"], own["token_shift_G"])
        told_3G = np.split(self._token_G @ own["gru_told_GV"] + own["gru_told_bias_V"], 3)
        kept_3G = np.split(self._units_G @ own["gru_kept_GV"] + own["gru_kept_bias_V"], 3)
        reset_G, stays_G = sigmoid(told_3G[0] + kept_3G[0]), sigmoid(told_3G[1] + kept_3G[1])
        fresh_G = np.tanh(told_3G[2] + reset_G * kept_3G[2])
        self._units_G = (1 - stays_G) * fresh_G + stays_G * self._units_G
        _fade(self._fading_ULE, own["kept_U1"], self._now)
        self._begin_token()

    def _used(self, ids: Ids) -> Floats:
        used_E = np.zeros(self.n_experts, np.float32)
        used_E[ids] = 1
        return used_E

    def _scores(self, layer: int) -> Floats:
        own, near_E = self._own, self._used(self._nearest(layer))
        before_E, fading_X = self._used(self._before[layer]), self._fading_ULE[:, layer].ravel()
        state_G = np.concatenate([self._units_G, self._token_G])
        state_G = norm(state_G, own["state_gain_I"], own["state_shift_I"])
        read_R = np.concatenate([near_E, before_E, fading_X, state_G])
        x_N = self._above_N + read_R @ own["read_LRN"][layer] + own["bias_LN"][layer]
        y_E = read_R @ own["skip_LRE"][layer] + own["prior_LE"][layer]
        return sigmoid(y_E + _hidden(own, x_N) @ own["out_LNE"][layer])


def _fade(used_CLE: Floats, kept_C1: Floats, now: list[Ids]) -> None:
    """Averages of who was used: a token more, of all layers."""
    used_CLE *= kept_C1[:, None]
    for layer, ids in enumerate(now):
        used_CLE[:, layer, ids] += 1 - kept_C1


def _half(x: Floats) -> Floats:
    return x.astype(np.float16).astype(np.float32)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(np.minimum(-x, LARGEST)))


def _gelu(x_W: Floats) -> Floats:
    error_W = [math.erf(x) for x in (x_W * math.sqrt(0.5)).tolist()]
    return 0.5 * x_W * (1 + np.array(error_W, np.float32))


def norm(x_N: Floats, gain_N: Floats, shift_N: Floats) -> Floats:
    far_N = x_N - np.add.reduce(x_N) / np.float32(len(x_N))
    scale = 1 / math.sqrt(float(far_N @ far_N) / len(x_N) + NORM_EPSILON)
    return far_N * np.float32(scale) * gain_N + shift_N


def _hidden(own: Arrays, x_N: Floats) -> Floats:
    """Layer norm, ReLU, and one residual block."""
    x_N = np.maximum(norm(x_N, own["gain_N"], own["shift_N"]), 0)
    inner_N = np.maximum(x_N @ own["inner_NN"] + own["inner_bias_N"], 0)
    return x_N + inner_N @ own["outer_NN"] + own["outer_bias_N"]
