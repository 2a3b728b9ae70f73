"""Policies that are told more than uses, beside what their papers say in a few lines: the same hits, access by access.

Every event fits its cache; workloads are drawn with scores and weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.errors import ConfigError, MissingData
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import HIT, MISS
from prefetch.sim.engines.reference import Cache
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.hobbit import Hobbit
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.moe_infinity import MoeInfinity
from prefetch.sim.policies.mrs import Mrs
from prefetch.sim.policies.predicted_use import PredictedUse
from prefetch.sim.policies.random import Random
from prefetch.sim.policies.static import Static
from prefetch.sim.policy import Seen
from prefetch.sim.told import told_of
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import RoutingTrace, trace_of

L, E, K, TOKENS = 3, 8, 2, 60
Entry = tuple[int, int]
Worth = Callable[[Entry], Any]


def traced(seed: int, batch: int = 1, nobody: float = 0.0) -> tuple[RoutingTrace, Workload]:
    """Three requests whose routers like some experts; the chosen are the best scores. `nobody`: choices left out."""
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(size=(1, L, E)) * 1.5 + rng.gumbel(size=(TOKENS, L, E))
    logits = logits.astype(np.float16)
    ids = np.argsort(-logits, axis=2, kind="stable")[:, :, :K]
    weights = np.take_along_axis(logits, ids, 2).astype(np.float64)
    weights = np.exp(weights - weights.max(axis=2, keepdims=True))
    ids[rng.random(ids.shape) < nobody] = -1
    card = plain_card("drawn", n_experts=E, top_k=K, layer_numbers=tuple(range(L)))
    trace = trace_of(
        dataclasses.replace(card, score_function="softmax"),
        ids,
        request_T=np.sort(rng.integers(0, 3, TOKENS)),
        phase_T=np.ones(TOKENS, np.uint8),
        weights_TLK=weights / weights.sum(axis=2, keepdims=True),
        scores_TLM=logits,
    )
    return trace, workload_of(trace, batch=batch)


class Textbook:
    """A cache per layer, or one for all, that evicts whoever has the lowest worth; ties like LRU."""

    def __init__(self, work: Workload, rooms: list[int]) -> None:
        self.work, self.rooms, self.time = work, rooms, 0
        self.here: list[dict[Entry, int]] = [{} for _ in rooms]  # and when each was used last
        self.step = self.layer = 0

    def events(self) -> Any:
        starts = self.work.start_V.tolist()
        for v in range(len(starts) - 1):
            self.step, self.layer = divmod(v, L)
            yield v, [(self.layer, int(e)) for e in self.work.ids_A[starts[v] : starts[v + 1]]]

    def run(self, told: Callable[[int, list[Entry]], None], worth: Worth) -> list[int]:
        outcome = []
        for v, entries in self.events():
            told(v, entries)
            group = self.layer if len(self.rooms) > 1 else 0
            here = self.here[group]
            outcome += [HIT if entry in here else MISS for entry in entries]
            for entry in entries:
                self.time += 1
                if entry not in here and len(here) == self.rooms[group]:
                    leavers = [one for one in here if one not in entries]
                    del here[min(leavers, key=lambda one: (worth(one), here[one]))]
                here.setdefault(entry, self.time)
            for entry in entries:
                self.time += 1
                here[entry] = self.time
        return outcome


seeds, rooms = st.integers(0, 10**6), st.sampled_from([[4] * L, [5, 4, 6], [4], [6], [10]])


def probabilities(trace: RoutingTrace) -> Any:
    scores = np.exp(trace.scores_TLM.astype(np.float32))
    return scores / scores.sum(axis=2, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    rooms,
    st.sampled_from([1, 2]),
    st.sampled_from([0.5, 0.25, 1.0]),
    st.sampled_from([1, 5]),
)
def test_mrs(seed, room, batch, share, top):
    """HybriMoE: S = share * TopP(s) + (1 - share) * S, over the mean score of a step's tokens."""
    trace, work = traced(seed, batch)
    policy, book = Mrs(share=share, top=top), Textbook(work, room)
    scores = probabilities(trace)
    recent: dict[Entry, int] = {}  # in 10^-12

    def told(v: int, entries: list[Entry]) -> None:
        step, layer = divmod(v, L)
        rows = work.rows_R[work.row_start_S[step] : work.row_start_S[step + 1]]
        mean = np.rint(scores[rows, layer].mean(axis=0, dtype=np.float32) * 10**6)
        best = sorted(range(E), key=lambda e: (-mean[e], e))[:top]
        for e in range(E):
            new = Fraction(int(mean[e]) if e in best else 0) * 10**6
            old = recent.get((layer, e), 0)
            recent[layer, e] = floor(Fraction(share) * new + (1 - Fraction(share)) * old)

    told_rows = told_of(policy, trace, work, len(room))
    fast = replay(work, policy, room, [1] * L, told=told_rows)
    assert fast.tolist() == book.run(told, lambda one: recent.get(one, 0))


