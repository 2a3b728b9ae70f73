"""How far popularity and transitions carry from one domain to another: counted on one, scored on another.

It knows no predictor but counts. D domains, L layers, E experts, K choices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import Batch, Plan, accumulate, for_layers
from analysis.routing.domains import Domains, counted_domains, hash_of_request
from analysis.routing.recall import smoothed
from analysis.routing.sums import ratio
from prefetch.errors import MissingData
from prefetch.scoring import TEST, TRAIN
from prefetch.trace.blocks import Traceable

SCORED_ROWS = 4096  # test rows per domain to score transitions on: recall to tenths of a per cent


class DomainTransfer:
    """A second pass: the transitions of every domain, scored on test rows of every domain."""

    given: ClassVar[tuple[str, ...]] = ("domains", "chances", "train_DLE", "test_DLE")

    def __init__(self, plan: Plan, domains: Domains) -> None:
        if plan.card.n_layers == 1:
            raise MissingData("one layer: there is no later layer to guess")
        self.plan, self.domains = plan, domains
        used_CDLE = domains.usage_CDLE
        self.train_DLE = used_CDLE[2 * TRAIN : 2 * TRAIN + 2].sum(axis=0)
        self.test_DLE = used_CDLE[2 * TEST : 2 * TEST + 2].sum(axis=0)
        if not self.train_DLE.any() or not self.test_DLE.any():
            raise MissingData(
                "one part of the split is empty: transfer needs requests to learn from and others to be scored on"
            )
        n = len(domains.pairs_DLEE)
        self.share = SCORED_ROWS / np.maximum(domains.test_rows_D[:n], 1)
        self.chances = [
            smoothed(pairs_LEE, train_LE[1:])
            for pairs_LEE, train_LE in zip(domains.pairs_DLEE, self.train_DLE, strict=False)
        ]
        shape = (n, n, plan.card.n_layers - 1)
        self.hits_DDL = np.zeros(shape, np.int64)  # [counted on, scored on, earlier layer]
        self.choices_DDL = np.zeros(shape, np.int64)
        self.rows_D = np.zeros(n, np.int64)

    def add(self, batch: Batch) -> None:
        domain_T = self.domains.domain_T(batch).astype(np.int64)
        is_scored_T = (batch.part_T == TEST) & (domain_T < len(self.share))
        rows = np.flatnonzero(is_scored_T)
        rows = rows[_unit(batch.row_T[rows], self.plan.seed) < self.share[domain_T[rows]]]
        domain_T = domain_T[rows]
        self.rows_D += np.bincount(domain_T, minlength=len(self.rows_D))
        if not len(rows):
            return

        def score(layer: int) -> None:
            here_TK, there_TK = batch.ids_LTK[layer, rows], batch.ids_LTK[layer + 1, rows]
            given = here_TK, there_TK, domain_T, batch.nobody
            for chance_LEE, hits_DL, of_DL in zip(
                self.chances, self.hits_DDL, self.choices_DDL, strict=True
            ):
                _score(*given, chance_LEE[layer], hits_DL[:, layer], of_DL[:, layer])

        for_layers(score, len(batch.ids_LTK) - 1)

    def merge(self, later: DomainTransfer) -> None:
        for name in ("hits_DDL", "choices_DDL", "rows_D"):
            getattr(self, name).__iadd__(getattr(later, name))

    def table(self) -> pd.DataFrame:
        """Recall of k guesses, counted on train requests of one domain, scored on test requests of another.

        Mean over layer pairs. Popularity is scored on all test rows, Markov counts on about 4096 of each domain.
        """
        popular_DDL = _popular_recall(self.train_DLE, self.test_DLE, self.plan.card.top_k)
        markov_DDL = ratio(self.hits_DDL, self.choices_DDL)
        markov_DDL[~self.domains.pairs_DLEE.any(axis=(1, 2, 3))] = np.nan
        frames = [
            self._rows("popularity", popular_DDL[:, :, 1:], self.domains.test_rows_D),
            self._rows("markov", markov_DDL, self.rows_D),
        ]
        return pd.concat(frames, ignore_index=True)

    def _rows(self, measure: str, recall_DDL: NDArray[Any], rows_D: NDArray[Any]) -> pd.DataFrame:
        known_DDL = ~np.isnan(recall_DDL)
        total_DD = np.where(known_DDL, recall_DDL, 0).sum(axis=2)
        recall_DD = ratio(total_DD, known_DDL.sum(axis=2))
        train, test = np.nonzero(~np.isnan(recall_DD))
        names = np.array(self.domains.domains)
        columns = {
            "measure": measure,
            "train_domain": names[train],
            "test_domain": names[test],
            "recall": recall_DD[train, test],
            "tokens": rows_D[test],
        }
        return pd.DataFrame(columns)


def _unit(row_T: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) that depends on seed and row alone (SplitMix64, Steele et al. 2014)."""
    x = row_T.astype(np.uint64) + np.uint64(hash_of_request(seed, -1))
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _popular_recall(
    train_DLE: NDArray[Any], test_DLE: NDArray[Any], top_k: int
) -> NDArray[np.float64]:
    """[counted on, scored on, L]: share of the choices that fall on the k most used experts."""
    best_DLK = np.argsort(-train_DLE, axis=2, kind="stable")[:, :, :top_k]
    is_best_DLE = np.zeros(train_DLE.shape, np.int64)
    np.put_along_axis(is_best_DLE, best_DLK, 1, axis=2)
    hits_DDL = np.einsum("ale,ble->abl", is_best_DLE, test_DLE)
    recall_DDL = ratio(hits_DDL, test_DLE.sum(axis=2))
    recall_DDL[train_DLE.sum(axis=2)[:, None].repeat(len(test_DLE), 1) == 0] = np.nan
    return recall_DDL


