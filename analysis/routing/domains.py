"""What domains have to do with routing: who uses which experts, what a choice tells of the domain, what carries over.

Requests that repeat an earlier one are left out. Rows of a prompt template stay in the plain counts and in transfer;
they are left out where routing must tell the domain, because a template names it. It knows no predictor but counts.
D domains, L layers, E experts, K choices, R sampled requests, C = 2 * part + template.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray
from scipy.special import chdtrc
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import MultinomialNB

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.pairs import SKIP, count_pairs
from analysis.routing.significance import q_values
from analysis.routing.statistics import entropy_bits
from analysis.routing.sums import ratio
from prefetch.errors import MissingData
from prefetch.scoring import LEFT_OUT, TEST, TRAIN
from prefetch.trace.blocks import Traceable

MOST_REQUESTS = 4000  # whose usage is kept one by one
MOST_BYTES = 400_000_000  # of pair counts and the chances made of them
FOLDS = 5
SHUFFLES = 5
WILSON_Z = 1.959964  # 95 %


class Domains:
    """Usage, next-layer pairs and sampled requests of the largest domains of a trace."""

    def __init__(self, plan: Plan, most: int = 8) -> None:
        self.plan, self.notes = plan, list[str]()
        self.kept = self._choose(most)
        self.domains = tuple(plan.domains[code] for code in self.kept)
        card, n = plan.card, len(self.kept)
        self.usage_CDLE = np.zeros((4, n, card.n_layers, card.n_experts), np.int64)
        pairs = (self._carried(), max(0, card.n_layers - 1), card.n_experts, card.n_experts)
        self.pairs_DLEE = np.zeros(pairs, plan.pair_type)  # of TRAIN rows, one layer to the next
        self.test_rows_D = np.zeros(n, np.int64)
        self.request_R, self.domain_R = self._sample()
        wide = max(plan.survey.n_rows_R) > np.iinfo(np.uint16).max
        shape = (len(self.request_R), card.n_layers, card.n_experts)
        self.usage_RLE = np.zeros(shape, np.int32 if wide else np.uint16)  # new text only

    def _choose(self, most: int) -> NDArray[np.int64]:
        """Codes of the largest domains by rows."""
        survey = self.plan.survey
        domain_R, rows_R = np.array(survey.domain_R), np.array(survey.n_rows_R)
        rows_D = np.bincount(domain_R[domain_R >= 0], rows_R[domain_R >= 0], len(survey.domains))
        known = np.flatnonzero(rows_D)
        if len(known) < 2:
            raise MissingData(
                f"domains are compared with each other: it takes two, and this trace names {len(known)}"
            )
        order = known[np.argsort(-rows_D[known], kind="stable")]
        if len(order) > most:
            rest = int(rows_D[order[most:]].sum())
            self.notes.append(
                f"Domains: the {most} largest are compared; the other {len(order) - most} ({rest:,} rows) are not."
            )
        return order[:most]

    def _carried(self) -> int:
        """Of how many domains the transitions can be kept."""
        card, n = self.plan.card, len(self.kept)
        each = (4 + self.plan.pair_type.itemsize) * max(1, card.n_layers - 1) * card.n_experts**2
        fit = min(n, MOST_BYTES // each)
        if fit < n:
            self.notes.append(
                f"Domains: transitions are kept for the {fit} largest of {n}, to stay under {MOST_BYTES // 10**6} MB."
            )
        return fit

    def _sample(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Requests in rising order and their domains, by a hash of their number: no batch can change who is in."""
        request_R = np.array(self.plan.survey.request_R)
        domain_R = self._slots()[np.array(self.plan.survey.domain_R)]
        fits_R = domain_R < len(self.kept)
        fits_R &= ~np.isin(request_R, self.plan.split.duplicate_requests)
        request_R, domain_R = request_R[fits_R], domain_R[fits_R]
        if len(request_R) > MOST_REQUESTS:
            hashes = [hash_of_request(self.plan.seed, request) for request in request_R.tolist()]
            chosen = np.argsort(np.array(hashes, np.uint64), kind="stable")[:MOST_REQUESTS]
            request_R, domain_R = request_R[chosen], domain_R[chosen]
        order = np.argsort(request_R)
        return request_R[order], domain_R[order].astype(np.int64)

    def _slots(self) -> NDArray[np.uint8]:
        """Domain code -> its place among the kept, SKIP for the others; the last entry is for unknown (-1)."""
        slots = np.full(len(self.plan.domains) + 1, SKIP, np.uint8)
        slots[self.kept] = np.arange(len(self.kept))
        return slots

    def domain_T(self, batch: Batch) -> NDArray[np.uint8]:
        """Which of the kept domains every row is of; SKIP where it is not counted."""
        domain_T = self._slots()[batch.block.domain_T]
        return np.where(batch.part_T == LEFT_OUT, SKIP, domain_T).astype(np.uint8)

    def add(self, batch: Batch) -> None:
        domain_T = self.domain_T(batch)
        train_T = np.where(batch.part_T == TRAIN, domain_T, SKIP).astype(np.uint8)
        class_T = (2 * batch.part_T + batch.is_template_T).astype(np.uint8)
        row_T = np.where(batch.is_template_T, -1, self._sampled(batch))
        ids_LTK, nobody = batch.ids_LTK, batch.nobody
        is_tested_T = (batch.part_T == TEST) & (domain_T != SKIP)
        self.test_rows_D += np.bincount(domain_T[is_tested_T], minlength=len(self.kept))

        def count(layer: int) -> None:
            usage_CDE, usage_RE = self.usage_CDLE[:, :, layer], self.usage_RLE[:, layer]
            _count_usage(ids_LTK[layer], class_T, domain_T, row_T, nobody, usage_CDE, usage_RE)
            if layer + 1 < len(ids_LTK):
                pairs_DEE = self.pairs_DLEE[:, layer]
                count_pairs(ids_LTK[layer], ids_LTK[layer + 1], train_T, nobody, pairs_DEE)

        for_layers(count, len(ids_LTK))

    def _sampled(self, batch: Batch) -> NDArray[np.int64]:
        """Which of the sampled requests every row is of, or -1."""
        starts = batch.starts_R
        request = batch.block.request_T[starts]
        place = np.searchsorted(self.request_R, request)
        found = np.where(np.isin(request, self.request_R), place, -1)
        return np.repeat(found, np.diff(np.append(starts, batch.block.n_tokens)))

    def merge(self, later: Domains) -> None:
        for name in ("usage_CDLE", "pairs_DLEE", "test_rows_D", "usage_RLE"):
            getattr(self, name).__iadd__(getattr(later, name))

    def usage(self) -> pd.DataFrame:
        """One row per domain, layer and expert that it used; `share` is of the domain's choices at that layer."""
        count_DLE = self.usage_CDLE.sum(axis=0)
        share_DLE = ratio(count_DLE, count_DLE.sum(axis=2, keepdims=True))
        domain, layer, expert = np.nonzero(count_DLE)
        columns = {
            "domain": np.array(self.domains)[domain],
            **layer_columns(self.plan.card, layer),
            "expert": expert.astype(np.uint16),
            "count": count_DLE[domain, layer, expert],
            "share": share_DLE[domain, layer, expert],
        }
        return pd.DataFrame(columns)

    def specialisation(self) -> pd.DataFrame:
        """One row per layer and expert that new text used: for which domain it is chosen above its share, and how much.

        `specialisation` is KL(P(domain | expert) || P(domain)) over the most it can be, -log P(the rarest domain): 0 =
        every domain as often as it comes, 1 = only the rarest one. `q_value`: a G-test of the expert's choices over
        domains, divided by the design effect of requests (Rao and Scott 1981), whose tokens are not independent.
        """
        count_DLE = self.usage_CDLE[0::2].sum(axis=0)
        told_LE, most_L, lift_DLE = _divergence(count_DLE)
        used_LE = count_DLE.sum(axis=0)
        freedom_L = (count_DLE.sum(axis=2) > 0).sum(axis=0) - 1
        statistic_LE = 2 * np.log(2) * used_LE * told_LE / self._design_effects()
        p_LE = np.where(freedom_L[:, None] > 0, chdtrc(freedom_L[:, None], statistic_LE), np.nan)
        q_LE = q_values(np.where(used_LE > 0, p_LE, np.nan))
        layer, expert = np.nonzero(used_LE)
        best_LE = lift_DLE.argmax(axis=0)
        columns = {
            **layer_columns(self.plan.card, layer),
            "expert": expert.astype(np.uint16),
            "count": used_LE[layer, expert],
            "domain": np.array(self.domains)[best_LE[layer, expert]],
            "lift": lift_DLE.max(axis=0)[layer, expert],
            "specialisation": ratio(told_LE, most_L[:, None])[layer, expert],
            "q_value": q_LE[layer, expert],
        }
        return pd.DataFrame(columns)

    def _design_effects(self) -> NDArray[np.float64]:
        """[L, E] by how much requests spread more than independent choices would; NaN with a request per domain."""
        n_requests, n_domains = len(self.request_R), len(np.unique(self.domain_R))
        if n_requests <= n_domains:
            return np.full(self.usage_RLE.shape[1:], np.nan)

        def effect(layer: int) -> NDArray[Any]:
            count_RE = self.usage_RLE[:, layer].astype(float)
            of_R = count_RE.sum(axis=1, keepdims=True)
            count_DE = _by_domain(self.usage_RLE[:, layer], self.domain_R, len(self.kept))
            share_DE = count_DE / np.maximum(count_DE.sum(axis=1, keepdims=True), 1)
            share_RE = share_DE[self.domain_R]
            spread_E = ((count_RE - of_R * share_RE) ** 2).sum(axis=0)
            binomial_E = (of_R * share_RE * (1 - share_RE)).sum(axis=0)
            freedom = (n_requests - n_domains) / n_requests
            return np.maximum(1, ratio(spread_E, binomial_E * freedom))

        return np.stack(for_layers(effect, self.usage_RLE.shape[1]))

    def information(self) -> pd.DataFrame:
        """What one choice tells of the domain, per layer, over the new text of at most 4000 requests.

        `mutual_information_bits` is `plugin_bits` less its bias (Miller and Madow 1955, for k choices a token).
        `shuffled_bits` is the same with the domains of the requests permuted: what few requests tell by chance.
        """
        rng = np.random.default_rng((self.plan.seed, 1))
        k, n_domains = self.plan.card.top_k, len(self.kept)
        count_DLE = _by_domain(self.usage_RLE, self.domain_R, n_domains)
        plugin_L, bias_L = _information(count_DLE, k)
        shuffled_L = np.zeros(len(plugin_L))
        for _ in range(SHUFFLES):
            mixed = _by_domain(self.usage_RLE, rng.permutation(self.domain_R), n_domains)
            shuffled_L += np.subtract(*_information(mixed, k)) / SHUFFLES
        columns = {
            **layer_columns(self.plan.card, np.arange(len(plugin_L))),
            "mutual_information_bits": plugin_L - bias_L,
            "plugin_bits": plugin_L,
            "shuffled_bits": shuffled_L,
            "domain_entropy_bits": entropy_bits(count_DLE.sum(axis=2).T),
            "requests": len(self.request_R),
        }
        return pd.DataFrame(columns)

    def accuracy(self) -> pd.DataFrame:
        """How well the routing of a request's new text alone tells its domain, cross-validated over requests.

        Naive Bayes on usage counts; beside it always the largest domain, and naive Bayes on shuffled domains.
        """
        told_R = np.flatnonzero(self.usage_RLE.any(axis=(1, 2)))
        usage_RF, domain_R = self.usage_RLE[told_R], self.domain_R[told_R]
        sizes = np.bincount(domain_R, minlength=len(self.kept))
        smallest = int(sizes.min())
        if smallest < 2:
            raise MissingData(
                f"domain {self.domains[int(sizes.argmin())]!r} has {smallest} requests with text of their own: "
                "it takes two of each domain, one to learn from and one to be asked"
            )
        usage_RF = usage_RF.reshape(len(told_R), -1)
        rng = np.random.default_rng((self.plan.seed, 2))
        mixed = [rng.permutation(domain_R) for _ in range(SHUFFLES)]
        guesses = {
            "naive_bayes": [(domain_R, self._guess(usage_RF, domain_R))],
            "majority": [(domain_R, np.full_like(domain_R, sizes.argmax()))],
            "shuffled_labels": [(mixed_R, self._guess(usage_RF, mixed_R)) for mixed_R in mixed],
        }
        return pd.DataFrame([{"classifier": name, **_scored(of)} for name, of in guesses.items()])

    def _guess(self, usage_RF: NDArray[Any], domain_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """The domain of every request, told by a model that has not seen it."""
        guess_R, sizes_D = np.empty_like(domain_R), np.bincount(domain_R)
        usage_DF = _by_domain(usage_RF, domain_R, len(sizes_D))
        n_folds = min(FOLDS, int(sizes_D.min()))
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=self.plan.seed)
        for _, test in folds.split(domain_R, domain_R):
            known_D = sizes_D - np.bincount(domain_R[test], minlength=len(sizes_D))
            known_DF = usage_DF - _by_domain(usage_RF[test], domain_R[test], len(sizes_D))
            # the model of a domain's requests is that of their sum: it keeps nothing else of them
            model = MultinomialNB(class_prior=known_D / known_D.sum())
            model.fit(known_DF, np.arange(len(sizes_D)))
            guess_R[test] = model.predict(usage_RF[test].astype(np.float64))
        return guess_R


