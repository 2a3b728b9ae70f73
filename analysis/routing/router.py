"""What a router's scores and weights tell: confidence, margins, entropy, losses, and how often something overrules it.

It knows no model: what a score means stands in the card, and what was not recorded is NaN, with the reason in `notes`.
T tokens, L layers, E experts, K choices, M recorded scores, G phases, N values, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing import scores
from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.scores import LOGITS, LOST, OVERRULED, PROBABILITIES, SHARES
from analysis.routing.sums import Sums, ratio
from prefetch.errors import FormatError, MissingData
from prefetch.trace.blocks import Traceable
from prefetch.trace.routing import PHASES

BINS = 1000  # of the quantiles, over 0 to 1
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
CHUNK_SCORES = 1 << 19  # of one layer that are float64 at a time
SUM_TOLERANCE = 0.01  # float16 probabilities sum to one within it
CONFIDENCE, MARGIN, BOUNDARY, MASS, ENTROPY, Z_LOSS = range(6)  # then OVERRULED and LOST
SPREAD = ("confidence", "margin", "boundary_margin", "topk_mass")  # the first four have quantiles


class RouterStatistics:
    """Per phase and layer, from all scores, else from the best M, else from the weights alone.

    Scores are probabilities if those of the first executed row are a distribution at every layer, shares if the card
    says sigmoid and they lie between 0 and 1 (the sigmoid was taken before they were recorded), else logits;
    `meaning` says which where that goes wrong. A layer that did not run for a row (no expert, all zeros) is left out.
    """

    def __init__(self, plan: Plan, meaning: str | None = None) -> None:
        if not plan.recorded("scores", "weights"):
            raise MissingData(
                "the trace has neither scores nor weights; source.scores=all records scores, where a source can"
            )
        self.plan, self.meaning = plan, meaning
        self.has_scores = "scores" in plan.columns
        self.has_all = self.has_scores and "score_ids" not in plan.columns
        self.has_weights = "weights" in plan.columns
        n_experts, shape = plan.card.n_experts, (len(PHASES), plan.card.n_layers)
        self.width = n_experts if self.has_all else plan.card.top_k  # M
        self.tokens_GL = np.zeros(shape, np.int64)
        self.choices_GLE = np.zeros((*shape, n_experts), np.int64)
        self.bins_GLNB = np.zeros((*shape, len(SPREAD), BINS), np.int64)
        self._values = Sums(*shape, 8)
        self._probability = Sums(*shape, n_experts)
        self._weight = Sums(*shape, 2 * n_experts)  # of every expert, then their squares

    @property
    def level(self) -> str:
        if not self.has_scores:
            return "weights"
        return "all scores" if self.has_all else f"best {self.width} scores"

    @property
    def _reading(self) -> str:
        """What turns a row into probabilities: of all experts, or of those that were recorded."""
        function = self.plan.card.score_function
        if self.meaning != LOGITS:
            return SHARES if self.has_all else self.meaning or SHARES
        return "softmax" if function in (None, "softmax_after_topk") else function

    def begin(self, batch: Batch) -> None:
        """The first rows of a trace tell what its scores are."""
        self.meaning = self.meaning or _meaning(batch, self.has_all)

    def add(self, batch: Batch) -> None:
        block = batch.block
        recorded_TLM = block.scores_TLM if self.has_scores else block.weights_TLK
        if recorded_TLM is None:
            raise MissingData("scores or weights were not read: name them among the columns")
        self.begin(batch)
        self.width = recorded_TLM.shape[2]
        rows = max(1, CHUNK_SCORES // self.width)

        def work(layer: int) -> None:
            for first in range(0, block.n_tokens, rows):
                part = slice(first, first + rows)
                self._count(batch, layer, part)
                self._describe(batch, layer, part, recorded_TLM[part, layer].astype(np.float64))

        for_layers(work, block.card.n_layers)

    def _count(self, batch: Batch, layer: int, rows: slice) -> None:
        """Load and weight of every expert."""
        ids_TK, recorded_TLK = batch.ids_LTK[layer][rows], batch.block.weights_TLK
        weights_TK = np.zeros(ids_TK.shape)
        if recorded_TLK is not None:
            weights_TK += recorded_TLK[rows, layer]
        sums = self._weight.total[:, layer], self._weight.carry[:, layer]
        load = batch.block.phase_T[rows], batch.nobody, self.choices_GLE[:, layer]
        scores.add_choices(ids_TK, weights_TK, *load, *sums)

    def _describe(
        self, batch: Batch, layer: int, rows: slice, scores_TM: NDArray[np.float64]
    ) -> None:
        ids_TK, phase_T = batch.ids_LTK[layer][rows], batch.block.phase_T[rows]
        is_chosen_TK = ids_TK != batch.nobody
        if not self.has_scores:
            scores_TM *= is_chosen_TK
        has_run_T = is_chosen_TK.any(axis=1) | scores_TM.any(axis=1)
        ids_TK, phase_T, scores_TM = ids_TK[has_run_T], phase_T[has_run_T], scores_TM[has_run_T]
        self.tokens_GL[:, layer] += np.bincount(phase_T, minlength=len(PHASES))
        probability_TM, best_TN, values_TN = self._values_of(scores_TM)
        if self.has_scores and self.width >= self.plan.card.top_k:
            who_TM = self._score_ids(batch, layer, rows)[has_run_T]
            chosen = ids_TK, batch.nobody, self.has_all
            scores.compare(scores_TM, who_TM, probability_TM, best_TN, *chosen, values_TN)
        self._values.add(layer, values_TN, phase_T)
        for n in range(len(SPREAD)):
            self.bins_GLNB[:, layer, n] += _binned(values_TN[:, n], phase_T)
        if self.has_all:
            self._probability.add(layer, probability_TM, phase_T)

    def _score_ids(self, batch: Batch, layer: int, rows: slice) -> NDArray[Any]:
        """[T, M]: whose scores they are."""
        if batch.block.score_ids_TLM is not None:
            return batch.block.score_ids_TLM[rows, layer]
        everyone = np.arange(self.width, dtype=np.uint16)
        return np.broadcast_to(everyone, (len(batch.row_T[rows]), self.width))

    def _values_of(self, scores_TM: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Probabilities, the best k + 1 of them, and [T, N] what they tell; NaN where this level cannot."""
        top_k, reading = self.plan.card.top_k, self._reading
        values_TN = np.full((len(scores_TM), 8), np.nan)
        probability_TM = scores.probabilities(scores_TM, reading)
        best_TN = np.full((len(scores_TM), min(top_k + 1, self.width)), np.nan)
        scores.best(probability_TM, best_TN)
        n_best = best_TN.shape[1]
        if self.has_scores or reading == PROBABILITIES or top_k > 1:
            values_TN[:, CONFIDENCE] = best_TN[:, 0]
        if n_best > 1:
            values_TN[:, MARGIN] = best_TN[:, 0] - best_TN[:, 1]
        if n_best > top_k:
            values_TN[:, BOUNDARY] = best_TN[:, top_k - 1] - best_TN[:, top_k]
        if n_best >= top_k and (self.has_all or reading == PROBABILITIES):
            values_TN[:, MASS] = np.add.accumulate(best_TN[:, :top_k], axis=1)[:, -1]
        if self.has_all:
            scores.entropy(probability_TM, values_TN[:, ENTROPY])
        if self.has_all and self.meaning == LOGITS:
            scores.z_loss(scores_TM, values_TN[:, Z_LOSS])
        return probability_TM, best_TN, values_TN

    def merge(self, later: RouterStatistics) -> None:
        if self.meaning and later.meaning and self.meaning != later.meaning:
            raise FormatError(
                f"one part of the trace seems to hold {self.meaning}, another {later.meaning}: say which (meaning=...)"
            )
        if not self.tokens_GL.any():
            self.width = later.width
        self.meaning = self.meaning or later.meaning
        self.tokens_GL += later.tokens_GL
        self.choices_GLE += later.choices_GLE
        self.bins_GLNB += later.bins_GLNB
        self._values.merge(later._values)
        self._probability.merge(later._probability)
        self._weight.merge(later._weight)

    def table(self) -> pd.DataFrame:
        """One row per phase and layer. The losses are each layer's own: pooling layers hides a collapse."""
        return pd.concat([self._layers(phase) for phase in self.plan.phases], ignore_index=True)

    def _layers(self, phase: str) -> pd.DataFrame:
        groups, card = _groups(phase), self.plan.card
        means_LN = self._values.means(groups)
        columns: dict[str, Any] = {
            "phase": np.full(card.n_layers, phase, object),
            **layer_columns(card, np.arange(card.n_layers)),
            "tokens": self.tokens_GL[groups].sum(axis=0),
            "level": np.full(card.n_layers, self.level, object),
        }
        for n, name in enumerate(SPREAD):
            columns[f"{name}_mean"] = means_LN[:, n]
            columns |= _quantiles(name, self.bins_GLNB[groups, :, n].sum(axis=0))
        columns |= {"entropy_bits_mean": means_LN[:, ENTROPY], **self._balance(groups, means_LN)}
        return pd.DataFrame(columns)

    def _balance(self, groups: slice, means_LN: NDArray[np.float64]) -> dict[str, Any]:
        load_LE, probability_LE = self._load(groups), self._probability.means(groups)
        loss_L = self.plan.card.n_experts * (load_LE * probability_LE).sum(axis=1)
        bits_L = np.empty(len(loss_L))
        scores.entropy(probability_LE, bits_L)
        return {
            "switch_loss": loss_L,  # Fedus et al. 2022, equation 4, with f over all k choices
            "excess": loss_L - 1,
            "load_probability_correlation": _correlation(load_LE, probability_LE),
            "z_loss": means_LN[:, Z_LOSS],
            "chosen_differs_share": means_LN[:, OVERRULED],
            "score_lost_mean": means_LN[:, LOST],
            "token_expert_information_bits": bits_L - means_LN[:, ENTROPY],
            "gradient_proxy_effective_tokens": self._effective_tokens(groups),
        }

    def _load(self, groups: slice) -> NDArray[np.float64]:
        """[L, E]: share of the choices."""
        choices_LE = self.choices_GLE[groups].sum(axis=0)
        total_LE = np.broadcast_to(choices_LE.sum(axis=1, keepdims=True), choices_LE.shape)
        return ratio(choices_LE, total_LE)

    def _effective_tokens(self, groups: slice) -> NDArray[np.float64]:
        """[L]: tokens that share an expert's gradient if it follows the weights; mean over experts with any."""
        weight_LE, square_LE = np.split(self._weight.sums(groups), 2, axis=1)
        effective_LE = ratio(weight_LE**2, square_LE)
        counted_LE = ~np.isnan(effective_LE)
        return ratio(np.where(counted_LE, effective_LE, 0).sum(axis=1), counted_LE.sum(axis=1))

    def mean_probability(self) -> pd.DataFrame:
        """One row per phase, layer and expert: what the router gave it on average, and its share of the choices."""
        frames = []
        n_layers, n_experts = self.choices_GLE.shape[1:]
        for phase in self.plan.phases:
            columns = {
                "phase": np.full(n_layers * n_experts, phase, object),
                **layer_columns(self.plan.card, np.repeat(np.arange(n_layers), n_experts)),
                "expert": np.tile(np.arange(n_experts), n_layers),
                "probability": self._probability.means(_groups(phase)).ravel(),
                "load": self._load(_groups(phase)).ravel(),
            }
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    @property
    def notes(self) -> list[str]:
        """How the numbers were read, and why some are missing."""
        card, reading = self.plan.card, self._reading
        whole = "source.scores=all records all scores, where a source can"
        claims = {
            "the gradient proxy is (sum of weights)^2 / sum of squares: no gradient was measured": self.has_weights,
            "no weights, hence no gradient proxy": not self.has_weights,
            "k = 1 and a normalised weight: the task gives the router no gradient": card.top_k == 1
            and card.weights_normalised is True,
            f"losses, entropy and the mean probability need all scores; {whole}": not self.has_all,
        }
        remarks = self._score_remarks(reading) if self.has_scores else self._weight_remarks(reading)
        return [claim for claim, holds in (remarks | claims).items() if holds]

    def _score_remarks(self, reading: str) -> dict[str, bool]:
        function, softmax = self.plan.card.score_function, reading == "softmax"
        return {
            f"scores are taken as {self.meaning}: the first row looks so": True,
            "the card names no score function: softmax is assumed": softmax and function is None,
            "the router's softmax is over the chosen; here it is over all": softmax
            and function == "softmax_after_topk",
            "probabilities are sigmoid scores over their sum": reading == "sigmoid",
            "the score function is not a known one: no probabilities and no losses": reading
            == "other",
            f"confidence and margins are shares of the {self.width} recorded scores": not self.has_all
            and reading in ("softmax", "sigmoid"),
        }

    def _weight_remarks(self, reading: str) -> dict[str, bool]:
        card, are_shares = self.plan.card, reading == SHARES
        return {
            f"no scores: confidence and margin are over the {card.top_k} logged weights": are_shares,
            "no scores: the weights, never normalised, are the probabilities of the chosen": not are_shares,
            "the card does not say whether the k weights sum to one": card.weights_normalised
            is None,
            "one normalised weight is always 1 and tells no confidence": are_shares
            and card.top_k == 1,
        }


