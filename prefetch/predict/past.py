"""What is known when a guess is made: the only door between a trace and a predictor.

A guess about layer l of token t at horizon h knows this token's routing up to layer l - h, and all layers of the
earlier tokens of its request; in the first layers (l < h) it is made when the token begins. Everything that a `Past`
hands out for (t, l) existed then. T tokens, L layers, K choices, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import RoutingTrace, no_expert


class Past:
    """Whole requests, seen from `horizon` layers before every (token, layer). Rows are in order, requests together."""

    def __init__(self, block: RoutingTrace, horizon: int) -> None:
        self._block = block
        self.horizon = horizon
        self.card: ModelCard = block.card
        self.nobody = no_expert(block.card.n_experts)
        self.n_tokens = block.n_tokens
        self.request_T, self.position_T = block.request_T, block.position_T
        self.token_T = block.token_T  # the word itself is known when its token begins
        starts_R = block.starts_R
        lengths_R = np.diff(np.append(starts_R, block.n_tokens))
        self.starts_R = starts_R
        self.first_T = np.repeat(starts_R, lengths_R)  # the first row of each row's request

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L, E): what scores look like."""
        return self.n_tokens, self.card.n_layers, self.card.n_experts

    def here(self, back: int = 0) -> NDArray[Any]:
        """[t, l]: this token's experts at layer l - horizon - back; "no expert" where there is no such layer."""
        return self._shifted(self._block.ids_TLK, self.horizon + back, self.nobody)

    def here_weights(self, back: int = 0) -> NDArray[np.float32]:
        """Their weights; 0 where there are none."""
        return self._shifted(self._weights(), self.horizon + back, 0.0)

    def before(self, back: int = 1) -> NDArray[Any]:
        """[t, l]: the experts of layer l at the token `back` before; "no expert" before a request begins."""
        return self._earlier(self._block.ids_TLK, back, self.nobody)

    def before_weights(self, back: int = 1) -> NDArray[np.float32]:
        return self._earlier(self._weights(), back, 0.0)

    def nearest(self) -> NDArray[Any]:
        """[t, l]: this token's layer l - horizon; in the first layers the token before, at layer l itself."""
        ids_TLK = self.here()
        first = min(self.horizon, self.card.n_layers)
        ids_TLK[:, :first] = self.before()[:, :first]
        return ids_TLK

    def earlier(self, token: int) -> NDArray[Any]:
        """[s, l]: the experts of all earlier tokens of this token's request, all layers."""
        return self._block.ids_TLK[self.first_T[token] : token]

    def usage(self, decay: float) -> NDArray[np.float32]:
        """[T, L, E]: the average use of every expert by the earlier tokens, a token back counting `decay` as much."""
        out_TLE = np.zeros(self.shape, np.float32)
        _usage(
            self._block.ids_TLK,
            self.first_T,
            self.nobody,
            np.float32(decay),
            self.card.top_k,
            out_TLE,
        )
        return out_TLE

    def gate_inputs(self) -> NDArray[np.float16]:
        """[T, L, D]: the gate's input at layer l - horizon; 0 where there is no such layer."""
        return self._shifted(self._recorded("gate_inputs"), self.horizon, 0)

    def pre_attention(self) -> NDArray[np.float16]:
        """[T, L, D]: the input of attention at layer l - horizon + 1, which exists once layer l - horizon is done."""
        return self._shifted(self._recorded("pre_attention"), self.horizon - 1, 0)

    def windows(self, max_rows: int) -> Iterator[slice]:
        """Parts of the rows, for what is too large to be computed for all of them."""
        for start in range(0, self.n_tokens, max_rows):
            yield slice(start, min(start + max_rows, self.n_tokens))

    def _weights(self) -> NDArray[np.float32]:
        if self._block.weights_TLK is None:
            raise MissingData(
                "this predictor needs the weights of the choices: not recorded in this trace"
            )
        return np.nan_to_num(self._block.weights_TLK.astype(np.float32))

    def _recorded(self, name: str) -> NDArray[np.float16]:
        array = getattr(self._block, f"{name}_TLD")
        if array is None:
            raise MissingData(f"this predictor needs {name}: not recorded in this trace")
        return np.asarray(array)

    def _shifted(self, array_TL: NDArray[Any], by: int, nothing: Any) -> NDArray[Any]:
        out = np.full_like(array_TL, nothing)
        if by < array_TL.shape[1]:
            out[:, by:] = array_TL[:, : array_TL.shape[1] - by]
        return out

    def _earlier(self, array_T: NDArray[Any], back: int, nothing: Any) -> NDArray[Any]:
        if back < 1:
            raise ValueError(f"an earlier token is at least 1 back, got {back}")
        out = np.full_like(array_T, nothing)
        rows = np.arange(self.n_tokens)
        known_T = rows - back >= self.first_T
        out[known_T] = array_T[rows[known_T] - back]
        return out


class Answered(Past):
    """For who cheats on purpose: the answer as well. Everything made from it is marked."""

    @property
    def answer(self) -> NDArray[Any]:
        """[T, L, K]"""
        return self._block.ids_TLK

    def own_gate_inputs(self) -> NDArray[np.float16]:
        """[T, L, D]: the gate's input at the very layer that is guessed."""
        return self._recorded("gate_inputs")


@njit(cache=True, nogil=True)
def _usage(ids_TLK, first_T, nobody, decay, top_k, out_TLE):  # type: ignore[no-untyped-def]
    for t in range(ids_TLK.shape[0]):
        if first_T[t] == t:
            continue
        for layer in range(ids_TLK.shape[1]):
            for expert in range(out_TLE.shape[2]):
                out_TLE[t, layer, expert] = decay * out_TLE[t - 1, layer, expert]
            for k in range(top_k):
                expert = ids_TLK[t - 1, layer, k]
                if expert != nobody:
                    out_TLE[t, layer, expert] += 1 - decay
