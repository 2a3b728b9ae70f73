"""The network on routing history, event by event, in compiled loops: both faces of `mlp` are this.

Everything it is fed is a set of experts, so its first layer is sums of rows; what decayed usage projects to moves
linearly, so it is kept and moved, never computed again. No torch is needed to guess. What an event reads of an expert
lies together, because memory is what an event waits for most. A network is one array, what is known of a request
another one: every array that a compiled function is handed, or cuts from another, costs as much as a hundred sums.

L layers, E experts, K choices, N hidden units, C contexts: the token before, and each decayed usage of earlier tokens.
Z = N + E: what goes to the hidden units, then what goes straight to the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float = NDArray[np.float32]
EPSILON = np.float32(1e-5)  # of the layer norm
LINE = 16  # numbers of a cache line
AT_ONCE = 8  # rows that `_times` takes in a walk over its sums: as many as there are registers for


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


class Sizes(NamedTuple):
    """What a network begins with; after them come the decays of its contexts."""

    layers: int
    experts: int
    hidden: int
    contexts: int
    horizon: int
    top_k: int
    nobody: int


DECAYS_AT = len(Sizes._fields)


class Network(NamedTuple):
    """Where the parts of a network begin."""

    told_LEX: int  # an expert's row: above, contexts (C N), own contexts (C Z)
    near_LEZ: int
    start_LZ: int  # bias and prior
    out_LNE: int
    gain_N: int
    shift_N: int
    inner_bias_N: int
    outer_bias_N: int
    inner_NN: int
    outer_NN: int
    end: int


class Room(NamedTuple):
    """Where the parts of what is known of the running request begin."""

    z_Z: int  # hidden units, then the answer
    y_N: int
    on_N: int  # which units are on
    token_X: int  # of this token: its layers so far; what it will add to the contexts (C N)
    past_CN: int
    past_N: int  # the sum of these
    own_LCZ: int  # a layer's is moved on as soon as its choices are known: nobody asks for it again before
    own_LZ: int
    now_LK: int  # this token's choices
    end: int


def arranged(weights: Weights, sizes: Sizes, decays: tuple[float, ...]) -> Float:
    """A network as one array, an expert's rows together."""
    decay_C = np.array(decays, np.float32)
    fresh_C111 = (1 - decay_C)[:, None, None, None]
    both_CLEZ = np.concatenate([weights.own_CLEN, weights.own_skip_CLEE], axis=3) * fresh_C111
    context_CLEN = weights.context_CLEN * fresh_C111
    told = [weights.above_LEN, *context_CLEN, *both_CLEZ]
    head = np.zeros(_network(sizes).told_LEX, np.float32)
    head[: DECAYS_AT + len(decays)] = [*sizes, *decays]
    parts = (
        head, np.concatenate(told, axis=2), np.concatenate([weights.nearest_LEN, weights.skip_LEE], axis=2),
        np.concatenate([weights.bias_LN, weights.prior_LE], axis=1), weights.out_LNE, weights.gain_N,
        weights.shift_N, weights.inner_bias_N, weights.outer_bias_N, weights.inner_NN, weights.outer_NN,
    )  # fmt: skip
    return aligned(np.concatenate([part.ravel() for part in parts]))


def taken_apart(network: Float) -> dict[str, Float]:
    """The parts of such an array by their names, which end in their axes."""
    sizes = _sizes(network)
    n, pairs = sizes.hidden, (sizes.layers, sizes.experts)
    width = n + sizes.experts
    shapes = {
        "told_LEX": (*pairs, _told(sizes)[0]),
        "near_LEZ": (*pairs, width),
        "start_LZ": (sizes.layers, width),
        "out_LNE": (sizes.layers, n, sizes.experts),
        **{name: (n,) for name in ("gain_N", "shift_N", "inner_bias_N", "outer_bias_N")},
        **{name: (n, n) for name in ("inner_NN", "outer_NN")},
    }
    first_of = _network(sizes)._asdict()
    return {
        name: network[first_of[name] : first_of[name] + math.prod(shape)].reshape(shape)
        for name, shape in shapes.items()
    }


def aligned(numbers: Float) -> Float:
    """Numbers that begin where a cache line begins: a row of them is not one line longer than it needs to be."""
    if numbers.ctypes.data % (4 * LINE) == 0:
        return numbers
    room = np.zeros(len(numbers) + LINE, np.float32)
    first = -room.ctypes.data // 4 % LINE
    room[first : first + len(numbers)] = numbers
    return room[first : first + len(numbers)]


def fresh(network: Float) -> Float:
    """Room for a request."""
    room = aligned(np.zeros(_room(_sizes(network)).end, np.float32))
    begin(network, room)
    return room


def answer_in(network: Float, room: Float) -> Float:
    """[E]: where `guess` leaves its answer."""
    sizes = _sizes(network)
    return room[sizes.hidden : sizes.hidden + sizes.experts]