def _meaning(batch: Batch, has_all: bool) -> str | None:
    """What the first row that ran looks like; later rows must not matter, or batches would."""
    block = batch.block
    recorded_TLM = block.weights_TLK if block.scores_TLM is None else block.scores_TLM
    assert recorded_TLM is not None
    has_run_TL = (block.ids_TLK != batch.nobody).any(axis=2) | recorded_TLM.any(axis=2)
    if not has_run_TL.any():
        return None
    first = int(has_run_TL.any(axis=1).argmax())
    row_LM = recorded_TLM[first, has_run_TL[first]].astype(np.float64)
    over_L = row_LM.sum(axis=1) - 1
    off_L = np.abs(over_L) if has_all else over_L
    looks_so = bool((row_LM >= 0).all() and (off_L <= SUM_TOLERANCE).all())
    if block.scores_TLM is not None:
        is_after_sigmoid = (
            block.card.score_function == "sigmoid" and row_LM.min() >= 0 >= row_LM.max() - 1
        )
        if is_after_sigmoid and not looks_so:  # no row of logits lies between 0 and 1
            return SHARES
        return PROBABILITIES if looks_so else LOGITS
    is_raw = block.card.weights_normalised is False
    return (
        PROBABILITIES
        if is_raw and looks_so and block.card.score_function in (None, "softmax")
        else SHARES
    )


