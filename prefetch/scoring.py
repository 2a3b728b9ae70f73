"""Who is scored on what: duplicate requests, the split by request, rows of a shared template, ranks, intervals.

Shared by whoever scores a guess. It knows no predictor and no table. T tokens, R requests, K choices, E experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.agreement import Agreement
from prefetch.trace.routing import DECODE, RoutingTrace, no_expert

TRAIN, TEST, LEFT_OUT = 0, 1, 2  # parts; what is left out repeats an earlier request
FOLDS = 5
TIME_SHARES = (0.6, 0.7)  # of the rows, where a split is in time: train ends, validation ends
TEMPLATE_POSITIONS = 4096  # from the start: later positions are not looked at
TEMPLATE_END = 256  # from the end, where a chat template closes a request
DUPLICATE_ROWS = 8  # shorter requests are equal by chance
SMALLEST_SPLIT = 4  # fewer requests are split in time
DRAWN_AT_ONCE = 1 << 15  # requests, of several draws: what stays in a core's cache
MANY_REQUESTS = 20_000  # of which a ratio is as good as normal: more are not drawn, but computed


@dataclass(frozen=True, eq=False)
class Split:
    """Which part every row plays; decided before anything is counted, so that no batch can change it."""

    kind: str  # requests | time
    test_requests: NDArray[np.int64]
    duplicate_requests: NDArray[np.int64]
    first_test_row: int  # only where the split is in time
    is_template_DP: NDArray[np.bool_]  # [domain, position]; the last domain is "unknown"

    def parts(self, block: RoutingTrace, row_T: NDArray[np.int64]) -> NDArray[np.uint8]:
        """TRAIN, TEST or LEFT_OUT for every row; `row_T` is where it stands in the whole trace."""
        if self.kind == "time":
            parts_T = np.where(row_T >= self.first_test_row, TEST, TRAIN)
        else:
            parts_T = np.where(np.isin(block.request_T, self.test_requests), TEST, TRAIN)
        parts_T[np.isin(block.request_T, self.duplicate_requests)] = LEFT_OUT
        return parts_T.astype(np.uint8)

    def is_template(self, block: RoutingTrace) -> NDArray[np.bool_]:
        """Rows whose text the requests share at their start: what is learnt there says nothing about new text."""
        return template_rows(block, self.is_template_DP)


def template_rows(block: RoutingTrace, is_template_DP: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """By their positions from the start alone."""
    return _at_start(block, block.domain_T.astype(np.int64), is_template_DP)


def _at_start(
    block: RoutingTrace, domain_T: NDArray[np.int64], is_template_DP: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    near_T = (block.position_T >= 0) & (block.position_T < is_template_DP.shape[1])
    return near_T & is_template_DP[domain_T, np.where(near_T, block.position_T, 0)]


@dataclass(frozen=True, eq=False)
class SharedText:
    """Positions at which the requests of a domain hold the same text, from their start and from their end."""

    start_DP: NDArray[np.bool_]  # the last domain is "unknown"
    end_DP: NDArray[np.bool_]  # 0 = the last position of a request

    def rows(
        self, block: RoutingTrace, domain_T: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """`block` holds whole requests; `domain_T`: its domains as they are counted here."""
        domain_T = block.domain_T.astype(np.int64) if domain_T is None else domain_T
        from_end_T = _from_end(block)
        near_T = (from_end_T >= 0) & (from_end_T < self.end_DP.shape[1])
        at_end_T = near_T & self.end_DP[domain_T, np.where(near_T, from_end_T, 0)]
        return _at_start(block, domain_T, self.start_DP) | at_end_T


def _from_end(block: RoutingTrace) -> NDArray[np.int64]:
    """How many positions before the last one of its request a row stands; -1 where positions are not known."""
    stops_R = np.append(block.starts_R[1:], block.n_tokens)
    last_T = np.repeat(block.position_T[stops_R - 1], stops_R - block.starts_R).astype(np.int64)
    return np.where(block.position_T >= 0, last_T - block.position_T, -1)


@dataclass(frozen=True, eq=False)
class Fold:
    """One of several splits into train, validation and test; every request is tested in exactly one of them."""

    number: int
    kind: str  # requests | time
    train: NDArray[np.int64]  # requests, ascending
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    cuts: tuple[int, int]  # rows where validation and test begin, where the split is in time


class Survey:
    """What must be known of all requests before anything is counted: one light pass over the trace."""

    def __init__(self) -> None:
        self.rows = 0
        self.executed_rows = 0
        self.decode_rows = 0  # executed ones
        self.domains: tuple[str, ...] = ()
        self.request_R: list[int] = []
        self.n_rows_R: list[int] = []
        self.domain_R: list[int] = []
        self.digest_R: list[bytes] = []
        self.ran_R: list[bool] = []  # has it a row that was executed?
        self.heads_R: list[tuple[bytes, ...]] = []  # digests of its first 8, 16, 32, ... rows
        self.first_position_R: list[int] = []
        self._nobody = 0
        self._start, self._end = Agreement(TEMPLATE_POSITIONS), Agreement(TEMPLATE_END)

    def add(self, block: RoutingTrace) -> None:
        """`block` holds whole requests."""
        self.domains = block.domains or self.domains
        self._nobody = no_expert(block.card.n_experts)
        self.rows += block.n_tokens
        if not block.n_tokens:
            return
        self.executed_rows += int(block.executed_T.sum())
        self.decode_rows += int((block.executed_T & (block.phase_T == DECODE)).sum())
        starts_R, domain_R = block.starts_R, block.domain_T[block.starts_R].astype(np.int64)
        stops_R = np.append(starts_R[1:], block.n_tokens)
        self.request_R += block.request_T[starts_R].tolist()
        self.n_rows_R += (stops_R - starts_R).tolist()
        self.domain_R += domain_R.tolist()
        self.ran_R += np.logical_or.reduceat(block.executed_T, starts_R).tolist()
        self.first_position_R += block.position_T[starts_R].tolist()
        ids_TLK = np.ascontiguousarray(block.ids_TLK)
        for start, stop in zip(starts_R.tolist(), stops_R.tolist(), strict=True):
            heads, digest = _heads(ids_TLK[start:stop])
            self.heads_R.append(heads)
            self.digest_R.append(digest)
        edges_R = np.append(starts_R, block.n_tokens)
        self._start.meet(ids_TLK, block.position_T, edges_R, domain_R, self._nobody)
        self._end.meet(ids_TLK, _from_end(block), edges_R, domain_R, self._nobody)

    def merge(self, later: Survey) -> None:
        """`later` surveyed what follows in the same trace."""
        self.domains = later.domains or self.domains
        self._nobody = self._nobody or later._nobody
        self._start.merge(later._start, self._nobody)
        self._end.merge(later._end, self._nobody)
        for name in (
            "rows",
            "executed_rows",
            "decode_rows",
            "request_R",
            "n_rows_R",
            "domain_R",
            "digest_R",
            "ran_R",
            "heads_R",
            "first_position_R",
        ):
            setattr(self, name, getattr(self, name) + getattr(later, name))

    def duplicates(self) -> NDArray[np.int64]:
        """Requests whose routing an earlier one repeats to the last choice."""
        seen: set[bytes] = set()
        repeated = []
        for request, rows, digest in zip(self.request_R, self.n_rows_R, self.digest_R, strict=True):
            if rows >= DUPLICATE_ROWS and digest in seen:
                repeated.append(request)
            seen.add(digest)
        return np.array(repeated, np.int64)

    def groups(self, *, beyond_template: bool = False) -> NDArray[np.int64]:
        """[R] the first of the requests that each belongs with: one that holds another's routing, at least half of it.

        A conversation that is sent again with every turn is such a group: one part of a split must hold all of it.
        """
        heads_R = self._own_heads() if beyond_template else self.heads_R
        own = [heads[-1] if heads else None for heads in heads_R]
        first_of: dict[bytes, int] = {}
        for r, head in enumerate(own):
            if head is not None:
                first_of.setdefault(head, r)
        group_R = np.arange(len(own))
        for r, heads in enumerate(heads_R):
            met = [_root(group_R, first_of[head]) for head in heads if head in first_of]
            together = min([_root(group_R, r), *met])
            for other in (*met, _root(group_R, r)):
                group_R[other] = together
        return np.array([_root(group_R, r) for r in range(len(own))], np.int64)

    def _own_heads(self) -> list[tuple[bytes, ...]]:
        """Without the heads that end within the template: there all requests are alike."""
        start_DP, own = self.template(), list[tuple[bytes, ...]]()
        for heads, domain, first in zip(
            self.heads_R, self.domain_R, self.first_position_R, strict=True
        ):
            is_template_P = np.append(start_DP[domain, max(0, first) :], False)
            shared_rows = int(np.argmin(is_template_P)) if first >= 0 else 0
            own.append(tuple(h for i, h in enumerate(heads) if DUPLICATE_ROWS << i > shared_rows))
        return own

    def kept(self) -> NDArray[np.bool_]:
        """[R] has it rows that were run, and is it no repetition?"""
        is_repeated_R = np.isin(np.array(self.request_R, np.int64), self.duplicates())
        return np.array(self.ran_R, bool) & ~is_repeated_R

    def parted(self, kept_R: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The groups that a split may not cut; a long template that all requests share groups nobody, if it would
        leave too few."""
        group_R = self.groups()
        if len(np.unique(group_R[kept_R])) < SMALLEST_SPLIT:
            return self.groups(beyond_template=True)
        return group_R

    def template(self) -> NDArray[np.bool_]:
        """[domain, position] the template that requests begin with."""
        return self._start.shared(self.domain_R, len(self.domains))

    def shared_text(self) -> SharedText:
        """The template that requests begin with, and what they all end with."""
        end_DP = self._end.shared(self.domain_R, len(self.domains))
        return SharedText(self.template(), end_DP)

    def split(self, train_share: float, seed: int) -> Split:
        """By request; in time where there are too few, or where one request is nearly all there is."""
        duplicates = self.duplicates()
        request_R = np.array(self.request_R, np.int64)
        is_unique_R = ~np.isin(request_R, duplicates)
        group_R = self.parted(is_unique_R)
        # a group goes by the number of its first request
        named_R = request_R[group_R] if len(group_R) else request_R
        groups = np.unique(named_R[is_unique_R])
        mixed = np.random.default_rng(seed).permutation(groups)
        n_train = max(1, int(train_share * len(groups)))
        in_time = len(groups) < SMALLEST_SPLIT
        tested = np.sort(request_R[is_unique_R & np.isin(named_R, mixed[n_train:])])
        return Split(
            kind="time" if in_time else "requests",
            test_requests=mixed[:0] if in_time else tested,
            duplicate_requests=duplicates,
            first_test_row=int(train_share * self.rows) if in_time else self.rows,
            is_template_DP=self.template(),
        )

    def folds(self, seed: int) -> list[Fold]:
        """Five by request, of every domain a fair share; one in time, where there are too few requests.

        A fold tests a fifth, validates on half of the next fifth, and trains on the rest.
        """
        request_R, kept_R = np.array(self.request_R, np.int64), self.kept()
        group_R = self.parted(kept_R)
        groups = np.unique(group_R[kept_R])
        if len(groups) < SMALLEST_SPLIT:
            cuts = tuple(int(share * self.executed_rows) for share in TIME_SHARES)
            everything = np.sort(request_R[kept_R])
            return [Fold(0, "time", everything, everything, everything, (cuts[0], cuts[1]))]
        mixed = np.random.default_rng(seed).permutation(groups)
        dealt = mixed[np.argsort(np.array(self.domain_R)[mixed], kind="stable")]
        n = min(FOLDS, len(dealt))
        place = np.arange(len(dealt))
        folds = []
        for number in range(n):
            is_test = place % n == number
            is_validation = (place % n == (number + 1) % n) & (place // n % 2 == 0)
            train, validation, test = (
                np.sort(request_R[kept_R & np.isin(group_R, dealt[chosen])])
                for chosen in (~is_test & ~is_validation, is_validation, is_test)
            )
            folds.append(Fold(number, "requests", train, validation, test, (0, 0)))
        return folds


def _heads(ids_TLK: NDArray[Any]) -> tuple[tuple[bytes, ...], bytes]:
    """Digests of the first 8, 16, 32, ... rows, and of all."""
    digest, done, rows, found = hashlib.blake2b(digest_size=8), 0, DUPLICATE_ROWS, list[bytes]()
    while rows <= len(ids_TLK):
        digest.update(ids_TLK[done:rows].data)
        found.append(digest.digest())
        done, rows = rows, 2 * rows
    digest.update(ids_TLK[done:].data)
    return tuple(found), digest.digest()


def _root(group_R: NDArray[np.int64], r: int) -> int:
    while group_R[r] != r:
        r = int(group_R[r])
    return r


def bootstrap(
    hits_R: NDArray[Any], of_R: NDArray[Any], *, seed: int, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a ratio of sums, by drawing requests with replacement."""
    if len(hits_R) < 2:
        raise ValueError("an interval over requests needs two of them")
    if len(hits_R) > MANY_REQUESTS:
        return _normal_interval(hits_R, of_R, level)
    rng = np.random.default_rng(seed)
    ratios, at_once = np.empty(draws), max(1, DRAWN_AT_ONCE // len(hits_R))
    for first in range(0, draws, at_once):
        drawn_D = ratios[first : first + at_once]
        chosen_DR = rng.integers(0, len(hits_R), (len(drawn_D), len(hits_R)))
        drawn_D[:] = hits_R[chosen_DR].sum(axis=1) / np.maximum(1, of_R[chosen_DR].sum(axis=1))
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _normal_interval(hits_R: NDArray[Any], of_R: NDArray[Any], level: float) -> tuple[float, float]:
    """By the variance of a ratio of sums (Cochran 1977): what drawing very many requests would give."""
    ratio = hits_R.sum() / max(1, of_R.sum())
    spread = np.sqrt(((hits_R - ratio * of_R) ** 2).sum()) / max(1, of_R.sum())
    reach = float(NormalDist().inv_cdf((1 + level) / 2) * spread)
    return float(ratio - reach), float(ratio + reach)
