"""From one layer to a later one, and from one token to the next: joint counts, and what they tell in bits.

Counts are kept whole, for train and test requests apart, so that whoever scores a guess can fit on one part. Requests
that repeat an earlier one are left out. It knows no predictor.
T tokens, L layers, K choices, E experts, H horizons, C row classes, P phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.pairs import (
    CONTROL,
    INFORMATION,
    SKIP,
    Spread,
    check_bytes,
    control,
    count_alone,
    count_margins,
    count_pairs,
    has_both,
    information,
    left_open,
)
from analysis.routing.shifted import Shifted
from analysis.routing.statistics import leading
from analysis.routing.sums import ratio
from prefetch.errors import MissingData
from prefetch.scoring import LEFT_OUT, TRAIN
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import PHASES


class Transitions:
    """`joint_HCLEE[h][c, l, a, b]`: rows of class c with a at layer l and b at layer l + horizon."""

    def __init__(self, plan: Plan, horizons: tuple[int, ...]) -> None:
        card = plan.card
        if min(horizons, default=0) < 1:
            raise ValueError(f"a horizon is at least one layer, got {horizons}")
        self.plan = plan
        self.horizons = tuple(h for h in horizons if h < card.n_layers)
        if not self.horizons:
            raise MissingData("one layer: there is no later layer to go to")
        shapes = [(4, card.n_layers - h, card.n_experts, card.n_experts) for h in self.horizons]
        near = (card.n_layers - 1, card.n_experts) if 1 in self.horizons else (0, card.n_experts)
        counts = plan.pair_type
        n_bytes = Spread.n_bytes(*near) + Shifted.n_bytes(*near, counts)
        check_bytes(n_bytes + sum(counts.itemsize * math.prod(shape) for shape in shapes), card)
        # of horizon 1 only, which is what families and the first page tell
        self.spread, self.shifted = Spread(*near), Shifted(*near, counts)
        self.joint_HCLEE = [np.zeros(shape, counts) for shape in shapes]
        # rows of class c with a at layer l (b at layer l + horizon), of those that have both
        self.here_HCLE = [np.zeros(shape[:3], np.int64) for shape in shapes]
        self.there_HCLE = [np.zeros(shape[:3], np.int64) for shape in shapes]
        self.tokens_HCL = [np.zeros(shape[:2], np.int64) for shape in shapes]
        self._told: dict[tuple[str, int], pd.DataFrame] = {}
        self._listed: dict[int, pd.DataFrame] = {}

    def add(self, batch: Batch) -> None:
        self._told, self._listed = {}, {}
        class_T = _classes(batch)
        witness_T = np.where(batch.is_witness_T, class_T, SKIP).astype(np.uint8)
        ids_LTK = batch.ids_LTK
        alone_L = for_layers(
            lambda layer: _Alone.of(ids_LTK[layer], class_T, batch.nobody, self.plan.card),
            len(ids_LTK),
        )

        def count(layer: int) -> None:
            for h, horizon in enumerate(self.horizons):
                if layer + horizon < len(ids_LTK):
                    later = layer + horizon
                    two = ids_LTK[layer], ids_LTK[later]
                    joint_CEE = self.joint_HCLEE[h][:, layer]
                    count_pairs(two[0], two[1], class_T, batch.nobody, joint_CEE)
                    margins = self._margins(h, layer)
                    if alone_L[layer].is_whole and alone_L[later].is_whole:
                        _add_up(margins, alone_L[layer], alone_L[later])
                    else:
                        count_margins(*two, class_T, batch.nobody, *margins)
                    if horizon == 1:
                        self.spread.add(layer, *two, batch.starts_R, witness_T, batch.nobody)

        for_layers(count, len(ids_LTK) - 1)
        self.shifted.add(batch, class_T)

    def _margins(self, h: int, layer: int) -> _Margins:
        """To be added to."""
        here_CLE, there_CLE, tokens_CL = self.here_HCLE[h], self.there_HCLE[h], self.tokens_HCL[h]
        return here_CLE[:, layer], there_CLE[:, layer], tokens_CL[:, layer]

    def merge(self, later: Transitions) -> None:
        self._told, self._listed = {}, {}
        for name in ("joint_HCLEE", "here_HCLE", "there_HCLE", "tokens_HCL"):
            for mine, other in zip(getattr(self, name), getattr(later, name), strict=True):
                mine += other
        self.spread.merge(later.spread)
        self.shifted.merge(later.shifted)

    def joint(self, horizon: int, phase: str = "all", part: int | None = None) -> NDArray[Any]:
        """[L - horizon, E, E] pair counts over the rows of a phase and a part."""
        return self._sum(self.joint_HCLEE, horizon, phase, part)

    def here(self, horizon: int, phase: str = "all", part: int | None = None) -> NDArray[Any]:
        return self._sum(self.here_HCLE, horizon, phase, part)

    def there(self, horizon: int, phase: str = "all", part: int | None = None) -> NDArray[Any]:
        return self._sum(self.there_HCLE, horizon, phase, part)

    def tokens(self, horizon: int, phase: str = "all", part: int | None = None) -> NDArray[Any]:
        return self._sum(self.tokens_HCL, horizon, phase, part)

    def _sum(self, arrays: list[Any], horizon: int, phase: str, part: int | None) -> NDArray[Any]:
        chosen = arrays[self.horizons.index(horizon)][_chosen(phase, part)]
        total: NDArray[Any] = chosen[0] if len(chosen) == 1 else chosen.sum(axis=0)
        return total

    def table(self) -> pd.DataFrame:
        """One row per phase, horizon and layer pair that any token went through."""
        return pd.concat([self._cell(*cell) for cell in self._cells()], ignore_index=True)

    def _cells(self) -> list[tuple[str, int]]:
        return [(phase, horizon) for phase in self.plan.phases for horizon in self.horizons]

    def pieces(self) -> list[Callable[[], Any]]:
        """What the tables are made of, to be made in any order; kept until more is counted."""
        cells = [partial(self._cell, *cell) for cell in self._cells()]
        return [*cells, *(partial(self._sparse, horizon) for horizon in self.horizons)]

    def _cell(self, phase: str, horizon: int) -> pd.DataFrame:
        if (phase, horizon) not in self._told:
            self._told[phase, horizon] = self._rows(phase, horizon)
        return self._told[phase, horizon]

    def _rows(self, phase: str, horizon: int) -> pd.DataFrame:
        joint_LEE = self.joint(horizon, phase)
        here_LE, there_LE = self.here(horizon, phase), self.there(horizon, phase)
        tokens_L, seed = self.tokens(horizon, phase), (self.plan.seed, horizon, len(phase))
        rows = informed_rows(joint_LEE, here_LE, there_LE, tokens_L, seed)
        shifted_L = self.shifted.bits(phase) if horizon == 1 else np.full(len(rows), np.nan)
        card, layers = self.plan.card, np.arange(len(rows))
        frame = pd.DataFrame(rows).assign(
            phase=phase,
            horizon=horizon,
            later_layer=np.array(card.layer_numbers)[layers + horizon],
            mutual_information_shifted_bits=shifted_L,
        )
        frame = frame.assign(**layer_columns(card, layers))
        return leading(
            frame[frame.tokens > 0], "phase", "horizon", "layer", "later_layer", "tokens"
        )

    def sparse(self) -> pd.DataFrame:
        """The counts themselves: a row per horizon, layer and pair of experts that ever met."""
        return pd.concat([self._sparse(horizon) for horizon in self.horizons], ignore_index=True)

    def _sparse(self, horizon: int) -> pd.DataFrame:
        if horizon not in self._listed:
            self._listed[horizon] = sparse_rows(self, horizon, self.plan.card)
        return self._listed[horizon]


_Margins = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


class _Alone(NamedTuple):
    """What each expert of a layer counts by itself, the same to every other layer where all rows have experts."""

    is_whole: bool
    count_CE: NDArray[np.int64]
    tokens_C: NDArray[np.int64]

    @classmethod
    def of(cls, ids_TK: Any, class_T: Any, nobody: int, card: ModelCard) -> _Alone:
        count_CE, tokens_C = np.zeros((4, card.n_experts), np.int64), np.zeros(4, np.int64)
        return cls(count_alone(ids_TK, class_T, nobody, count_CE, tokens_C), count_CE, tokens_C)


def _add_up(margins: _Margins, here: _Alone, there: _Alone) -> None:
    for total, counted in zip(margins, (here.count_CE, there.count_CE, here.tokens_C), strict=True):
        total += counted


class NextTokens:
    """`joint_CLEE[c, l, a, b]`: a at one token and b at the next of the same request, both at layer l."""

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        self.plan = plan
        shape = (4, card.n_layers, card.n_experts, card.n_experts)
        check_bytes(plan.pair_type.itemsize * math.prod(shape), card)
        self.joint_CLEE = np.zeros(shape, plan.pair_type)
        self.here_CLE = np.zeros(shape[:3], np.int64)
        self.there_CLE = np.zeros(shape[:3], np.int64)
        self.tokens_CL = np.zeros(shape[:2], np.int64)
        self.first_changes_CL = np.zeros(shape[:2], np.int64)
        self.shared_CLK = np.zeros(
            (4, card.n_layers, card.top_k + 1), np.int64
        )  # tokens by overlap
        self._told: dict[str, pd.DataFrame] = {}

    def add(self, batch: Batch) -> None:
        self._told = {}
        class_T = _classes(batch)[1:]  # of the later token
        block = batch.block
        follows_T = (np.diff(block.request_T) == 0) & (np.diff(block.position_T) == 1)
        class_T = np.where(follows_T, class_T, SKIP).astype(np.uint8)
        first_LT = batch.first_choice_LT

        def count(layer: int) -> None:
            ids_TK, first_T = batch.ids_LTK[layer], first_LT[layer]
            nobody, out = batch.nobody, np.s_[:, layer]
            count_pairs(ids_TK[:-1], ids_TK[1:], class_T, nobody, self.joint_CLEE[out])
            margins = self.here_CLE[out], self.there_CLE[out], self.tokens_CL[out]
            count_margins(ids_TK[:-1], ids_TK[1:], class_T, nobody, *margins)
            _count_repeats(
                ids_TK, first_T, class_T, nobody, self.shared_CLK[out], self.first_changes_CL[out]
            )

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: NextTokens) -> None:
        self._told = {}
        for name in (
            "joint_CLEE",
            "here_CLE",
            "there_CLE",
            "tokens_CL",
            "first_changes_CL",
            "shared_CLK",
        ):
            getattr(self, name).__iadd__(getattr(later, name))

    def table(self) -> pd.DataFrame:
        """One row per phase (of the later token) and layer.

        repeat_rate: share of a token's choices that the token before made too. transition_rate: share of the S - 1
        steps of a request at which the first choice changes; persistence is the rest.
        """
        return pd.concat([self._part(phase) for phase in self.plan.phases], ignore_index=True)

    def pieces(self) -> list[Callable[[], Any]]:
        return [partial(self._part, phase) for phase in self.plan.phases]

    def _part(self, phase: str) -> pd.DataFrame:
        if phase not in self._told:
            self._told[phase] = self._rows(phase)
        return self._told[phase]

    def _rows(self, phase: str) -> pd.DataFrame:
        chosen = _chosen(phase, None)
        here_LE, there_LE = self.here_CLE[chosen].sum(axis=0), self.there_CLE[chosen].sum(axis=0)
        tokens_L = self.tokens_CL[chosen].sum(axis=0)
        joint_LEE = self.joint_CLEE[chosen].sum(axis=0)
        rows = informed_rows(
            joint_LEE, here_LE, there_LE, tokens_L, (self.plan.seed, 0, len(phase))
        )
        shared_LK = self.shared_CLK[chosen].sum(axis=0)
        changed_L = self.first_changes_CL[chosen].sum(axis=0)
        frame = pd.DataFrame(rows).assign(**layer_columns(self.plan.card, np.arange(len(rows))))
        frame = frame.assign(phase=phase, **_repeats(shared_LK, changed_L, there_LE, tokens_L))
        return leading(frame[frame.tokens > 0], "phase", "layer", "tokens", *REPEATS)

    def repeat_rate(self) -> float:
        """Mean over layers: share of a token's choices that the token before made too; NaN where none follows."""
        return float(self._rows("all").repeat_rate.mean())


