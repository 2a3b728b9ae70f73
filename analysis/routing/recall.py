"""How much of a later layer's routing the best guesses from counts can hold: fitted on train requests, scored on test.

Popularity, the previous token's experts, first-order Markov counts, and Markov counts after shuffling (the control).
A second pass over the trace: the counts must be complete before anything is scored. It knows no learned predictor.
L layers, E experts, K choices, W width, C row classes, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.pairs import SKIP, shuffled
from analysis.routing.ranks import rank_drawn, rank_known, rank_markov
from analysis.routing.statistics import Usage, leading
from analysis.routing.transitions import Transitions
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN, bootstrap
from prefetch.trace.blocks import Traceable
from prefetch.trace.routing import PHASES

SMOOTHING = 0.5  # how many rows of popularity every expert's row of the Markov table starts with
PREDICTORS = ("popularity", "previous_token", "markov", "markov_shuffled")
INTERVALS = PREDICTORS[:3]
CLASSES = 4  # phase, then template or not
CONTROL_ROWS = (
    1 << 14
)  # so many rows fix the mean of the control to a thousandth; few test rows count repeatedly
ENOUGH_REQUESTS = 10  # fewer give an interval that is far too narrow
GUIDE = 256  # steps of the table that tells where in a cdf to look


@dataclass(frozen=True)
class _Rows:
    """What of a batch is scored: its class, SKIP for the rest, and the request as a number within the batch."""

    class_T: NDArray[np.uint8]
    follows_T: NDArray[np.bool_]  # the row before it is the token before it
    number_T: NDArray[np.int64]
    is_test_R: NDArray[np.bool_]

    @property
    def n_requests(self) -> int:
        return len(self.is_test_R)

    @classmethod
    def of(cls, batch: Batch) -> _Rows:
        block = batch.block
        class_T = np.where(batch.part_T == TEST, 2 * block.phase_T + batch.is_template_T, SKIP)
        follows_T = np.zeros(len(class_T), bool)
        follows_T[1:] = (np.diff(block.request_T) == 0) & (np.diff(block.position_T) == 1)
        lengths_R = np.diff(np.append(batch.starts_R, len(class_T)))
        number_T = np.repeat(np.arange(len(lengths_R)), lengths_R)
        is_test_R = np.bincount(number_T, weights=class_T != SKIP) > 0
        return cls(class_T.astype(np.uint8), follows_T, number_T, is_test_R)


_Known = tuple[NDArray[np.int64], NDArray[np.int64]]  # [2, C, E] ranks, [P, R] hits of requests


class Recall:
    """`..._CLE[c, l, r]`: choices of test rows of class c that a predictor ranked r-th, per layer (pair)."""

    given: ClassVar[tuple[str, ...]] = ("chance", "control", "rank_LE")

    def __init__(self, plan: Plan, usage: Usage, counted: Transitions) -> None:
        card = plan.card
        self.plan, self.horizons = plan, counted.horizons
        train_LE = usage.counts(part=TRAIN)
        if not train_LE.any() or not usage.counts(part=TEST).any():
            raise MissingData(
                "one part of the split is empty: a guess needs rows to learn from and others to be scored on"
            )
        self.chance = {h: _chances(counted, train_LE, h) for h in self.horizons}
        self.control = {h: _control(plan, counted, h) for h in self.horizons}
        self.rank_LE = np.argsort(
            np.argsort(-train_LE, axis=1, kind="stable"), axis=1, kind="stable"
        )
        self.control_share = CONTROL_ROWS / max(1, int(usage.tokens(part=TEST).max()))
        shape = CLASSES, card.n_layers, card.n_experts
        # popularity, previous token, Markov, control; the pair of layer l - horizon and l stands at l - horizon
        self.ranks_HPCLE = np.zeros((len(self.horizons), len(PREDICTORS), *shape), np.int64)
        # per test request and horizon: choices within K guesses by predictor, then choices; for intervals
        self.request_HPR = np.zeros((len(self.horizons), len(INTERVALS) + 1, 0), np.int64)
        self._drawn: pd.DataFrame | None = None

    def add(self, batch: Batch) -> None:
        self._drawn = None
        rows = _Rows.of(batch)
        if (rows.class_T == SKIP).all():
            return
        known = self._rank_known(batch, rows)
        scored_HPR = np.stack(
            [self._rank(batch, rows, h, known) for h in range(len(self.horizons))]
        )
        self.request_HPR = np.concatenate(
            [self.request_HPR, scored_HPR[:, :, rows.is_test_R]], axis=2
        )

    def _rank_known(self, batch: Batch, rows: _Rows) -> list[_Known] | None:
        """What popularity and the previous token score at every layer: the same from wherever it is guessed, where
        every row has experts at all of them. Else None: each pair of layers has its own rows.
        """
        if len(self.horizons) == 1 or (batch.ids_LTK == batch.nobody).any():
            return None
        return for_layers(
            lambda layer: self._known(batch, rows, layer, rows.class_T), self.plan.card.n_layers
        )

    def _known(self, batch: Batch, rows: _Rows, layer: int, class_T: NDArray[np.uint8]) -> _Known:
        ranks_PCE = np.zeros((2, CLASSES, self.plan.card.n_experts), np.int64)
        request_PR = np.zeros((len(INTERVALS) + 1, rows.n_requests), np.int64)
        given = rows.follows_T, self.rank_LE[layer], class_T, rows.number_T, batch.nobody
        rank_known(batch.ids_LTK[layer], *given, ranks_PCE, request_PR)
        return ranks_PCE, request_PR

    def _rank(
        self, batch: Batch, rows: _Rows, h: int, known: list[_Known] | None
    ) -> NDArray[np.int64]:
        """Every layer pair of one horizon, all predictors on the same rows: those with an expert at both layers.

        Returns what each request scored by predictor, then its choices.
        """
        horizon, nobody = self.horizons[h], batch.nobody
        control_LEE, rest_LE = self.control[horizon]

        def score(layer: int) -> NDArray[np.int64]:
            here, there = batch.ids_LTK[layer], batch.ids_LTK[layer + horizon]
            ranks_PCE, class_T = self.ranks_HPCLE[h, :, :, layer], rows.class_T
            if known is None:
                class_T = np.where((here != nobody).any(axis=1), class_T, SKIP).astype(np.uint8)
                known_PCE, request_PR = self._known(batch, rows, layer + horizon, class_T)
            else:
                known_PCE, request_PR = known[layer + horizon][0], known[layer + horizon][1].copy()
            ranks_PCE[:2] += known_PCE
            chance_EE = self.chance[horizon][layer]
            given = class_T, rows.number_T, nobody
            rank_markov(here, there, chance_EE, *given, ranks_PCE[2], request_PR[2])
            seed = np.uint64(hash_of(self.plan.seed, horizon, layer))
            guide = np.searchsorted(rest_LE[layer], np.arange(GUIDE) / GUIDE, side="right")
            drawn = batch.row_T, seed, self.control_share, class_T, nobody
            control = control_LEE[layer], rest_LE[layer], guide
            rank_drawn(here, there, *control, *drawn, ranks_PCE[3])
            return request_PR

        per_layer = for_layers(score, self.plan.card.n_layers - horizon)
        return np.sum(per_layer, axis=0, dtype=np.int64) if per_layer else _nothing(rows)

    def merge(self, later: Recall) -> None:
        self._drawn = None
        self.ranks_HPCLE += later.ranks_HPCLE
        self.request_HPR = np.concatenate([self.request_HPR, later.request_HPR], axis=2)

    def recall(
        self, predictor: str, horizon: int, width: int, part: str = "all"
    ) -> NDArray[np.float64]:
        """Recall@width of every layer pair; NaN where nothing was scored."""
        return self._curve(predictor, horizon, part)[:, width - 1]

    def _curve(self, predictor: str, horizon: int, part: str) -> NDArray[np.float64]:
        h, p = self.horizons.index(horizon), PREDICTORS.index(predictor)
        ranks_CLE = self.ranks_HPCLE[h, p, :, : max(0, self.plan.card.n_layers - horizon)]
        ranks_LE = ranks_CLE[_chosen(part)].sum(axis=0)
        total_L = ranks_LE.sum(axis=1, keepdims=True)
        held_LE = np.cumsum(ranks_LE, axis=1)
        return np.divide(held_LE, total_L, out=np.full(held_LE.shape, np.nan), where=total_L > 0)

    def interval(self, predictor: str, horizon: int) -> tuple[float, float]:
        """Of the mean recall@K over layer pairs, bootstrapped over test requests; NaN where they are too few for that.

        What is drawn is the recall over all choices; pairs that some tokens skip make it differ from the mean, by which
        the interval is moved.
        """
        scored_PR = self.request_HPR[self.horizons.index(horizon)]
        scored_PR = scored_PR[:, scored_PR[-1] > 0]
        if scored_PR.shape[1] < ENOUGH_REQUESTS or predictor not in INTERVALS:
            return float("nan"), float("nan")
        hits_R, of_R = scored_PR[INTERVALS.index(predictor)], scored_PR[-1]
        low, high = bootstrap(hits_R, of_R, seed=self.plan.seed)
        mean = np.nanmean(self.recall(predictor, horizon, self.plan.card.top_k))
        moved = float(mean - hits_R.sum() / of_R.sum())
        return max(0.0, low + moved), min(1.0, high + moved)

    def parts(self) -> tuple[str, ...]:
        """Which rows recall is told for: those of a template shared by the requests stand apart."""
        template = self.plan.split.is_template_DP.any()
        return (*self.plan.phases, *(("new_text", "template") if template else ()))

    def _told(self, part: str) -> tuple[str, ...]:
        """The control is drawn over the whole trace: it says nothing of a part."""
        return PREDICTORS if part == "all" else INTERVALS

    def table(self) -> pd.DataFrame:
        """One row per part, horizon, layer pair, predictor, and width K, 2K and 4K."""
        k, n_experts = self.plan.card.top_k, self.plan.card.n_experts
        widths = sorted({min(n_experts, times * k) for times in (1, 2, 4)})
        frame = self._curves()
        return frame[frame.width.isin(widths)].reset_index(drop=True)

    def curve(self) -> pd.DataFrame:
        """The same for every width."""
        return self._curves().copy()

    def _curves(self) -> pd.DataFrame:
        if self._drawn is None:
            frames = [
                self._rows(part, horizon, predictor)
                for part in self.parts()
                for horizon in self.horizons
                for predictor in self._told(part)
            ]
            self._drawn = pd.concat(frames, ignore_index=True)
        return self._drawn

    def _rows(self, part: str, horizon: int, predictor: str) -> pd.DataFrame:
        curve_LW = self._curve(predictor, horizon, part)
        layers = np.flatnonzero(~np.isnan(curve_LW[:, 0]))
        slot, width = np.repeat(layers, curve_LW.shape[1]), np.arange(curve_LW.shape[1]) + 1
        frame = pd.DataFrame(
            {
                **layer_columns(self.plan.card, slot),
                "later_layer": np.array(self.plan.card.layer_numbers)[slot + horizon],
                "width": np.tile(width, len(layers)),
                "recall": curve_LW[layers].ravel(),
            }
        )
        frame = frame.assign(part=part, horizon=horizon, predictor=predictor)
        return leading(frame, "part", "horizon", "predictor")

    def summary(self) -> pd.DataFrame:
        """Mean over layer pairs at width K, with the interval: one row per part, horizon and predictor."""
        rows = []
        for part in self.parts():
            for horizon in self.horizons:
                for predictor in self._told(part):
                    recalls_L = self.recall(predictor, horizon, self.plan.card.top_k, part)
                    known_L = recalls_L[~np.isnan(recalls_L)]
                    low, high = (
                        self.interval(predictor, horizon) if part == "all" else (np.nan, np.nan)
                    )
                    cell = {"part": part, "horizon": horizon, "predictor": predictor}
                    mean = known_L.mean() if len(known_L) else np.nan
                    rows.append({**cell, "recall_at_k": mean, "low": low, "high": high})
        return pd.DataFrame(rows)


def _chosen(part: str) -> NDArray[np.bool_]:
    class_C = np.arange(CLASSES)
    if part in ("template", "new_text"):
        return class_C % 2 == (part == "template")
    return np.ones(CLASSES, bool) if part == "all" else class_C // 2 == PHASES.index(part)


def hash_of(*numbers: int) -> int:
    """The same 64 bits for the same numbers, on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _chances(counted: Transitions, train_LE: NDArray[Any], horizon: int) -> NDArray[np.float32]:
    return smoothed(counted.joint(horizon, part=TRAIN), train_LE[horizon:])


