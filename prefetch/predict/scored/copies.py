"""Near copies: requests that hold another one's text, though a few percent of their choices differ.

Engines repeat the routing of a text to 97 to 100 % of its choices, never to the last one. A sketch keeps, for fixed
rows of a request, a digest of the experts that one layer chose; two requests are near copies where more than half of
what both sketches hold is alike. It knows no predictor. R requests, S entries of a sketch, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.scoring import TEMPLATE_POSITIONS, SharedText
from prefetch.trace.blocks import Traceable, blocks_of
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import RoutingTrace, no_expert

DENSE_ROWS = 64  # of which each has an entry; then 32 entries for every doubling
ROWS_PER_DOUBLING = 32
LEAST_ROWS = 16  # shorter texts are equal by chance
WHOLE_SETS = 8  # of larger sets only some experts count, so that a few changed choices leave most digests alone
FALSE_COPIES = 0.01  # expected by chance among all pairs
MOST_REQUESTS = 20_000  # are compared pair by pair; of more so many are drawn
SEED = 20_260_101  # of rows, layers and digests: the same for every trace


@dataclass(frozen=True, eq=False)
class Sketches:
    """Digests of the choices at fixed rows and layers; 0 = no row there."""

    request_R: NDArray[np.int64]
    entry_RS: NDArray[np.uint16]
    of_requests: int  # more than are here, where some were drawn

    def rows_of(self, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these stand, of those that are here."""
        return np.flatnonzero(np.isin(self.request_R, requests))


def sketches_of(trace: Traceable, shared: SharedText, domains: tuple[str, ...]) -> Sketches:
    """One pass. `shared` and `domains` are of the trace that is learnt from, so that copies in another one line up."""
    requests, entries, rng = list[int](), list[NDArray[np.uint16]](), np.random.default_rng(SEED)
    seen, plan = 0, None
    for block in blocks_of(trace):
        plan = plan or _Plan(block.card, shared, domains)
        for request, entry_S in plan.sketches(block):
            seen += 1
            if len(requests) < MOST_REQUESTS:
                requests.append(request)
                entries.append(entry_S)
            elif (place := int(rng.integers(seen))) < MOST_REQUESTS:  # Vitter's reservoir
                requests[place], entries[place] = request, entry_S
    return Sketches(np.array(requests, np.int64), np.stack(entries), seen)


class _Plan:
    """Which rows and layers are looked at, and how a set becomes a digest."""

    def __init__(self, card: ModelCard, shared: SharedText, domains: tuple[str, ...]) -> None:
        rng = np.random.default_rng(SEED)
        rows_S, _ = sketched_rows()
        self._layer_S = sketched_layers(card.n_layers)
        self._place_P = np.full(TEMPLATE_POSITIONS, -1)
        self._place_P[rows_S] = np.arange(len(rows_S))
        self._digest_E = rng.integers(1, 2**63, card.n_experts + 1, dtype=np.uint64)
        self._digest_E[-1] = 0
        if card.top_k > WHOLE_SETS:
            dropped = rng.random(card.n_experts) >= WHOLE_SETS / card.top_k
            self._digest_E[:-1][dropped] = 0
        self._nobody = no_expert(card.n_experts)
        self._shared, self._domains = shared, {name: d for d, name in enumerate(domains)}
        n_shared_DP = shared.start_DP.cumsum(axis=1)
        self._before_DP = np.pad(
            n_shared_DP, ((0, 0), (1, 0))
        )  # template positions before this one

    def sketches(self, block: RoutingTrace) -> Iterator[tuple[int, NDArray[np.uint16]]]:
        names = [self._domains.get(name, -1) for name in block.domains]
        domain_T = np.array([*names, -1])[block.domain_T]
        known = bool((block.position_T >= 0).all())
        starts_T = np.repeat(block.starts_R, np.diff(block.starts_R, append=block.n_tokens))
        position_T = block.position_T if known else np.arange(block.n_tokens) - starts_T
        near_T = np.minimum(position_T, TEMPLATE_POSITIONS - 1)
        own_T = position_T - self._before_DP[domain_T, near_T]
        own_T = own_T - own_T[starts_T]  # the row's place in its request, the template not counted
        is_own_T = block.executed_T & ~self._shared.rows(block, domain_T)
        is_own_T &= (own_T >= 0) & (own_T < TEMPLATE_POSITIONS)
        place_T = np.where(is_own_T, self._place_P[np.clip(own_T, 0, TEMPLATE_POSITIONS - 1)], -1)
        rows = np.flatnonzero(place_T >= 0)
        ids = block.ids_TLK[rows, self._layer_S[place_T[rows]]].astype(np.int64)
        digest = self._digest_E[np.where(ids == self._nobody, -1, ids)].sum(axis=1, dtype=np.uint64)
        short = (digest >> np.uint64(47)).astype(np.uint16)
        entry = np.where(digest == 0, 0, np.maximum(short, 1)).astype(np.uint16)
        request_of = np.searchsorted(block.starts_R, rows, side="right") - 1
        entry_RS = np.zeros((len(block.starts_R), len(self._layer_S)), np.uint16)
        entry_RS[request_of, place_T[rows]] = entry
        yield from zip(block.request_T[block.starts_R].tolist(), entry_RS, strict=True)