REPEATS = (
    "repeat_rate",
    "expected_repeat",
    "transition_rate",
    "persistence",
    "jaccard",
    "same_set",
)


def _repeats(
    shared_LK: NDArray[Any],
    changed_L: NDArray[Any],
    there_LE: NDArray[Any],
    tokens_L: NDArray[Any],
) -> dict[str, NDArray[Any]]:
    shared_K = np.arange(shared_LK.shape[1])
    top_k = shared_K[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        chosen_L = there_LE.sum(axis=1)
        transition_L = changed_L / tokens_L
        return {
            "repeat_rate": shared_LK @ shared_K / chosen_L,
            # of two different ones among the tokens that were compared; one token repeats itself and tells nothing
            "expected_repeat": ratio(
                (there_LE * (there_LE - 1)).sum(axis=1), (tokens_L - 1) * chosen_L
            ),
            "transition_rate": transition_L,
            "persistence": 1 - transition_L,
            "jaccard": shared_LK @ (shared_K / (2 * top_k - shared_K)) / tokens_L,
            "same_set": shared_LK[:, -1] / tokens_L,
        }


CORRECTED = (INFORMATION[0], "conditional_entropy_bits", INFORMATION[1], CONTROL[0])
INFORMED = (*CORRECTED[:3], *INFORMATION[2:], *CONTROL)


def informed_rows(
    joint_LEE: NDArray[Any],
    here_LE: NDArray[Any],
    there_LE: NDArray[Any],
    tokens_L: NDArray[Any],
    seed: tuple[int, ...],
) -> list[dict[str, float]]:
    """What each layer's joint counts tell, with the control; a row of NaN where no token went."""

    def row(layer: int) -> dict[str, float]:
        tokens = int(tokens_L[layer])
        if not tokens:
            return dict.fromkeys(("tokens", *INFORMED), 0.0)
        rng = np.random.default_rng((*seed, layer))
        margins = here_LE[layer], there_LE[layer], tokens
        told = information(joint_LEE[layer], here_LE[layer], there_LE[layer])
        told |= control(*margins, rng)
        told["conditional_entropy_bits"] = left_open(told)
        if tokens == 1:  # one token tells nothing of others
            told |= dict.fromkeys(CORRECTED, np.nan)
        return {"tokens": tokens} | {name: told[name] for name in INFORMED}

    return for_layers(row, len(joint_LEE))


def sparse_rows(counted: Transitions, horizon: int, card: ModelCard) -> pd.DataFrame:
    joint_LEE = counted.joint(horizon)
    layer, here, there = np.nonzero(joint_LEE)
    numbers = np.array(card.layer_numbers, np.int32)
    frame = pd.DataFrame(
        {
            "horizon": np.full(len(layer), horizon, np.int16),
            **layer_columns(card, layer),
            "later_layer": numbers[layer + horizon],
            "expert": here.astype(np.uint16),
            "later_expert": there.astype(np.uint16),
            "count": joint_LEE[layer, here, there],
        }
    )
    train_LEE = counted.joint(horizon, part=TRAIN)
    return frame.assign(train_count=train_LEE[layer, here, there])


def _classes(batch: Batch) -> NDArray[np.uint8]:
    """Part and phase as one number from 0 to 3; rows that repeat an earlier request are skipped."""
    class_T = 2 * batch.part_T + batch.block.phase_T
    return np.where(batch.part_T == LEFT_OUT, SKIP, class_T).astype(np.uint8)


def _chosen(phase: str, part: int | None) -> NDArray[np.bool_]:
    class_C = np.arange(4)
    chosen = np.ones(4, bool) if part is None else class_C // 2 == part
    return chosen if phase == "all" else chosen & (class_C % 2 == PHASES.index(phase))


@njit(cache=True, nogil=True)
def _count_repeats(ids_TK, first_T, class_T, nobody, shared_CK, changes_C):  # type: ignore[no-untyped-def]
    """Over the same steps as the margins; the first choice of a row that has an expert names one."""
    for t in range(ids_TK.shape[0] - 1):
        c = class_T[t]
        if c >= shared_CK.shape[0] or not has_both(ids_TK[t], ids_TK[t + 1], nobody):
            continue
        shared = 0
        for i in range(ids_TK.shape[1]):
            if ids_TK[t, i] == nobody:
                continue
            for j in range(ids_TK.shape[1]):
                if ids_TK[t, i] == ids_TK[t + 1, j]:
                    shared += 1
        shared_CK[c, shared] += 1
        changes_C[c] += first_T[t] != first_T[t + 1]


def transitions(trace: Traceable, horizons: tuple[int, ...] = (1, 2, 3, 4)) -> pd.DataFrame:
    """What a layer's experts tell of those of a later layer, per phase, horizon and layer pair."""
    plan = plan_of(trace)
    counted = Transitions(plan, horizons)
    accumulate(trace, plan, [counted])
    return counted.table()


def next_tokens(trace: Traceable) -> pd.DataFrame:
    """What a token's experts tell of the next token's in the same layer, per phase."""
    plan = plan_of(trace)
    counted = NextTokens(plan)
    accumulate(trace, plan, [counted], *plan.recorded("weights"))
    return counted.table()