def hash_of_request(seed: int, request: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{request}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _by_domain(
    usage: NDArray[Any], domain_R: NDArray[np.int64], n_domains: int
) -> NDArray[np.int64]:
    """The usage of every domain's requests, added up: [D, ...]."""
    return np.stack([usage[domain_R == d].sum(axis=0, dtype=np.int64) for d in range(n_domains)])


def _divergence(
    count_DLE: NDArray[Any],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """[L, E] bits that an expert tells of the domain, the most they can be at each layer, and lift [D, L, E]."""
    count_LE, count_DL = count_DLE.sum(axis=0), count_DLE.sum(axis=2)
    share_DL = count_DL / np.maximum(count_DL.sum(axis=0), 1)
    given_DLE = count_DLE / np.maximum(count_LE, 1)
    lift_DLE = given_DLE / np.where(share_DL > 0, share_DL, 1)[:, :, None]
    bits_DLE = given_DLE * np.log2(lift_DLE, out=np.zeros(lift_DLE.shape), where=lift_DLE > 0)
    rarest_L = np.where(share_DL > 0, share_DL, 1).min(axis=0)
    return np.maximum(bits_DLE.sum(axis=0), 0), -np.log2(rarest_L), lift_DLE


def _information(
    count_DLE: NDArray[Any], top_k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Plug-in mutual information of domain and expert in bits, and its bias, per layer."""
    joint_LC = count_DLE.transpose(1, 0, 2).reshape(count_DLE.shape[1], -1)
    count_LE, count_LD = count_DLE.sum(axis=0), count_DLE.sum(axis=2).T
    plugin_L = entropy_bits(count_LD) + entropy_bits(count_LE) - entropy_bits(joint_LC)
    cells_L = (joint_LC > 0).sum(axis=1) - (count_LE > 0).sum(axis=1)
    free_L = cells_L - top_k * ((count_LD > 0).sum(axis=1) - 1)
    return plugin_L, ratio(free_L, 2 * np.log(2) * count_LD.sum(axis=1))


def _scored(guesses: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> dict[str, float]:
    """Mean accuracy over guesses of the same requests, with the interval (Wilson 1927) that one guess has."""
    n, z = len(guesses[0][0]), WILSON_Z
    share = float(np.mean([domain_R == guess_R for domain_R, guess_R in guesses]))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return {
        "accuracy": share,
        "low": max(0.0, middle - reach),
        "high": min(1.0, middle + reach),
        "requests": n,
        "classes": len(np.unique(guesses[0][0])),
        "balanced_accuracy": float(np.mean([balanced_accuracy_score(*pair) for pair in guesses])),
    }


@njit(cache=True, nogil=True)
def _count_usage(ids_TK, class_T, domain_T, row_T, nobody, usage_CDE, usage_RE):  # type: ignore[no-untyped-def]
    for t in range(ids_TK.shape[0]):
        if domain_T[t] >= usage_CDE.shape[1]:
            continue
        usage_E, row = usage_CDE[class_T[t], domain_T[t]], row_T[t]
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[t, k]
            if expert != nobody:
                usage_E[expert] += 1
                if row >= 0:
                    usage_RE[row, expert] += 1


def counted_domains(trace: Traceable) -> Domains:
    plan = plan_of(trace)
    counted = Domains(plan)
    accumulate(trace, plan, [counted])
    return counted


def domain_usage(trace: Traceable) -> pd.DataFrame:
    """Which experts every domain uses, per layer."""
    return counted_domains(trace).usage()


def domain_information(trace: Traceable) -> pd.DataFrame:
    """What one choice tells of the domain, per layer, with the shuffled control."""
    return counted_domains(trace).information()


def domain_accuracy(trace: Traceable) -> pd.DataFrame:
    """How well routing alone tells the domain of a request."""
    return counted_domains(trace).accuracy()