def _groups(phase: str) -> slice:
    return slice(None) if phase == "all" else slice(PHASES.index(phase), PHASES.index(phase) + 1)


def _binned(values_T: NDArray[np.float64], phase_T: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[G, B] counts; NaN is in no bin."""
    there_T = ~np.isnan(values_T)
    bins_T = np.clip((values_T[there_T] * BINS).astype(np.int64), 0, BINS - 1)
    places_T = BINS * phase_T[there_T].astype(np.int64) + bins_T
    return np.bincount(places_T, minlength=BINS * len(PHASES)).reshape(-1, BINS)


def _quantiles(name: str, bins_LB: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """To the width of a bin: its middle."""
    upto_LB = np.cumsum(bins_LB, axis=1)
    n_L1 = upto_LB[:, -1:]
    columns = {}
    for label, share in QUANTILES.items():
        middle_L = ((upto_LB < np.maximum(share * n_L1, 1)).sum(axis=1) + 0.5) / BINS
        columns[f"{name}_{label}"] = np.where(n_L1[:, 0] > 0, middle_L, np.nan)
    return columns


def _correlation(x_LE: NDArray[np.float64], y_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's, per layer; NaN where either is the same for all experts."""
    x, y = (v_LE - v_LE.mean(axis=1, keepdims=True) for v_LE in (x_LE, y_LE))
    for v_LE in (x, y):
        v_LE[np.ptp(v_LE, axis=1) < 1e-12] = 0
    return ratio((x * y).sum(axis=1), np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1)))


def router_statistics(trace: Traceable) -> pd.DataFrame:
    """Confidence, margins, losses and balance of every layer's router, from whatever the trace has recorded."""
    plan = plan_of(trace)
    statistics = RouterStatistics(plan)
    columns = plan.recorded("weights", "scores", "score_ids")
    accumulate(trace, plan, [statistics], *columns)
    return statistics.table()
