"""The network on routing history, event by event, in compiled loops: both faces of `mlp` are this.

Everything it is fed is a set of experts, so its first layer is sums of rows; what decayed usage projects to moves
linearly, so it is kept and moved, never computed again. No torch is needed to guess. A network is one array of numbers,
because every array that a compiled function is handed costs as much as a hundred sums.
L layers, E experts, K choices, N hidden units, C contexts: the token before, and each decayed usage of earlier tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float = NDArray[np.float32]
EPSILON = np.float32(1e-5)  # of the layer norm


class Weights(NamedTuple):
    """Of one horizon. Names as in `HistoryNet`."""

    above_LEN: Float  # experts of layer l, for every layer from l + horizon on
    nearest_LEN: Float  # experts of layer l - horizon, for layer l
    context_CLEN: Float  # contexts of all layers, for every layer
    own_CLEN: Float  # contexts of layer l, for layer l
    bias_LN: Float
    gain_N: Float
    shift_N: Float
    inner_NN: Float
    inner_bias_N: Float
    outer_NN: Float
    outer_bias_N: Float
    out_LNE: Float
    prior_LE: Float
    skip_LEE: Float  # straight from the nearest layer to the scores
    own_skip_CLEE: Float


class State(NamedTuple):
    """What is known of the running request, projected."""

    above_N: Float  # of this token's layers so far
    context_CN: Float
    coming_CN: Float  # what this token will add to the contexts
    own_LCN: Float  # a layer's is moved on as soon as its choices are known: nobody asks for it again before
    skip_LCE: Float
    x_N: Float
    y_N: Float


class Sizes(NamedTuple):
    """As an array where compiled functions are called: numba takes a microsecond to look at a named tuple."""

    layers: int
    experts: int
    hidden: int
    contexts: int
    horizon: int
    nobody: int

    def array(self) -> NDArray[np.int64]:
        return np.array(self, np.int64)


def packed(weights: Weights) -> Float:
    return np.concatenate([array.ravel() for array in weights])


def fresh(sizes: Sizes, top_k: int) -> tuple[Float, NDArray[np.int64]]:
    """State and this token's choices, of a request that has not begun."""
    n_layers, n_experts, n, c = sizes[:4]
    n_floats = 3 * n + 2 * c * n + n_layers * c * (n + n_experts)
    return np.zeros(n_floats, np.float32), np.full((n_layers, top_k), sizes.nobody, np.int64)


@njit(cache=True, nogil=True)
def _sizes(sizes_6):  # type: ignore[no-untyped-def]
    return Sizes(sizes_6[0], sizes_6[1], sizes_6[2], sizes_6[3], sizes_6[4], sizes_6[5])


