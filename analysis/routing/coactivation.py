"""Which experts of one layer are chosen together: pair counts, lift against chance, clusters.

Chance is what the number of choices per token leaves: a token that took one expert has only k - 1 choices left, so
c_a c_b / T would call almost every pair repelled. It knows no other layer and no token order.
L layers, E experts, K choices, C parts (train, test), N pairs a < b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.pairs import SKIP, Spread, check_bytes
from analysis.routing.significance import ENOUGH, FEWEST_REQUESTS, q_values, tail, z_values
from analysis.routing.statistics import leading
from analysis.routing.sums import ratio
from prefetch.errors import MissingData
from prefetch.scoring import LEFT_OUT, TEST, TRAIN
from prefetch.trace.blocks import Traceable

SIGNIFICANCE = 0.01
SIZES = (2, 3, 4, 6, 8, 12, 16)  # numbers of clusters that are tried
FEWEST = 4  # used experts that a layer must have to be clustered
HALVINGS = 64  # of the bracket: down to the last bit of a double


class CoActivation:
    """`pairs_CLEE()[c, l, a, b]`: tokens of part c that chose a and b at layer l; on the diagonal those with a."""

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        if card.top_k == 1:
            raise MissingData("one expert per token: nothing is chosen together")
        self.plan = plan
        self._groups = (
            plan.phases[1:] or plan.phases
        )  # counted apart; what all rows show is their sum
        shape = (2 * len(self._groups), card.n_layers, card.n_experts, card.n_experts)
        n_bytes = len(plan.phases) * Spread.n_bytes(card.n_layers, card.n_experts)
        check_bytes(plan.pair_type.itemsize * math.prod(shape) + n_bytes, card)
        # of group g and part c at 2 g + c; each pair once, where its first expert stood
        self._half_CLEE = np.zeros(shape, plan.pair_type)
        self._tokens_CL = np.zeros(shape[:2], np.int64)
        self.spreads = {phase: Spread(card.n_layers, card.n_experts) for phase in plan.phases}
        self._compared: dict[str, tuple[_Compared, _Compared, _Compared]] = {}

    def add(self, batch: Batch) -> None:
        self._compared = {}
        phase_T, is_kept_T = batch.block.phase_T, batch.part_T != LEFT_OUT
        group_T = phase_T if len(self._groups) > 1 else np.zeros_like(phase_T)
        class_T = np.where(is_kept_T, 2 * group_T + batch.part_T, SKIP).astype(np.uint8)
        told = {
            phase: np.where(batch.is_of(phase) & batch.is_witness_T & is_kept_T, 0, SKIP)
            for phase in self.spreads
        }

        def count(layer: int) -> None:
            half_CEE, tokens_C = self._half_CLEE[:, layer], self._tokens_CL[:, layer]
            ids_TK = batch.ids_LTK[layer]
            _count_together(ids_TK, class_T, batch.nobody, half_CEE, tokens_C)
            for phase, spread in self.spreads.items():
                of_T = told[phase].astype(np.uint8)
                spread.add(layer, ids_TK, ids_TK, batch.starts_R, of_T, batch.nobody)

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: CoActivation) -> None:
        self._compared = {}
        self._half_CLEE += later._half_CLEE
        self._tokens_CL += later._tokens_CL
        for phase, spread in self.spreads.items():
            spread.merge(later.spreads[phase])

    def pairs_CLEE(self, phase: str = "all") -> NDArray[Any]:
        """Symmetric; what repeats an earlier request is in neither part."""
        half_CLEE = self._of(self._half_CLEE, phase)
        whole_CLEE: NDArray[Any] = half_CLEE + half_CLEE.swapaxes(2, 3)
        each = np.arange(whole_CLEE.shape[-1])
        whole_CLEE[..., each, each] //= 2
        return whole_CLEE

    def tokens_CL(self, phase: str = "all") -> NDArray[np.int64]:
        return self._of(self._tokens_CL, phase)

    def _of(self, counts_C: NDArray[Any], phase: str) -> NDArray[Any]:
        """Train and test."""
        groups = [g for g, name in enumerate(self._groups) if phase in ("all", name)]
        return sum((counts_C[2 * g : 2 * g + 2] for g in groups[1:]), counts_C[2 * groups[0] :][:2])

    def pairs(self, phase: str = "all") -> pd.DataFrame:
        """One row per layer and pair that was seen, or that chance would have shown.

        `z` and `q_value` are over all tokens, but the tokens of one request are not independent: the variance is
        multiplied by `design_effect`, by how much more the pair's excess spreads over requests than with independent
        tokens (1 at least), and a pair is tested where `expected` / `design_effect` is 5 or more. `is_significant`:
        q < 0.01 in the train and in the test part, in the same direction. Fewer than 10 requests do not tell: the three
        columns are empty then, and no pair is significant.
        """
        all_, train, test = self._compare(phase)
        layer, pair = np.nonzero((all_.count_LN > 0) | (all_.expected_LN >= ENOUGH))
        one_N, other_N = np.triu_indices(self.plan.card.n_experts, 1)
        columns = {
            **layer_columns(self.plan.card, layer),
            "expert_a": one_N[pair].astype(np.uint16),
            "expert_b": other_N[pair].astype(np.uint16),
            "count": all_.count_LN[layer, pair],
            "expected": all_.expected_LN[layer, pair],
            "lift": all_.lift_LN[layer, pair],
            "design_effect": all_.effect_LN[layer, pair],
            "z": all_.z_LN[layer, pair],
            "q_value": all_.q_LN[layer, pair],
            "lift_train": train.lift_LN[layer, pair],
            "lift_test": test.lift_LN[layer, pair],
            "is_significant": _agreed(train, test)[layer, pair],
        }
        return pd.DataFrame(columns)

    def table(self) -> pd.DataFrame:
        """The summaries of the phases, one below the other."""
        frames = [self.summary(phase).assign(phase=phase) for phase in self.plan.phases]
        return leading(pd.concat(frames, ignore_index=True), "phase")

    def pieces(self) -> list[Callable[[], Any]]:
        """What the tables are made of, to be made in any order."""
        return [partial(self._compare, phase) for phase in self.plan.phases]

    def summary(self, phase: str = "all") -> pd.DataFrame:
        """One row per layer; the strongest lift is that of a pair frequent enough to be tested.

        What is significant is empty with fewer than 10 requests, which do not tell; `design_effect` is the median.
        """
        all_, train, test = self._compare(phase)
        agreed_LN, requests_L = _agreed(train, test), self.spreads[phase].requests_L
        tested_LN = ~np.isnan(all_.q_LN)
        lift_LN = np.where(tested_LN, all_.lift_LN, -np.inf)
        strongest_L = lift_LN.argmax(axis=1)
        is_known_L = tested_LN.any(axis=1)
        is_told_L = requests_L >= FEWEST_REQUESTS
        pairs_LEE = self.pairs_CLEE(phase).sum(axis=0)
        used_L = (np.diagonal(pairs_LEE, axis1=1, axis2=2) > 0).sum(axis=1)
        one_N, other_N = np.triu_indices(self.plan.card.n_experts, 1)
        columns = {
            **layer_columns(self.plan.card, np.arange(len(used_L))),
            "tokens": self.tokens_CL(phase).sum(axis=0),
            "requests": requests_L,
            "design_effect": np.where(is_told_L, np.median(all_.effect_LN, axis=1), np.nan),
            "pairs_possible": used_L * (used_L - 1) // 2,
            "pairs_tested": tested_LN.sum(axis=1),
            "pairs_significant": _where(is_told_L, agreed_LN.sum(axis=1)),
            "pairs_attracted": _where(is_told_L, (agreed_LN & (all_.z_LN > 0)).sum(axis=1)),
            "strongest_lift": np.where(is_known_L, lift_LN.max(axis=1), np.nan),
            "expert_a": _where(is_known_L, one_N[strongest_L]),
            "expert_b": _where(is_known_L, other_N[strongest_L]),
            "mean_abs_log2_lift": _strength(all_),
        }
        return pd.DataFrame(columns)

    def clusters(self, most: int = 16) -> pd.DataFrame:
        """Experts that are chosen together more than with others: a cluster number per layer and used expert.

        Average linkage on the distance 1 / (1 + lift): a half at chance, 1 for a pair that never meets. The lift is
        shrunk towards chance, by `ENOUGH` pairs, so that rare ones do not decide. As many clusters as have the best
        silhouette; cluster 0 carries the largest load.
        """
        pairs_LEE = self.pairs_CLEE().sum(axis=0)
        found = for_layers(lambda layer: _cluster(pairs_LEE[layer], most), len(pairs_LEE))
        frames = [rows.assign(slot=layer) for layer, rows in enumerate(found)]
        whole = pd.concat(frames, ignore_index=True)
        columns = layer_columns(self.plan.card, whole.pop("slot").to_numpy())
        return leading(whole.assign(**columns), *columns)

    def _compare(self, phase: str) -> tuple[_Compared, _Compared, _Compared]:
        """All tokens, the train part, the test part; kept until more is counted."""
        if phase not in self._compared:
            pairs_CLEE, tokens_CL = self.pairs_CLEE(phase), self.tokens_CL(phase)
            parts = (
                (pairs_CLEE.sum(axis=0), tokens_CL.sum(axis=0)),
                *zip(pairs_CLEE[[TRAIN, TEST]], tokens_CL[[TRAIN, TEST]], strict=True),
            )

            def compare(layer: int) -> list[_Compared]:
                of = [(pairs_LEE[layer], tokens_L[layer]) for pairs_LEE, tokens_L in parts]
                spread = self.spreads[phase]
                # from all requests: those of the test part alone would be too few
                effect_N = _effects(spread, layer, *of[0])
                return [_Compared.of(*part, effect_N, spread.requests_L[layer]) for part in of]

            all_, train, test = zip(*for_layers(compare, len(pairs_CLEE[0])), strict=True)
            whole = _Compared.whole
            self._compared[phase] = whole(all_), whole(train), whole(test)
        return self._compared[phase]


def _effects(
    spread: Spread, layer: int, pairs_EE: NDArray[Any], tokens: int
) -> NDArray[np.float64]:
    used_E = pairs_EE.diagonal()
    x_E = factors((pairs_EE.sum(axis=1) - used_E)[None])[0]
    given = used_E, used_E, np.outer(x_E, x_E), int(tokens)
    return spread.effects(layer, pairs_EE, *given)[np.triu_indices(len(pairs_EE), 1)]


@njit(cache=True, nogil=True)
def _count_together(ids_TK, class_T, nobody, half_CEE, tokens_C):  # type: ignore[no-untyped-def]
    """Every pair of a row once, in the order of the row: half the work of a symmetric table."""
    for t in range(ids_TK.shape[0]):
        c = class_T[t]
        if c >= half_CEE.shape[0]:
            continue
        is_used = False
        for i in range(ids_TK.shape[1]):
            a = ids_TK[t, i]
            if a == nobody:
                continue
            is_used = True
            row_E = half_CEE[c, a]
            row_E[a] += 1
            for j in range(i + 1, ids_TK.shape[1]):
                b = ids_TK[t, j]
                if b != nobody and b != a:
                    row_E[b] += 1
        tokens_C[c] += is_used


@dataclass(frozen=True, eq=False)
class _Compared:
    """Pair counts beside what chance would give, for the pairs a < b: of one layer, or of all."""

    count_LN: NDArray[Any]
    expected_LN: NDArray[np.float64]
    lift_LN: NDArray[np.float64]
    effect_LN: NDArray[np.float64]  # NaN, and all that follows, where too few requests tell
    z_LN: NDArray[np.float64]
    q_LN: NDArray[np.float64]  # NaN where chance gives too few pairs to test

    @classmethod
    def whole(cls, layers: Sequence[_Compared]) -> _Compared:
        return cls(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, layers), strict=True)))

    @classmethod
    def of(
        cls, pairs_EE: NDArray[Any], tokens: int, effect_N: NDArray[np.float64], requests: int
    ) -> _Compared:
        one_N, other_N = np.triu_indices(len(pairs_EE), 1)
        count_N = pairs_EE[one_N, other_N]
        used_E = pairs_EE.diagonal()
        x_E = factors((pairs_EE.sum(axis=1) - used_E)[None])[0]
        expected_N = x_E[one_N] * x_E[other_N]
        absent_E = 1 - used_E / max(int(tokens), 1)
        # given how often each is used, b falls on the tokens of a as balls drawn without replacement
        variance_N = expected_N * absent_E[one_N] * absent_E[other_N]
        z_N = z_values(count_N, expected_N, variance_N) / np.sqrt(effect_N)
        is_tested_N = expected_N / effect_N >= ENOUGH
        p_N = np.full(len(z_N), np.nan)
        p_N[is_tested_N] = 2 * tail(np.abs(z_N[is_tested_N]), requests)
        lift_N, q_N = ratio(count_N, expected_N), q_values(p_N[None])[0]
        return cls(*(a[None] for a in (count_N, expected_N, lift_N, effect_N, z_N, q_N)))


def _arrays(one: _Compared) -> tuple[NDArray[Any], ...]:
    return tuple(vars(one).values())


@njit(cache=True, nogil=True)
def factors(partners_LE):  # type: ignore[no-untyped-def]
    """x such that chance pairs x_a x_b, a and b apart, leave every expert its number of partners; 0 where it has none.

    The quasi-independence model of a table without diagonal (Goodman 1968). Given S, the sum of x, every x_a is a
    root of x (S - x) = partners_a; so only S is sought, by bisection. At most the busiest needs the larger root.
    """
    x_LE = np.zeros(partners_LE.shape, np.float64)
    for layer in range(len(partners_LE)):
        partners_E, x_E = partners_LE[layer], x_LE[layer]
        busiest = partners_E.argmax()
        low = np.log(2 * np.sqrt(max(partners_E[busiest], 1)))
        high = low + np.log(1e8)  # where one expert is in every pair, S has no end
        takes_larger = _excess(low, partners_E, busiest, False, x_E) < 0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if _excess(middle, partners_E, busiest, takes_larger, x_E) > 0:
                low = middle
            else:
                high = middle
        _excess(low, partners_E, busiest, takes_larger, x_E)
        if takes_larger:
            x_E[busiest] = np.exp(low) - x_E[busiest]
        x_E[partners_E == 0] = 0.0
    return x_LE


@njit(cache=True, nogil=True)
def _excess(log_sum, partners_E, busiest, takes_larger, x_E):  # type: ignore[no-untyped-def]
    """Positive while S is too small, of whichever root the busiest takes. `x_E`: every smaller root."""
    whole = np.exp(log_sum)
    found = 0.0
    for expert in range(len(partners_E)):
        root = np.sqrt(max(whole**2 - 4.0 * partners_E[expert], 0.0))
        x_E[expert] = 2.0 * partners_E[expert] / (whole + root)
        found += x_E[expert]
    return 2 * x_E[busiest] - found if takes_larger else found - whole


def _agreed(train: _Compared, test: _Compared) -> NDArray[np.bool_]:
    same = np.sign(train.z_LN) == np.sign(test.z_LN)
    return same & (train.q_LN < SIGNIFICANCE) & (test.q_LN < SIGNIFICANCE)


def _strength(all_: _Compared) -> NDArray[np.float64]:
    """Mean |log2 lift|, every pair as often as it was chosen; NaN where none was."""
    bits_LN = np.abs(np.log2(all_.lift_LN, out=np.zeros(all_.z_LN.shape), where=all_.count_LN > 0))
    return ratio((bits_LN * all_.count_LN).sum(axis=1), all_.count_LN.sum(axis=1))


def _where(is_known: Any, values: NDArray[Any]) -> Any:
    return pd.Series(values, dtype="Int64").where(is_known)


def _cluster(pairs_EE: NDArray[Any], most: int) -> pd.DataFrame:
    """The clusters of one layer; no rows where there are too few experts."""
    used = np.flatnonzero(pairs_EE.diagonal())
    pairs_UU = pairs_EE[np.ix_(used, used)]
    load_U = pairs_UU.diagonal()
    partners_U = pairs_UU.sum(axis=1) - load_U
    if len(used) < FEWEST or not partners_U.any():
        return _clustered(used[:0], used[:0], np.nan)
    x_U = factors(partners_U[None])[0]
    chance_UU = np.outer(x_U, x_U) + ENOUGH
    apart_UU = chance_UU / (chance_UU + pairs_UU + ENOUGH)
    np.fill_diagonal(apart_UU, 0.0)
    silhouette, label_U = _best_cut(apart_UU, most)
    return _clustered(used, _by_load(label_U, load_U), silhouette)


def _clustered(used: NDArray[Any], label_U: NDArray[Any], silhouette: float) -> pd.DataFrame:
    columns = {"expert": used.astype(np.uint16), "cluster": label_U}
    return pd.DataFrame(columns).assign(
        n_clusters=len(np.unique(label_U)), silhouette=float(silhouette)
    )


def _best_cut(apart_UU: NDArray[Any], most: int) -> tuple[float, NDArray[np.int64]]:
    """The tree is grown once and cut at every size; of equal silhouettes the fewest clusters."""
    tree = AgglomerativeClustering(metric="precomputed", linkage="average", compute_full_tree=True)
    merges = tree.fit(apart_UU).children_
    sizes = [size for size in SIZES if size <= most and size < len(apart_UU)]
    cuts = [cut(merges, size) for size in sizes]
    scores = [silhouette(apart_UU, label_U) for label_U in cuts]
    best = int(np.argmax(scores))
    return scores[best], cuts[best]


def silhouette(apart_UU: NDArray[Any], label_U: NDArray[np.int64]) -> float:
    """Mean over experts (Rousseeuw 1987), one alone in its cluster having 0; scikit-learn checks too much each time."""
    everyone, is_in_GU = np.arange(len(label_U)), np.arange(label_U.max() + 1)[:, None] == label_U
    of_G = is_in_GU.sum(axis=1)
    sum_UG = apart_UU @ is_in_GU.T.astype(float)
    own_U = sum_UG[everyone, label_U] / np.maximum(of_G[label_U] - 1, 1)
    mean_UG = sum_UG / of_G
    mean_UG[everyone, label_U] = np.inf
    next_U = mean_UG.min(axis=1)
    score_U = ratio(next_U - own_U, np.maximum(next_U, own_U))
    return float(np.where(of_G[label_U] > 1, np.nan_to_num(score_U), 0.0).mean())


def cut(merges: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Labels of the leaves once all but `size` - 1 of the merges are done."""
    n_leaves = len(merges) + 1
    groups = {leaf: [leaf] for leaf in range(n_leaves)}
    for step, (one, other) in enumerate(merges[: n_leaves - size].tolist()):
        groups[n_leaves + step] = groups.pop(one) + groups.pop(other)
    label_U = np.empty(n_leaves, np.int64)
    for label, leaves in enumerate(groups.values()):
        label_U[leaves] = label
    return label_U


def _by_load(label_U: NDArray[np.int64], load_U: NDArray[Any]) -> NDArray[np.int64]:
    """The same clusters, numbered by falling load; of equal ones the one with the lowest expert first."""
    _, first_G, group_U = np.unique(label_U, return_index=True, return_inverse=True)
    load_G = np.zeros(len(first_G), np.int64)
    np.add.at(load_G, group_U, load_U)
    rank_G = np.empty(len(first_G), np.int64)
    rank_G[np.lexsort((first_G, -load_G))] = np.arange(len(first_G))
    return rank_G[group_U]


def _counted(trace: Traceable) -> CoActivation:
    plan = plan_of(trace)
    counted = CoActivation(plan)
    accumulate(trace, plan, [counted])
    return counted


def coactivation(trace: Traceable) -> pd.DataFrame:
    """Which experts of one layer are chosen together, more or less than chance: a row per layer and pair."""
    return _counted(trace).pairs()


def expert_clusters(trace: Traceable) -> pd.DataFrame:
    """Spread of the experts of every layer by how often they are chosen together."""
    return _counted(trace).clusters()