@njit(cache=True, nogil=True)
def _score(here_TK, there_TK, domain_T, nobody, chance_EE, hits_D, of_D):  # type: ignore[no-untyped-def]
    """Of the choices there, how many are among the k best guesses from those here."""
    n_choices = there_TK.shape[1]
    score_E = np.zeros(chance_EE.shape[0], np.float32)
    for t in range(here_TK.shape[0]):
        is_known = False
        score_E[:] = 0
        for i in range(n_choices):
            if here_TK[t, i] != nobody:
                is_known, chance_E = True, chance_EE[here_TK[t, i]]
                for e in range(
                    score_E.shape[0]
                ):  # spelt out: so it compiles to vector instructions
                    score_E[e] += chance_E[e]
        for j in range(n_choices):
            if is_known and there_TK[t, j] != nobody:
                of_D[domain_T[t]] += 1
                hits_D[domain_T[t]] += _is_guessed(score_E, np.int64(there_TK[t, j]), n_choices)


@njit(cache=True, nogil=True)
def _is_guessed(score_E, b, n_guesses):  # type: ignore[no-untyped-def]
    """Do fewer than so many come before b? Of equal scores the lower id does."""
    before, equal, score = np.int32(0), np.int32(0), score_E[b]
    for e in range(score_E.shape[0]):
        before = np.int32(
            before + np.int32(score_E[e] > score)
        )  # kept at 32 bits: three times as fast
    if before < n_guesses:
        for e in range(score_E.shape[0]):
            equal = np.int32(equal + np.int32(score_E[e] == score))
        if before + equal > n_guesses:
            for e in range(b):
                before += score_E[e] == score
    return before < n_guesses


def domain_transfer(trace: Traceable) -> pd.DataFrame:
    """Recall of popularity and transitions counted on one domain and scored on another."""
    counted = counted_domains(trace)
    scored = DomainTransfer(counted.plan, counted)
    accumulate(trace, counted.plan, [scored], title="scoring")
    return scored.table()