def sequences(trace: RoutingTrace, work: Workload) -> list[bool]:
    """Steps of one request each: does a new one begin?"""
    request = trace.request_T[work.rows_R]
    return [step == 0 or request[step] != request[step - 1] for step in range(work.n_steps)]


@settings(max_examples=40, deadline=None)
@given(seeds, rooms, st.sampled_from([0.0, 0.4]))
def test_moe_infinity(seed, room, nobody):
    """The paper's priority: (share of the layer's tokens in this sequence + a little) * (1 - layer / layers)."""
    trace, work = traced(seed, nobody=nobody)
    book, is_new = Textbook(work, room), sequences(trace, work)
    tokens: dict[Entry, int] = {}

    def told(v: int, entries: list[Entry]) -> None:
        if v % L == 0 and is_new[v // L]:
            tokens.clear()
        for entry in entries:
            tokens[entry] = tokens.get(entry, 0) + 1

    def worth(entry: Entry) -> Fraction:
        whole = sum(tokens.get((entry[0], e), 0) for e in range(E))
        share = Fraction(tokens.get(entry, 0), max(1, whole)) + Fraction(1, 10**10)
        return share * (1 - Fraction(entry[0], L))

    policy = MoeInfinity()
    told_rows = told_of(policy, trace, work, len(room))
    assert replay(work, policy, room, [1] * L, told=told_rows).tolist() == book.run(told, worth)


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    rooms,
    st.sampled_from([(25, 25, 25, 25), (50, 20, 0, 30), (30, 0, 0, 70), (0, 0, 100, 0)]),
    st.sampled_from([0.6, 0.5]),
)
def test_hobbit(seed, room, weights, unimportant):
    """Four shares: three of the sequence so far, one of the layers. The second of two alike has half before it."""
    trace, work = traced(seed)
    trace.weights_TLK[::3] = 0.5
    book, is_new = Textbook(work, room), sequences(trace, work)
    last: dict[Entry, int] = {}
    uses: dict[Entry, int] = {}
    high: dict[Entry, int] = {}
    began = 0

    def told(v: int, entries: list[Entry]) -> None:
        nonlocal began
        step, layer = divmod(v, L)
        if layer == 0 and is_new[step]:
            began = step
            for record in (last, uses, high):
                record.clear()
        row = work.rows_R[step]
        by_weight = zip(-trace.weights_TLK[row, layer], trace.ids_TLK[row, layer], strict=True)
        whole = float(
            trace.weights_TLK[row, layer].sum(dtype=np.float64)
        )  # rounded to half precision
        before = 0.0
        for weight, e in sorted(by_weight, key=lambda pair: pair[0]):
            last[layer, e], uses[layer, e] = step - began + 1, uses.get((layer, e), 0) + 1
            high[layer, e] = high.get((layer, e), 0) + (before <= unimportant)
            before -= float(weight) / whole

    def worth(entry: Entry) -> Fraction:
        steps, n = book.step - began + 1, 1 if len(room) > 1 else L
        shares = [Fraction(record.get(entry, 0), steps) for record in (last, uses, high)]
        shares.append(1 - Fraction((entry[0] - book.layer) % n, n))
        return sum(w * share for w, share in zip(weights, shares, strict=True))

    lru, lfu, lhu, fld = (w / 100 for w in weights)
    policy = Hobbit(lru, lfu, lhu, fld, unimportant)
    told_rows = told_of(policy, trace, work, len(room))
    assert replay(work, policy, room, [1] * L, told=told_rows).tolist() == book.run(told, worth)


def test_hobbit_keeps_the_layers_that_come_next_before_it_is_told_anything():
    """A copy made ahead of the first event finds no place otherwise, in a cache that began full."""
    cache = Cache(Hobbit(), 3, 3, L * E, 3)
    for now, layer in enumerate((0, 2, 1)):
        cache.fill((layer, 5), 1, Seen(now, 0, layer * E + 5, 0, 0, 0))
    assert cache.evict(set(), Seen(9, 0, 1, 0, 0, 0)) == (2, 5)


