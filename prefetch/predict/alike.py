"""How alike tokens route, in compiled code: earlier tokens of a request, and remembered ones of training requests.

How alike two tokens are is the count of experts they share, older layers counting less, carried over in part from the
tokens before them. It knows no predictor, no trace and nothing of how answers are tuned.

M remembered tokens, S earlier tokens of the request, L layers, K choices, E experts, W words of 64 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

LEAST_WEIGHT = 1e-5  # of an earlier token of the request: under it nobody hears it
N_TOLD = 4  # what a network is told: by the request, its share of both, by the training requests, by both
SHARP_INSIDE, SHARP_OUTSIDE, SHARP_BOTH = 1.5, 0.4, 0.5  # of that
MOST_ALIKE = 1e37  # what float32 holds, with room for what is carried over
STRIDE = 128  # remembered tokens that are looked at together
PRIOR = 1e-3  # of popularity in every guess: it breaks ties, and guesses where nothing is known


class Memory(NamedTuple):
    """Training tokens, by the experts that they used: lists of who used which."""

    ids_MLK: NDArray[Any]
    # the token before it in memory is the one before it in its request
    goes_on_M: NDArray[np.bool_]
    # where the list of (layer, expert) begins in `users`; one more at the end
    offset_LE: NDArray[np.int64]
    users: NDArray[np.int32]


class Running(NamedTuple):
    """What is known of the token that runs. What is alike grows by 1 / decay a layer: nothing old is touched."""

    alike_M: NDArray[np.float32]
    before_M: NDArray[np.float32]  # when the token before was complete
    alike_S: NDArray[np.float32]
    before_S: NDArray[np.float32]
    weight_S: NDArray[np.float32]
    bits_SLW: NDArray[np.uint64]
    ids_SLK: NDArray[Any]
    now_LK: NDArray[Any]
    known: NDArray[np.int64]  # [layers of this token, tokens of this request]


class Mix(NamedTuple):
    """How the memories answer."""

    decay: float
    carry: float
    nearest: int
    inside: float  # sharpness: how much more the most alike count
    outside: float
    weight: float  # of the training requests, beside 1 for the same request


@njit(cache=True, nogil=True)
def lists(ids_MLK, n_experts, nobody):  # type: ignore[no-untyped-def]
    """Who used each expert of each layer: where its list begins, and the lists."""
    n_layers = ids_MLK.shape[1]
    offset = np.zeros(n_layers * n_experts + 1, np.int64)
    for m in range(ids_MLK.shape[0]):
        for layer in range(n_layers):
            for k in range(ids_MLK.shape[2]):
                if ids_MLK[m, layer, k] != nobody:
                    offset[layer * n_experts + ids_MLK[m, layer, k] + 1] += 1
    offset = np.cumsum(offset)
    place, users = offset.copy(), np.zeros(offset[-1], np.int32)
    for m in range(ids_MLK.shape[0]):
        for layer in range(n_layers):
            for k in range(ids_MLK.shape[2]):
                if ids_MLK[m, layer, k] != nobody:
                    at = layer * n_experts + ids_MLK[m, layer, k]
                    users[place[at]] = m
                    place[at] += 1
    return offset, users


@njit(cache=True, nogil=True)
def replay(ids_SLK, here_TLK, horizon, nobody, memory, running, how, chance_LE, out_TLE):  # type: ignore[no-untyped-def]  # fmt: skip
    """One request; `ids_SLK` has no last token, because nobody comes after it."""
    n_layers = here_TLK.shape[1]
    begin(running)
    for t in range(here_TLK.shape[0]):
        for layer in range(n_layers):
            if layer >= horizon:
                _observe(here_TLK[t, layer], layer - horizon, nobody, memory, running, how)
            _guess(layer, nobody, memory, running, how, chance_LE, out_TLE[t, layer])
        if t < len(ids_SLK):
            for layer in range(max(0, n_layers - horizon), n_layers):
                _observe(ids_SLK[t, layer], layer, nobody, memory, running, how)
            _end(nobody, memory, running, how)


@njit(cache=True, nogil=True)
def observe_event(ids_K, layer, nobody, memory, running, how_6):  # type: ignore[no-untyped-def]
    """With the last layer the token is complete."""
    named, state, how = Memory(*memory), Running(*running), _mix(how_6)
    _observe(ids_K, layer, nobody, named, state, how)
    if layer == len(state.now_LK) - 1:
        _end(nobody, named, state, how)


@njit(cache=True, nogil=True)
def guess_event(layer, nobody, memory, running, how_6, chance_LE, out_E):  # type: ignore[no-untyped-def]
    _guess(layer, nobody, Memory(*memory), Running(*running), _mix(how_6), chance_LE, out_E)


@njit(cache=True, nogil=True)
def _mix(how_6):  # type: ignore[no-untyped-def]
    return Mix(how_6[0], how_6[1], np.int64(how_6[2]), how_6[3], how_6[4], how_6[5])


@njit(cache=True, nogil=True)
def begin(running):  # type: ignore[no-untyped-def]
    running.alike_M[:] = 0
    running.known[:] = 0


@njit(cache=True, nogil=True)
def _observe(ids_K, layer, nobody, memory, running, how):  # type: ignore[no-untyped-def]
    """Everyone who used these experts here becomes more alike."""
    gain = np.float32(how.decay**-layer)
    n_experts = (len(memory.offset_LE) - 1) // running.now_LK.shape[0]
    running.now_LK[layer] = ids_K
    running.known[0] = layer + 1
    bits_W = np.zeros(running.bits_SLW.shape[2], np.uint64)
    for k in range(len(ids_K)):
        if ids_K[k] == nobody:
            continue
        bits_W[ids_K[k] >> 6] |= np.uint64(1) << np.uint64(ids_K[k] & 63)
        at = layer * n_experts + ids_K[k]
        for i in range(memory.offset_LE[at], memory.offset_LE[at + 1]):
            running.alike_M[memory.users[i]] += gain
    for s in range(min(running.known[1], len(running.alike_S))):
        shared = np.uint64(0)
        for w in range(len(bits_W)):
            shared += _ones(running.bits_SLW[s, layer, w] & bits_W[w])
        running.alike_S[s] += gain * np.float32(shared)


@njit(cache=True, nogil=True)
def _ones(x):  # type: ignore[no-untyped-def]
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _end(nobody, memory, running, how):  # type: ignore[no-untyped-def]
    """The token is complete: it is remembered, and what was alike passes on in part to who comes next."""
    n_layers, window = running.now_LK.shape[0], len(running.alike_S)
    passed = np.float32(how.carry * how.decay ** (n_layers - 1))
    for m in range(len(running.alike_M)):
        running.before_M[m] = running.alike_M[m] * passed
    for m in range(len(running.alike_M)):
        running.alike_M[m] = running.before_M[m - 1] if memory.goes_on_M[m] else np.float32(0)
    place, n = running.known[1] % window, min(running.known[1], window)
    for s in range(n):
        running.before_S[s] = running.alike_S[s] * passed
    for s in range(
        n
    ):  # the token before s stands at s - 1; nobody knows what was before the oldest
        is_oldest = s == (running.known[1] + 1) % window if running.known[1] >= window else s == 0
        running.alike_S[s] = np.float32(0) if is_oldest else running.before_S[s - 1]
    running.alike_S[place] = running.before_S[place - 1] if running.known[1] > 0 else np.float32(0)
    for layer in range(n_layers):
        running.bits_SLW[place, layer] = 0
        for k in range(running.now_LK.shape[1]):
            expert = running.now_LK[layer, k]
            running.ids_SLK[place, layer, k] = expert
            if expert != nobody:
                running.bits_SLW[place, layer, expert >> 6] |= np.uint64(1) << np.uint64(
                    expert & 63
                )
    running.known[0] = 0
    running.known[1] += 1


@njit(cache=True, nogil=True)
def _guess(layer, nobody, memory, running, how, chance_LE, out_E):  # type: ignore[no-untyped-def]
    scale = how.decay ** max(0, running.known[0] - 1)
    for expert in range(len(out_E)):
        out_E[expert] = PRIOR * chance_LE[layer, expert]
    total = PRIOR
    if running.known[1] > 0:
        _ask_request(layer, nobody, running, np.float32(how.inside * scale), out_E)
        total += 1.0
    if len(running.alike_M) > 0 and how.weight > 0:
        near, who = nearest(running.alike_M, how.nearest, 0, 0)
        _ask(layer, nobody, memory, near, who, how.outside * scale, how.weight, out_E)
        total += how.weight
    for expert in range(len(out_E)):
        out_E[expert] /= total


@njit(cache=True, nogil=True)
def _ask_request(layer, nobody, running, sharp, out_E):  # type: ignore[no-untyped-def]
    """All earlier tokens of the request, the most alike with the most weight; weights sum to one."""
    n = min(running.known[1], len(running.alike_S))
    most, weights = running.alike_S[:n].max(), 0.0
    for s in range(n):
        running.weight_S[s] = np.exp(sharp * (running.alike_S[s] - most))
        weights += running.weight_S[s]
    for s in range(n):
        weight = running.weight_S[s] / weights
        if weight > LEAST_WEIGHT:
            _vote(running.ids_SLK[s, layer], weight, nobody, out_E)


@njit(cache=True, nogil=True)
def _vote(ids_K, weight, nobody, out_E):  # type: ignore[no-untyped-def]
    for k in range(len(ids_K)):
        if ids_K[k] != nobody:
            out_E[ids_K[k]] += weight


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc"})
def _peak(alike_M, first, stop):  # type: ignore[no-untyped-def]
    """The largest of some; several at a time, because their order does not matter."""
    peak = alike_M[first]
    for m in range(first, stop):
        peak = max(peak, alike_M[m])
    return peak


@njit(cache=True, nogil=True)
def nearest(alike_M, most, own_first, own_stop):  # type: ignore[no-untyped-def]
    """The most alike training tokens, found in one walk; the least alike of them is what has to be beaten.

    Those from `own_first` up to `own_stop` are not asked: a token must not remember its own request.
    """
    near, who = np.empty(most, np.float32), np.empty(most, np.int64)
    found, least = 0, 0
    for first in range(0, len(alike_M), STRIDE):
        stop = min(first + STRIDE, len(alike_M))
        if found == most and _peak(alike_M, first, stop) <= near[least]:
            continue
        for m in range(first, stop):
            if own_first <= m < own_stop:
                continue
            alike = alike_M[m]
            if found < most:
                near[found], who[found] = alike, m
                found += 1
                if found == most:
                    least = np.argmin(near)
            elif alike > near[least]:
                near[least], who[least] = alike, m
                least = np.argmin(near)
    return near[:found], who[:found]


@njit(cache=True, nogil=True)
def _ask(layer, nobody, memory, near, who, sharp, share, out_E):  # type: ignore[no-untyped-def]
    """Their votes, the most alike with the most weight; weights sum to `share`."""
    if len(near) == 0:
        return
    best, weights = near.max(), 0.0
    for i in range(len(near)):
        weights += np.exp(sharp * (near[i] - best))
    for i in range(len(near)):
        weight = share * np.exp(sharp * (near[i] - best)) / weights
        _vote(memory.ids_MLK[who[i], layer], weight, nobody, out_E)


@njit(cache=True, nogil=True)
def _ask_both(layer, nobody, memory, running, near, who, sharp, inside_E, both_E):  # type: ignore[no-untyped-def]
    """Earlier tokens of the request and training tokens as one crowd: the more alike ones decide, whosever they are."""
    n, best, weights = min(running.known[1], len(running.alike_S)), np.float32(0), 0.0
    if n > 0:
        best = running.alike_S[:n].max()
    if len(near) > 0:
        best = max(best, near.max())
    for s in range(n):
        running.weight_S[s] = np.exp(sharp * (running.alike_S[s] - best))
        weights += running.weight_S[s]
    for i in range(len(near)):
        weights += np.exp(sharp * (near[i] - best))
    for s in range(n):
        weight = running.weight_S[s] / weights
        if weight > LEAST_WEIGHT:
            _vote(running.ids_SLK[s, layer], weight, nobody, inside_E)
    both_E += inside_E
    for i in range(len(near)):
        weight = np.exp(sharp * (near[i] - best)) / weights
        _vote(memory.ids_MLK[who[i], layer], weight, nobody, both_E)


@njit(cache=True, nogil=True)
def _tell(layer, own_first, own_stop, nobody, memory, running, how, told_FE, sure_2):  # type: ignore[no-untyped-def]
    """What each memory says, and both together, and how alike the most alike are: for a network to weigh."""
    scale = how.decay ** max(0, running.known[0] - 1)
    told_FE[:] = 0
    sure_2[:] = 0
    if running.known[1] > 0:
        n = min(running.known[1], len(running.alike_S))
        sure_2[0] = scale * running.alike_S[:n].max()
        _ask_request(layer, nobody, running, np.float32(SHARP_INSIDE * scale), told_FE[0])
    near, who = nearest(running.alike_M, how.nearest, own_first, own_stop)
    if len(near) > 0:
        sure_2[1] = scale * near.max()
        _ask(layer, nobody, memory, near, who, SHARP_OUTSIDE * scale, 1.0, told_FE[2])
    sharp = SHARP_BOTH * scale
    _ask_both(layer, nobody, memory, running, near, who, sharp, told_FE[1], told_FE[3])


@njit(cache=True, nogil=True)
def replay_told(ids_SLK, here_TLK, horizon, own_first, own_stop, nobody, memory, running, how, told_TLFE, sure_TL2):  # type: ignore[no-untyped-def]  # fmt: skip
    """One request, as `replay`, for a network."""
    n_layers = here_TLK.shape[1]
    told_FE = np.zeros(told_TLFE.shape[2:], np.float32)
    begin(running)
    for t in range(here_TLK.shape[0]):
        for layer in range(n_layers):
            if layer >= horizon:
                _observe(here_TLK[t, layer], layer - horizon, nobody, memory, running, how)
            _tell(
                layer,
                own_first,
                own_stop,
                nobody,
                memory,
                running,
                how,
                told_FE,
                sure_TL2[t, layer],
            )
            told_TLFE[t, layer] = told_FE
        if t < len(ids_SLK):
            for layer in range(max(0, n_layers - horizon), n_layers):
                _observe(ids_SLK[t, layer], layer, nobody, memory, running, how)
            _end(nobody, memory, running, how)