def smoothed(joint_LEE: NDArray[Any], popular_LE: NDArray[Any]) -> NDArray[np.float32]:
    """P[l, a, b]: chance of b at the later layer given a, every row started with some popularity."""
    share_LE = popular_LE / np.maximum(popular_LE.sum(axis=1, keepdims=True), 1)
    above_LEE = joint_LEE + SMOOTHING * share_LE[:, None, :]
    chance_LEE = above_LEE / (joint_LEE.sum(axis=2, keepdims=True) + SMOOTHING)
    return chance_LEE.astype(np.float32)


def _control(
    plan: Plan, counted: Transitions, horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Markov chances and what is left for the test rows (a cdf), had the later layer's rows been permuted.

    Exactly what a permutation does, without keeping a row: which of the later layer's rows meet the train rows is drawn
    first, then whom each expert meets among those; the test rows get the rest.
    """
    here_LE, there_LE = counted.here(horizon, part=TRAIN), counted.there(horizon)
    train_L, tokens_L = counted.tokens(horizon, part=TRAIN), counted.tokens(horizon)

    def draw(layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        rng = np.random.default_rng((plan.seed, horizon, layer, 1))
        there_E, train, tokens = there_LE[layer], int(train_L[layer]), int(tokens_L[layer])
        met_E = rng.hypergeometric(there_E, tokens - there_E, train) if train else there_E * 0
        joint_EE = (
            shuffled(here_LE[layer], met_E, train, rng) if train else np.zeros((len(met_E),) * 2)
        )
        chance_EE = smoothed(joint_EE[None], met_E[None])[0]
        rest_E = np.cumsum(there_E - met_E)
        if not rest_E[-1]:  # each expert is drawn by itself: of few rows, all may have been met
            rest_E = np.cumsum(there_E)
        return chance_EE, rest_E / max(1, rest_E[-1])

    drawn = for_layers(draw, len(here_LE))
    return np.stack([chance_EE for chance_EE, _ in drawn]), np.stack(
        [rest_E for _, rest_E in drawn]
    )


def _nothing(rows: _Rows) -> NDArray[np.int64]:
    return np.zeros((len(INTERVALS) + 1, rows.n_requests), np.int64)


def recall_from_counts(trace: Traceable, horizons: tuple[int, ...] = (1, 2, 3, 4)) -> pd.DataFrame:
    """Recall of popularity, the previous token and Markov counts, per part, horizon, layer pair and width."""
    plan = plan_of(trace)
    usage, counted = Usage(plan), Transitions(plan, horizons)
    accumulate(trace, plan, [usage, counted])
    scored = Recall(plan, usage, counted)
    accumulate(trace, plan, [scored], title="scoring")
    return scored.table()