def guessed(work: Workload, seed: int, ahead: int) -> Guesses:
    rng, n_events = np.random.default_rng(seed), len(work.start_V) - 1
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (n_events, 1)), axis=1)[:, :4]
    scores = np.sort(rng.integers(1, 10**6, ids.shape), axis=1)[:, ::-1].copy()
    ids[rng.random(n_events) < 0.2] = -1
    return Guesses(ids, scores, ahead)


@settings(max_examples=40, deadline=None)
@given(seeds, rooms, st.integers(1, 4))
def test_predicted_use(seed, room, ahead):
    """The latest guess about an expert's layer: `ahead` layers before, for the first layers with the step's first."""
    trace, work = traced(seed)
    guesses, book = guessed(work, seed, ahead), Textbook(work, room)
    likely: dict[Entry, int] = {}

    def told(v: int, entries: list[Entry]) -> None:
        layer = v % L
        known = [*range(ahead + 1)] if layer == 0 else [ahead]
        for later in (one for one in known if layer + one < L):
            ids = guesses.ids_VW[v + later].tolist()
            if any(e >= 0 for e in ids):
                likely.update({(layer + later, e): 0 for e in range(E)})
                scores = guesses.score_VW[v + later].tolist()
                likely.update({(layer + later, e): s for e, s in zip(ids, scores, strict=True)})

    policy = PredictedUse()
    told_rows = told_of(policy, trace, work, len(room), guesses)
    fast = replay(work, policy, room, [1] * L, told=told_rows)
    assert fast.tolist() == book.run(told, lambda one: likely.get(one, 0))


@settings(max_examples=20, deadline=None)
@given(seeds, rooms)
def test_static(seed, room):
    """Whoever is there from the start hits, and nobody else."""
    _, work = traced(seed)
    order = np.random.default_rng(seed).permutation(L * E)
    kept: list[set[int]] = [set() for _ in room]
    for entry in order.tolist():
        cache = kept[entry // E if len(room) > 1 else 0]
        if len(cache) < room[entry // E if len(room) > 1 else 0]:
            cache.add(entry)
    layer_A = np.repeat(np.arange(len(work.start_V) - 1) % L, np.diff(work.start_V))
    is_hit_A = np.isin(layer_A * E + work.ids_A, sorted(set.union(*kept)))
    fast = replay(work, Static(), room, [1] * L, warm=order)
    assert (fast == np.where(is_hit_A, HIT, MISS)).all()


def test_what_is_missing_is_named():
    trace, work = traced(0)
    bare = dataclasses.replace(trace, scores_TLM=None, weights_TLK=None)
    best = dataclasses.replace(trace, score_ids_TLM=np.zeros(trace.scores_TLM.shape, np.uint8))
    for poor, said in (
        (bare, "Mrs needs the router's scores of all 8.* has none"),
        (best, "best 8"),
    ):
        with pytest.raises(MissingData, match=said):
            told_of(Mrs(), poor, work, L)
    with pytest.raises(MissingData, match="Hobbit needs the router's weights"):
        told_of(Hobbit(), bare, work, L)
    assert told_of(Hobbit(lhu=0), bare, work, L).row_VE.sum() == work.tokens_A.sum()
    with pytest.raises(MissingData, match="predictor=none makes none"):
        told_of(PredictedUse(), trace, work, L)
    with pytest.raises(
        MissingData, match="Mrs needs scores: a row for each of 180 events, found 0"
    ):
        replay(work, Mrs(), [4] * L, [1] * L)
    with pytest.raises(MissingData, match="Static needs counts"):
        replay(work, Static(), [4] * L, [1] * L)
    with pytest.raises(ConfigError, match="5 experts are pinned, and 1 of them have no room"):
        replay(work, Lru(), [4] * L, [1] * L, pinned=np.arange(5))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mrs(share=0), "above 0"),
        (lambda: Mrs(share=1.1), "at most 1"),
        (lambda: Mrs(top=0), "at least 1"),
        (lambda: PredictedUse(share=0), "above 0"),
        (lambda: PredictedUse(share=1.5), "at most 1"),
        (lambda: Random(-1), "at least 0"),
        (lambda: Random(2**53), "below 2.53"),
        (lambda: Hobbit(lru=-1), "from 0 to 1"),
        (lambda: Hobbit(lru=1.5), "from 0 to 1"),
        (lambda: Hobbit(0, 0, 0, 0), "one weight above 0"),
    ],
)
def test_settings_that_make_no_sense(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