@njit(cache=True, nogil=True)
def _sizes(network):  # type: ignore[no-untyped-def]
    return Sizes(
        np.int64(network[0]), np.int64(network[1]), np.int64(network[2]), np.int64(network[3]), np.int64(network[4]),
        np.int64(network[5]), np.int64(network[6]),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _told(sizes):  # type: ignore[no-untyped-def]
    """Numbers of an expert's row in all, and before its own contexts."""
    width = sizes.hidden + sizes.experts
    first = (1 + sizes.contexts) * sizes.hidden
    return first + sizes.contexts * width, first


@njit(cache=True, nogil=True)
def _network(sizes):  # type: ignore[no-untyped-def]
    n, pairs = sizes.hidden, sizes.layers * sizes.experts
    width = n + sizes.experts
    told = (DECAYS_AT + sizes.contexts + LINE - 1) // LINE * LINE
    near = told + pairs * _told(sizes)[0]
    start = near + pairs * width
    out = start + sizes.layers * width
    gain = out + pairs * n
    inner = gain + 4 * n
    outer = inner + n * n
    return Network(
        told, near, start, out, gain, gain + n, gain + 2 * n, gain + 3 * n, inner, outer, outer + n * n
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _room(sizes):  # type: ignore[no-untyped-def]
    n, contexts = sizes.hidden, sizes.contexts
    width = n + sizes.experts
    token = width + 2 * n
    past = token + (1 + contexts) * n
    own = past + (contexts + 1) * n
    own_sum = own + sizes.layers * contexts * width
    now = own_sum + sizes.layers * width
    return Room(
        0, width, width + n, token, past, past + contexts * n, own, own_sum, now, now + sizes.layers * sizes.top_k
    )  # fmt: skip


# Loops that compile to vector instructions: unsigned places, because what may be negative is checked at every step.


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _copy(into, at, rows, row, n):  # type: ignore[no-untyped-def]
    to, of = np.uintp(at), np.uintp(row)
    for i in range(np.uintp(n)):
        into[to + i] = rows[of + i]


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _add(into, at, rows, row, n):  # type: ignore[no-untyped-def]
    to, of = np.uintp(at), np.uintp(row)
    for i in range(np.uintp(n)):
        into[to + i] += rows[of + i]


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _shrink(into, at, factor, n):  # type: ignore[no-untyped-def]
    to = np.uintp(at)
    for i in range(np.uintp(n)):
        into[to + i] *= factor


@njit(cache=True, nogil=True, fastmath=True)
def _times(room, at, n, units, n_units, on, network, rows):  # type: ignore[no-untyped-def]
    """Adds units times rows; rows of units that are off are skipped."""
    one, to, wide, x, who = np.uintp(1), np.uintp(at), np.uintp(n), np.uintp(units), np.uintp(on)
    first, found, j = np.uintp(rows), np.uintp(0), np.uintp(0)
    for i in range(np.uintp(n_units)):
        room[who + found] = i
        found += np.uintp(room[x + i] != 0)
    while j + np.uintp(AT_ONCE) <= found:
        _eight(room, to, wide, x, who + j, network, first)
        j += np.uintp(AT_ONCE)
    while j < found:
        unit = np.uintp(room[who + j])
        factor, row = room[x + unit], first + unit * wide
        for i in range(wide):
            room[to + i] += factor * network[row + i]
        j += one


@njit(cache=True, nogil=True, fastmath=True, inline="always")
def _eight(room, to, wide, x, who, network, first):  # type: ignore[no-untyped-def]
    """A sum is read and written once for eight rows."""
    a, b = np.uintp(room[who]), np.uintp(room[who + np.uintp(1)])
    c, d = np.uintp(room[who + np.uintp(2)]), np.uintp(room[who + np.uintp(3)])
    e, f = np.uintp(room[who + np.uintp(4)]), np.uintp(room[who + np.uintp(5)])
    g, h = np.uintp(room[who + np.uintp(6)]), np.uintp(room[who + np.uintp(7)])
    x_a, x_b, x_c, x_d = room[x + a], room[x + b], room[x + c], room[x + d]
    x_e, x_f, x_g, x_h = room[x + e], room[x + f], room[x + g], room[x + h]
    a, b, c, d = first + a * wide, first + b * wide, first + c * wide, first + d * wide
    e, f, g, h = first + e * wide, first + f * wide, first + g * wide, first + h * wide
    for i in range(wide):
        room[to + i] += (
            x_a * network[a + i] + x_b * network[b + i] + x_c * network[c + i] + x_d * network[d + i]
            + x_e * network[e + i] + x_f * network[f + i] + x_g * network[g + i] + x_h * network[h + i]
        )  # fmt: skip


@njit(cache=True, nogil=True)
def begin(network, room):  # type: ignore[no-untyped-def]
    """Nothing of another request is known."""
    sizes = _sizes(network)
    room[:] = 0
    room[_room(sizes).now_LK :] = sizes.nobody


@njit(cache=True, nogil=True, fastmath=True)
def observe(ids_K, layer, network, room):  # type: ignore[no-untyped-def]
    """This token's experts of one layer; with the last one the token becomes context."""
    sizes = _sizes(network)
    there, here = _network(sizes), _room(sizes)
    width = sizes.hidden + sizes.experts
    whole, first = _told(sizes)
    own = here.own_LCZ + layer * sizes.contexts * width
    for c in range(sizes.contexts):
        _shrink(room, own + c * width, network[DECAYS_AT + c], width)
    for k in range(len(ids_K)):
        expert = np.int64(ids_K[k])
        room[here.now_LK + layer * sizes.top_k + k] = expert
        if expert != sizes.nobody:
            row = there.told_LEX + (layer * sizes.experts + expert) * whole
            _add(room, here.token_X, network, row, first)
            _add(room, own, network, row + first, whole - first)
    total = here.own_LZ + layer * width
    _copy(room, total, room, own, width)
    for c in range(1, sizes.contexts):
        _add(room, total, room, own + c * width, width)
    if layer == sizes.layers - 1:
        _end(network, room, sizes)


@njit(cache=True, nogil=True, fastmath=True)
def _end(network, room, sizes):  # type: ignore[no-untyped-def]
    """The token becomes context."""
    here, n = _room(sizes), sizes.hidden
    room[here.past_N : here.past_N + n] = 0
    for c in range(sizes.contexts):
        past = here.past_CN + c * n
        _shrink(room, past, network[DECAYS_AT + c], n)
        _add(room, past, room, here.token_X + (1 + c) * n, n)
        _add(room, here.past_N, room, past, n)
    room[here.token_X : here.past_CN] = 0


@njit(cache=True, nogil=True, fastmath=True)
def guess(layer, network, room):  # type: ignore[no-untyped-def]
    """Chance of every expert of a layer; in the first layers of a token nothing of the token is known."""
    sizes = _sizes(network)
    there, here, n = _network(sizes), _room(sizes), sizes.hidden
    width = n + sizes.experts
    _copy(room, here.z_Z, network, there.start_LZ + layer * width, width)
    _add(room, here.z_Z, room, here.own_LZ + layer * width, width)
    _add(room, here.z_Z, room, here.past_N, n)
    if layer >= sizes.horizon:  # all layers of this token that are known, and the nearest once more
        _add(room, here.z_Z, room, here.token_X, n)
        for k in range(sizes.top_k):
            expert = np.int64(room[here.now_LK + (layer - sizes.horizon) * sizes.top_k + k])
            if expert != sizes.nobody:
                row = there.near_LEZ + (layer * sizes.experts + expert) * width
                _add(room, here.z_Z, network, row, width)
    _hidden(network, room, sizes)
    answer, out = here.z_Z + n, there.out_LNE + layer * n * sizes.experts
    _times(room, answer, sizes.experts, here.z_Z, n, here.on_N, network, out)
    for e in range(answer, answer + sizes.experts):
        room[e] = 1 / (1 + np.exp(-room[e]))


@njit(cache=True, nogil=True, fastmath=True)
def _hidden(network, room, sizes):  # type: ignore[no-untyped-def]
    """Layer norm, ReLU, and one residual block."""
    there, here, n = _network(sizes), _room(sizes), sizes.hidden
    x_N, y_N = room[here.z_Z : here.z_Z + n], room[here.y_N : here.y_N + n]
    gain_N, shift_N = network[there.gain_N :][:n], network[there.shift_N :][:n]
    mean, square = x_N.sum() / n, np.float32(0)
    for i in range(n):
        square += (x_N[i] - mean) ** 2
    scale = 1 / np.sqrt(square / n + EPSILON)
    for i in range(n):
        x_N[i] = max((x_N[i] - mean) * scale * gain_N[i] + shift_N[i], np.float32(0))
    _copy(room, here.y_N, network, there.inner_bias_N, n)
    _times(room, here.y_N, n, here.z_Z, n, here.on_N, network, there.inner_NN)
    for i in range(n):
        y_N[i] = max(y_N[i], np.float32(0))
    _add(room, here.z_Z, network, there.outer_bias_N, n)
    _times(room, here.z_Z, n, here.y_N, n, here.on_N, network, there.outer_NN)


@njit(cache=True, nogil=True)
def replay(ids_SLK, here_TLK, network, room, out_TLE):  # type: ignore[no-untyped-def]
    """One request; `ids_SLK` has no last token, because nobody comes after it."""
    sizes = _sizes(network)
    n_layers, horizon = sizes.layers, sizes.horizon
    begin(network, room)
    for t in range(here_TLK.shape[0]):
        for layer in range(n_layers):
            if layer >= horizon:
                observe(here_TLK[t, layer], layer - horizon, network, room)
            guess(layer, network, room)
            _copy(out_TLE[t, layer], 0, room, sizes.hidden, sizes.experts)
        if t < len(ids_SLK):
            for layer in range(max(0, n_layers - horizon), n_layers):
                observe(ids_SLK[t, layer], layer, network, room)
