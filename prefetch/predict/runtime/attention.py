"""The transformer, one event at a time: attention to alike tokens of the request, and along the layers of a token.

L layers, E experts, N hidden units, S earlier tokens of the request, the newest first, F heads over tokens, J = 2 L
layers of a token and of the one before, H heads along layers, A = 3 N, U what is known of recent tokens, Q and R all
that is read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .networks import norm, sigmoid
from .predictor import Floats, Ids, Predictor, total


class Transformer(Predictor):
    def _begin(self) -> None:
        shape = 0, self.n_layers, self.n_experts
        self._used_SLE, self._key_SLE = (np.zeros(shape, np.float32) for _ in range(2))
        self._begin_token(np.zeros((self.n_layers, 0), np.float32))

    def _begin_token(self, shared_LS: Floats) -> None:
        """`shared` is what the token before had in common with those before it."""
        own, n = self._own, len(self._used_SLE)
        self._before_LS, self._shared_LS = (
            np.zeros((self.n_layers, n), np.float32) for _ in range(2)
        )
        self._before_LS[:, : shared_LS.shape[1]] = shared_LS[:, :n]
        self._used_LE, self._key_LE = (
            np.zeros(own["chance_LE"].shape, np.float32) for _ in range(2)
        )
        self._above_LN = np.zeros_like(own["bias_LN"])
        self._back_S = np.arange(1, n + 1, dtype=np.float32)
        kept_V1 = own["kept_V"][:, None]
        fades_US = np.concatenate(
            [self._back_S[None] == 1, (1 - kept_V1) * kept_V1 ** (self._back_S - 1)]
        )
        self._recent_ULE = np.tensordot(fades_US.astype(np.float32), self._used_SLE, 1)
        self._everywhere_N = self._recent_ULE.ravel() @ own["everywhere_PN"]
        self._layers: list[tuple[Floats, ...]] = []  # of this token, as far as anybody asked

    def _see(self, layer: int, ids: Ids, gate_input: Any) -> None:
        self._used_LE[layer, ids] = 1
        self._key_LE[layer] = total(self._own["metric_LEE"][layer], ids)
        self._shared_LS[layer] = self._key_SLE[:, layer] @ self._key_LE[layer]
        above_N = self._above_LN[layer - 1] if layer else np.float32(0)
        self._above_LN[layer] = above_N + total(self._own["above_LEN"][layer], ids)

    def _end(self) -> None:
        window = self._plan["window"]
        self._used_SLE = np.concatenate([self._used_LE[None], self._used_SLE])[:window]
        self._key_SLE = np.concatenate([self._key_LE[None], self._key_SLE])[:window]
        self._begin_token(self._shared_LS)

    def _scores(self, layer: int) -> Floats:
        own = self._own
        while len(self._layers) <= layer:
            self._layers.append(self._read(len(self._layers)))
        x_N, y_E, query_HX = self._layers[layer][:3]
        keys_LHX, values_LHX = (
            np.stack([told[i] for told in self._layers[: layer + 1]]) for i in (3, 4)
        )
        logits_HL = np.einsum("hx,lhx->hl", query_HX, keys_LHX) / np.float32(
            math.sqrt(query_HX.shape[1])
        )
        weight_HL = _softmax(logits_HL + own["layer_bias_HLL"][:, layer, : layer + 1])
        mixed_N = np.einsum("hl,lhx->hx", weight_HL, values_LHX).ravel()
        x_N = x_N + mixed_N @ own["mixed_NN"] + own["mixed_bias_N"]
        inner_N = norm(x_N, own["inner_gain_N"], own["inner_shift_N"])
        inner_W = np.maximum(inner_N @ own["inner_NW"] + own["inner_bias_W"], 0)
        x_N = x_N + inner_W @ own["outer_WN"] + own["outer_bias_N"]
        return sigmoid(y_E + x_N @ own["out_LNE"][layer])

    def _read(self, layer: int) -> tuple[Floats, ...]:
        """Hidden units, what goes straight to the scores, query, key and value: of what was known for this layer."""
        own, known = self._own, max(0, layer - self.horizon + 1)
        words_FE, sure_F = self._alike_tokens(layer, known)
        near_E, least = np.zeros(self.n_experts, np.float32), self._plan["least_chance"]
        near_E[self._nearest(layer)] = 1
        logs_FE = np.log(words_FE + np.float32(least))
        read_Q = np.concatenate([near_E, self._recent_ULE[:, layer].ravel(), words_FE.ravel()])
        centred_X = logs_FE.ravel() - np.float32(0.5 * math.log(least))
        x_N = np.concatenate([read_Q, sure_F, centred_X]) @ own["read_LRN"][layer]
        x_N += own["bias_LN"][layer] + self._everywhere_N
        if known:
            x_N += self._above_LN[known - 1]
        trust_F = own["trust_LF"][layer] + sure_F @ own["trust_by_sure_LFF"][layer]
        y_E = own["prior_LE"][layer] + read_Q @ own["skip_LQE"][layer] + trust_F @ logs_FE
        x_N = np.maximum(norm(x_N, own["gain_N"], own["shift_N"]), 0)
        three_A = x_N @ own["three_NA"] + own["three_bias_A"]
        return x_N, y_E, *three_A.reshape(3, len(own["layer_bias_HLL"]), -1)

    def _alike_tokens(self, layer: int, known: int) -> tuple[Floats, Floats]:
        """[F, E] what alike tokens used, [F] how alike the most alike one is."""
        own, alike_FJ = self._own, self._own["alike_FLJ"][:, layer]
        alike_FS = alike_FJ[:, :known] @ self._shared_LS[:known]
        alike_FS += alike_FJ[:, self.n_layers :] @ self._before_LS
        logits_FS = alike_FS - own["recent_FL"][:, layer, None] * np.log(self._back_S)
        weight_FS = _softmax(np.concatenate([own["nobody_FL"][:, layer, None], logits_FS], axis=1))
        words_FE = (
            weight_FS[:, :1] * own["chance_LE"][layer] + weight_FS[:, 1:] @ self._used_SLE[:, layer]
        )
        reach_F = own["reach_FL"][:, layer] * np.float32(self.top_k) + np.float32(1e-6)
        sure_F = 4 * alike_FS.max(axis=1, initial=0) / reach_F - 2
        return words_FE, sure_F


def _softmax(x_XY: Floats) -> Floats:
    weight_XY = np.exp(x_XY - x_XY.max(axis=1, keepdims=True))
    return weight_XY / weight_XY.sum(axis=1, keepdims=True)
