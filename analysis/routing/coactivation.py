"""Which experts of one layer are chosen together: pair counts, lift against chance, clusters.

Chance is what the number of choices per token leaves: a token that took one expert has only k - 1 choices left, so
c_a c_b / T would call almost every pair repelled. It knows no other layer and no token order.
L layers, E experts, K choices, C parts (train, test), N pairs a < b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score

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
    """`pairs_CLEE[c, l, a, b]`: tokens of part c that chose a and b at layer l; how many chose a on the diagonal."""

    def __init__(self, plan: Plan) -> None:
        card = plan.card
        if card.top_k == 1:
            raise MissingData("one expert per token: nothing is chosen together")
        self.plan = plan
        shape = (2, card.n_layers, card.n_experts, card.n_experts)
        n_bytes = 4 * math.prod(shape) + Spread.n_bytes(card.n_layers, card.n_experts)
        check_bytes(len(plan.phases) * n_bytes, card)
        self._half_CLEE = np.zeros(shape, np.int32)  # each pair once, where its first expert stood
        self.tokens_CL = np.zeros(shape[:2], np.int64)
        self.spread = Spread(card.n_layers, card.n_experts)
        self._compared: tuple[_Compared, _Compared, _Compared] | None = None

    def add(self, batch: Batch) -> None:
        self._compared = None
        is_told_T = batch.is_witness_T & (batch.part_T != LEFT_OUT)
        class_T = np.where(is_told_T, 0, SKIP).astype(np.uint8)

        def count(layer: int) -> None:
            half_CEE, tokens_C = self._half_CLEE[:, layer], self.tokens_CL[:, layer]
            ids_TK = batch.ids_LTK[layer]
            _count_together(ids_TK, batch.part_T, batch.nobody, half_CEE, tokens_C)
            self.spread.add(layer, ids_TK, ids_TK, batch.starts_R, class_T, batch.nobody)

        for_layers(count, len(batch.ids_LTK))

    def merge(self, later: CoActivation) -> None:
        self._compared = None
        self._half_CLEE += later._half_CLEE
        self.tokens_CL += later.tokens_CL
        self.spread.merge(later.spread)

    @property
    def pairs_CLEE(self) -> NDArray[np.int32]:
        """Symmetric; what repeats an earlier request is in neither part."""
        whole_CLEE: NDArray[np.int32] = self._half_CLEE + self._half_CLEE.swapaxes(2, 3)
        each = np.arange(whole_CLEE.shape[-1])
        whole_CLEE[..., each, each] //= 2
        return whole_CLEE

    def pairs(self) -> pd.DataFrame:
        """One row per layer and pair that was seen, or that chance would have shown.

        `z` and `q_value` are over all tokens, but the tokens of one request are not independent: the variance is
        multiplied by `design_effect`, by how much more the pair's excess spreads over requests than with independent
        tokens (1 at least), and a pair is tested where `expected` / `design_effect` is 5 or more. `is_significant`:
        q < 0.01 in the train and in the test part, in the same direction. Fewer than 10 requests do not tell: the three
        columns are empty then, and no pair is significant.
        """
        all_, train, test = self._compare()
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

    def summary(self) -> pd.DataFrame:
        """One row per layer; the strongest lift is that of a pair frequent enough to be tested.

        What is significant is empty with fewer than 10 requests, which do not tell; `design_effect` is the median.
        """
        all_, train, test = self._compare()
        agreed_LN = _agreed(train, test)
        tested_LN = ~np.isnan(all_.q_LN)
        lift_LN = np.where(tested_LN, all_.lift_LN, -np.inf)
        strongest_L = lift_LN.argmax(axis=1)
        is_known_L = tested_LN.any(axis=1)
        is_told_L = self.spread.requests_L >= FEWEST_REQUESTS
        used_L = (np.diagonal(self.pairs_CLEE.sum(axis=0), axis1=1, axis2=2) > 0).sum(axis=1)
        one_N, other_N = np.triu_indices(self.plan.card.n_experts, 1)
        columns = {
            **layer_columns(self.plan.card, np.arange(len(used_L))),
            "tokens": self.tokens_CL.sum(axis=0),
            "requests": self.spread.requests_L,
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
        pairs_LEE = self.pairs_CLEE.sum(axis=0)
        found = for_layers(lambda layer: _cluster(pairs_LEE[layer], most), len(pairs_LEE))
        frames = [rows.assign(slot=layer) for layer, rows in enumerate(found)]
        whole = pd.concat(frames, ignore_index=True)
        columns = layer_columns(self.plan.card, whole.pop("slot").to_numpy())
        return leading(whole.assign(**columns), *columns)

    def _compare(self) -> tuple[_Compared, _Compared, _Compared]:
        """All tokens, the train part, the test part; kept until more is counted."""
        if self._compared is None:
            pairs_CLEE, requests_L = self.pairs_CLEE, self.spread.requests_L
            effect_LN = self._effects(pairs_CLEE.sum(axis=0), self.tokens_CL.sum(axis=0))
            effect = effect_LN, requests_L[:, None]
            self._compared = (
                _Compared.of(pairs_CLEE.sum(axis=0), self.tokens_CL.sum(axis=0), *effect),
                _Compared.of(pairs_CLEE[TRAIN], self.tokens_CL[TRAIN], *effect),
                _Compared.of(pairs_CLEE[TEST], self.tokens_CL[TEST], *effect),
            )
        return self._compared

    def _effects(self, pairs_LEE: NDArray[Any], tokens_L: NDArray[Any]) -> NDArray[np.float64]:
        """Design effects, from all requests: those of the test part alone would be too few."""
        above = np.triu_indices(pairs_LEE.shape[-1], 1)

        def effect(layer: int) -> NDArray[np.float64]:
            pairs_EE = pairs_LEE[layer]
            used_E = pairs_EE.diagonal()
            x_E = factors((pairs_EE.sum(axis=1) - used_E)[None])[0]
            given = used_E, used_E, np.outer(x_E, x_E), int(tokens_L[layer])
            return self.spread.effects(layer, pairs_EE, *given)[above]

        return np.stack(for_layers(effect, len(pairs_LEE)))


@njit(cache=True, nogil=True)
def _count_together(ids_TK, part_T, nobody, half_CEE, tokens_C):  # type: ignore[no-untyped-def]
    """Every pair of a row once, in the order of the row: half the work of a symmetric table."""
    for t in range(ids_TK.shape[0]):
        c = part_T[t]
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
    """Pair counts beside what chance would give, for the pairs a < b of every layer."""

    count_LN: NDArray[Any]
    expected_LN: NDArray[np.float64]
    lift_LN: NDArray[np.float64]
    effect_LN: NDArray[np.float64]  # NaN, and all that follows, where too few requests tell
    z_LN: NDArray[np.float64]
    q_LN: NDArray[np.float64]  # NaN where chance gives too few pairs to test

    @classmethod
    def of(
        cls,
        pairs_LEE: NDArray[Any],
        tokens_L: NDArray[Any],
        effect_LN: NDArray[np.float64],
        requests_L1: NDArray[Any],
    ) -> _Compared:
        one_N, other_N = np.triu_indices(pairs_LEE.shape[-1], 1)
        count_LN = pairs_LEE[:, one_N, other_N]
        used_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
        x_LE = factors(pairs_LEE.sum(axis=2) - used_LE)
        expected_LN = x_LE[:, one_N] * x_LE[:, other_N]
        absent_LE = 1 - used_LE / np.maximum(tokens_L, 1)[:, None]
        # given how often each is used, b falls on the tokens of a as balls drawn without replacement
        variance_LN = expected_LN * absent_LE[:, one_N] * absent_LE[:, other_N]
        z_LN = z_values(count_LN, expected_LN, variance_LN) / np.sqrt(effect_LN)
        is_tested_LN = expected_LN / effect_LN >= ENOUGH
        p_LN = np.where(is_tested_LN, 2 * tail(np.abs(z_LN), requests_L1), np.nan)
        lift_LN = ratio(count_LN, expected_LN)
        return cls(count_LN, expected_LN, lift_LN, effect_LN, z_LN, q_values(p_LN))


def factors(partners_LE: NDArray[Any]) -> NDArray[np.float64]:
    """x such that chance pairs x_a x_b, a and b apart, leave every expert its number of partners; 0 where it has none.

    The quasi-independence model of a table without diagonal (Goodman 1968). Given S, the sum of x, every x_a is a
    root of x (S - x) = partners_a; so only S is sought, by bisection. At most the busiest needs the larger root.
    """
    busiest_L = partners_LE.argmax(axis=1)[:, None]
    low_L = np.log(2 * np.sqrt(np.maximum(partners_LE.max(axis=1, keepdims=True), 1)))
    high_L = low_L + np.log(1e8)  # where one expert is in every pair, S has no end

    def smaller(log_L: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        sum_L = np.exp(log_L)
        root_LE = np.sqrt(np.maximum(sum_L**2 - 4 * partners_LE, 0))
        return sum_L, 2 * partners_LE / (sum_L + root_LE)

    def excess(log_L: NDArray[Any]) -> NDArray[Any]:
        """Positive while S is too small, of whichever root the busiest takes."""
        sum_L, x_LE = smaller(log_L)
        busy_L, all_L = np.take_along_axis(x_LE, busiest_L, 1), x_LE.sum(axis=1, keepdims=True)
        return np.where(takes_larger_L, 2 * busy_L - all_L, all_L - sum_L)

    takes_larger_L = np.zeros(low_L.shape, bool)
    takes_larger_L = excess(low_L) < 0
    for _ in range(HALVINGS):
        middle_L = (low_L + high_L) / 2
        is_small_L = excess(middle_L) > 0
        low_L, high_L = (
            np.where(is_small_L, middle_L, low_L),
            np.where(is_small_L, high_L, middle_L),
        )
    sum_L, x_LE = smaller(low_L)
    busy_L = np.take_along_axis(x_LE, busiest_L, 1)
    np.put_along_axis(x_LE, busiest_L, np.where(takes_larger_L, sum_L - busy_L, busy_L), 1)
    return np.where(partners_LE > 0, x_LE, 0.0)


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
    scores = [float(silhouette_score(apart_UU, label_U, metric="precomputed")) for label_U in cuts]
    best = int(np.argmax(scores))
    return scores[best], cuts[best]


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