def sketched_rows() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[S] rows of a request's own text, and how many rows each stands for."""
    rows, weights = [np.arange(DENSE_ROWS)], [np.ones(DENSE_ROWS, np.float32)]
    first = DENSE_ROWS
    while first < TEMPLATE_POSITIONS:
        step = first // ROWS_PER_DOUBLING
        rows.append(np.arange(first, 2 * first, step))
        weights.append(np.full(ROWS_PER_DOUBLING, step, np.float32))
        first *= 2
    return np.concatenate(rows), np.concatenate(weights)


def sketched_layers(n_layers: int) -> NDArray[np.int64]:
    """[S]"""
    rows_S, _ = sketched_rows()
    return np.random.default_rng(SEED + 1).integers(0, n_layers, len(rows_S))


def has_near_copy(
    asked: Sketches,
    asked_requests: NDArray[np.int64],
    known: Sketches,
    known_requests: NDArray[np.int64],
    n_layers: int,
) -> NDArray[np.bool_]:
    """[Q] for each of `asked_requests`: is one of `known_requests`, other than itself, a near copy of it?"""
    asked_R, known_R = asked.rows_of(asked_requests), known.rows_of(known_requests)
    is_copy_Q = np.zeros(len(asked_requests), bool)
    if not len(asked_R) or not len(known_R):
        return is_copy_Q
    alike, needed = _bounds(asked, known, n_layers)
    _, weight_S = sketched_rows()
    found_R = _find(
        asked.entry_RS[asked_R], known.entry_RS[known_R], weight_S, asked_R, known_R,
        asked is known, np.float32(alike), np.float32(needed),
    )  # fmt: skip
    is_copy_Q[np.isin(asked_requests, asked.request_R[asked_R[found_R]])] = True
    return is_copy_Q


def _bounds(asked: Sketches, known: Sketches, n_layers: int) -> tuple[float, float]:
    """The share of alike entries that makes a near copy, half-way from chance to all, and how many entries it takes:
    so many that chance has fewer than `FALSE_COPIES` in all pairs (Chernoff's bound).
    """
    entry_RS = (
        known.entry_RS if asked is known else np.concatenate([asked.entry_RS, known.entry_RS])
    )
    chance = min(max(chance_of(entry_RS, n_layers), 1e-3), 1 - 1e-3)
    alike = (1 + chance) / 2
    far = alike * math.log(alike / chance) + (1 - alike) * math.log((1 - alike) / (1 - chance))
    pairs = len(asked.request_R) * len(known.request_R)
    return alike, max(float(LEAST_ROWS), math.log(max(pairs, 1) / FALSE_COPIES) / far)


def chance_of(entry_RS: NDArray[np.uint16], n_layers: int) -> float:
    """How often one layer chooses the same set at two different rows."""
    layer_S, equal, pairs = sketched_layers(n_layers), 0.0, 0.0
    for layer in range(n_layers):
        columns = entry_RS[:, layer_S == layer]
        together, apart = _equal_pairs(columns), [_equal_pairs(column) for column in columns.T]
        equal += together[0] - sum(one[0] for one in apart)
        pairs += together[1] - sum(one[1] for one in apart)
    return equal / pairs if pairs else 1.0


def _equal_pairs(entries: NDArray[np.uint16]) -> tuple[float, float]:
    """Equal pairs and all pairs of what is there."""
    n_E = np.bincount(entries[entries > 0]).astype(float)
    return float((n_E * (n_E - 1)).sum() / 2), float(n_E.sum() * (n_E.sum() - 1) / 2)


@njit(cache=True, nogil=True, fastmath=True)
def _find(asked_QS, known_RS, weight_S, asked_Q, known_R, is_same, alike, needed):  # type: ignore[no-untyped-def]  # fmt: skip
    """[Q] has any known request enough entries in common with it? Fewer effective entries than needed tell nothing."""
    found_Q = np.zeros(len(asked_QS), np.bool_)
    for q in range(len(asked_QS)):
        one = asked_QS[q]
        for r in range(len(known_RS)):
            if is_same and asked_Q[q] == known_R[r]:
                continue
            other = known_RS[r]
            of, square, equal = np.float32(0), np.float32(0), np.float32(0)
            for s in range(len(weight_S)):
                weight = weight_S[s] if one[s] != 0 and other[s] != 0 else np.float32(0)
                of += weight
                square += weight * weight
                equal += weight if one[s] == other[s] else np.float32(0)
            if equal >= alike * of and of * of >= needed * square and of > 0:
                found_Q[q] = True
                break
    return found_Q