@njit(cache=True, nogil=True)
def _weights(packed, sizes):  # type: ignore[no-untyped-def]
    """The parts of a network, as views."""
    n_layers, n_experts, n, c = sizes.layers, sizes.experts, sizes.hidden, sizes.contexts
    rows = n_layers * n_experts * n
    at = 0
    above = packed[at : at + rows].reshape(n_layers, n_experts, n)
    at += rows
    nearest = packed[at : at + rows].reshape(n_layers, n_experts, n)
    at += rows
    context = packed[at : at + c * rows].reshape(c, n_layers, n_experts, n)
    at += c * rows
    own = packed[at : at + c * rows].reshape(c, n_layers, n_experts, n)
    at += c * rows
    bias = packed[at : at + n_layers * n].reshape(n_layers, n)
    at += n_layers * n
    gain, shift = packed[at : at + n], packed[at + n : at + 2 * n]
    at += 2 * n
    inner = packed[at : at + n * n].reshape(n, n)
    at += n * n
    inner_bias = packed[at : at + n]
    at += n
    outer = packed[at : at + n * n].reshape(n, n)
    at += n * n
    outer_bias = packed[at : at + n]
    at += n
    out = packed[at : at + rows].reshape(n_layers, n, n_experts)
    at += rows
    prior = packed[at : at + n_layers * n_experts].reshape(n_layers, n_experts)
    at += n_layers * n_experts
    straight = n_layers * n_experts * n_experts
    skip = packed[at : at + straight].reshape(n_layers, n_experts, n_experts)
    at += straight
    own_skip = packed[at : at + c * straight].reshape(c, n_layers, n_experts, n_experts)
    return Weights(
        above, nearest, context, own, bias, gain, shift, inner, inner_bias, outer, outer_bias, out, prior, skip,
        own_skip,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _state(floats, sizes):  # type: ignore[no-untyped-def]
    n_layers, n_experts, n, c = sizes.layers, sizes.experts, sizes.hidden, sizes.contexts
    x, y, above = floats[:n], floats[n : 2 * n], floats[2 * n : 3 * n]
    at = 3 * n
    context = floats[at : at + c * n].reshape(c, n)
    at += c * n
    coming = floats[at : at + c * n].reshape(c, n)
    at += c * n
    own = floats[at : at + n_layers * c * n].reshape(n_layers, c, n)
    at += n_layers * c * n
    skip = floats[at:].reshape(n_layers, c, n_experts)
    return State(above, context, coming, own, skip, x, y)


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _add(into, factor, row):  # type: ignore[no-untyped-def]
    """A loop that compiles to vector instructions, where an expression would make an array."""
    for i in range(len(into)):
        into[i] += factor * row[i]


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _shrink(into, factor):  # type: ignore[no-untyped-def]
    for i in range(len(into)):
        into[i] *= factor


@njit(cache=True, nogil=True, fastmath=True)
def observe(ids_K, layer, packed, sizes_6, decays_C, floats, now_LK):  # type: ignore[no-untyped-def]
    """This token's experts of one layer; with the last one the token becomes context."""
    sizes, one = _sizes(sizes_6), np.float32(1)
    weights, state = _weights(packed, sizes), _state(floats, sizes)
    for c in range(len(decays_C)):
        _shrink(state.own_LCN[layer, c], decays_C[c])
        _shrink(state.skip_LCE[layer, c], decays_C[c])
    for k in range(len(ids_K)):
        expert = np.int64(ids_K[k])
        now_LK[layer, k] = expert
        if expert == sizes.nobody:
            continue
        _add(state.above_N, one, weights.above_LEN[layer, expert])
        for c in range(len(decays_C)):
            fresh = one - decays_C[c]
            _add(state.coming_CN[c], fresh, weights.context_CLEN[c, layer, expert])
            _add(state.own_LCN[layer, c], fresh, weights.own_CLEN[c, layer, expert])
            _add(state.skip_LCE[layer, c], fresh, weights.own_skip_CLEE[c, layer, expert])
    if layer == sizes.layers - 1:
        state.above_N[:] = 0
        for c in range(len(decays_C)):
            _shrink(state.context_CN[c], decays_C[c])
            _add(state.context_CN[c], one, state.coming_CN[c])
        state.coming_CN[:] = 0


@njit(cache=True, nogil=True, fastmath=True)
def guess(layer, packed, sizes_6, floats, now_LK, out_E):  # type: ignore[no-untyped-def]
    """Chance of every expert of a layer; in the first layers of a token nothing of the token is known."""
    sizes, one = _sizes(sizes_6), np.float32(1)
    weights, state = _weights(packed, sizes), _state(floats, sizes)
    x_N = state.x_N
    x_N[:] = weights.bias_LN[layer]
    out_E[:] = weights.prior_LE[layer]
    for c in range(sizes.contexts):
        _add(x_N, one, state.context_CN[c])
        _add(x_N, one, state.own_LCN[layer, c])
        _add(out_E, one, state.skip_LCE[layer, c])
    if layer >= sizes.horizon:  # all layers of this token that are known, and the nearest once more
        _add(x_N, one, state.above_N)
        for k in range(now_LK.shape[1]):
            expert = now_LK[layer - sizes.horizon, k]
            if expert != sizes.nobody:
                _add(x_N, one, weights.nearest_LEN[layer, expert])
                _add(out_E, one, weights.skip_LEE[layer, expert])
    _hidden(weights, state)
    for i in range(sizes.hidden):
        if x_N[i] != 0:
            _add(out_E, x_N[i], weights.out_LNE[layer, i])
    for e in range(sizes.experts):
        out_E[e] = 1 / (1 + np.exp(-out_E[e]))


@njit(cache=True, nogil=True, fastmath=True)
def _hidden(weights, state):  # type: ignore[no-untyped-def]
    """Layer norm, ReLU, and one residual block; rows of units that are off are skipped."""
    x_N, y_N, n = state.x_N, state.y_N, len(state.x_N)
    mean, square = x_N.sum() / n, np.float32(0)
    for i in range(n):
        square += (x_N[i] - mean) ** 2
    scale = 1 / np.sqrt(square / n + EPSILON)
    for i in range(n):
        x_N[i] = max(
            (x_N[i] - mean) * scale * weights.gain_N[i] + weights.shift_N[i], np.float32(0)
        )
    y_N[:] = weights.inner_bias_N
    for i in range(n):
        if x_N[i] != 0:
            _add(y_N, x_N[i], weights.inner_NN[i])
    _add(x_N, np.float32(1), weights.outer_bias_N)
    for i in range(n):
        if y_N[i] > 0:
            _add(x_N, y_N[i], weights.outer_NN[i])


@njit(cache=True, nogil=True)
def replay(ids_SLK, here_TLK, packed, sizes_6, decays_C, floats, now_LK, out_TLE):  # type: ignore[no-untyped-def]
    """One request; `ids_SLK` has no last token, because nobody comes after it."""
    sizes = _sizes(sizes_6)
    n_layers, horizon = sizes.layers, sizes.horizon
    floats[:] = 0
    for t in range(here_TLK.shape[0]):
        for layer in range(n_layers):
            if layer >= horizon:
                observe(
                    here_TLK[t, layer], layer - horizon, packed, sizes_6, decays_C, floats, now_LK
                )
            guess(layer, packed, sizes_6, floats, now_LK, out_TLE[t, layer])
        if t < len(ids_SLK):
            for layer in range(max(0, n_layers - horizon), n_layers):
                observe(ids_SLK[t, layer], layer, packed, sizes_6, decays_C, floats, now_LK)


def sizes_of(weights: Weights, horizon: int, nobody: int) -> Sizes:
    n_contexts, n_layers, n_experts, n_hidden = weights.context_CLEN.shape
    return Sizes(n_layers, n_experts, n_hidden, n_contexts, horizon, nobody)
