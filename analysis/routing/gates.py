"""What recorded gate inputs tell: how far they move between layers, and what a later gate makes of an earlier one.

It knows no model: a gate is the matrix recorded beside the trace, without bias and without group limits.
T tokens, L layers, P pairs of layers, D hidden, E experts, K choices, S steps kept, H horizons, G row groups, C counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from analysis.routing.batch import Batch, Plan, accumulate, for_layers, layer_columns, plan_of
from analysis.routing.sums import Sums, ratio
from prefetch.errors import FormatError, MissingData
from prefetch.scoring import LEFT_OUT
from prefetch.trace.blocks import Traceable
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import DECODE, PHASES, PREFILL, RoutingTrace

CHUNK = 1024  # rows of one layer that are float32 at a time
COSINE, EUCLIDEAN, CORRELATION, ABSOLUTE = range(
    4
)  # what is summed; other distances follow from it
Gates = Mapping[int, NDArray[Any]]  # layer number -> [E, D]
Steps = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]  # request, position, SPN


class GateDistances:
    """The distances between the gate inputs of consecutive layers of one stack, for generated tokens.

    A trace without decode rows is measured on its prefill rows, and the phase column says so. The first `steps` rows
    are kept one by one, as float32. A layer that did not run for a row (no expert, all zeros) has no distance.
    """

    def __init__(self, plan: Plan, steps: int = 10_000) -> None:
        _need_gate_inputs(plan)
        self.plan, self.steps, self.kept = plan, steps, 0
        self.pairs = [pair for slots in _stacks(plan.card) for pair in pairwise(slots)]
        self.phase = DECODE if plan.survey.decode_rows else PREFILL
        self.width = 0
        self._sums = Sums(1, len(self.pairs), 8)  # the four, then their squares
        self._steps: list[Steps] = []

    def add(self, batch: Batch) -> None:
        block, rows = batch.block, np.flatnonzero(batch.block.phase_T == self.phase)
        self.width = _gate_inputs(batch).shape[2]
        n_kept = min(len(rows), self.steps - self.kept)
        kept_SPN = np.empty((n_kept, len(self.pairs), 4), np.float32)

        def measure(pair: int) -> None:
            for first in range(0, len(rows), CHUNK):
                values_TN = self._distances(batch, rows[first : first + CHUNK], self.pairs[pair])
                self._sums.add(pair, values_TN, np.zeros(len(values_TN), np.int64))
                room_SN = kept_SPN[first : first + CHUNK, pair]
                room_SN[:] = values_TN[: len(room_SN), :4]

        for_layers(measure, len(self.pairs))
        self._keep((block.request_T[rows], block.position_T[rows], kept_SPN))

    @staticmethod
    def _distances(batch: Batch, rows: NDArray[Any], pair: tuple[int, int]) -> NDArray[Any]:
        """[T, 8]: the four and their squares; NaN where there is none."""
        inputs = [_gate_inputs(batch)[rows, layer].astype(np.float32) for layer in pair]
        values_TN = np.full((len(rows), 8), np.nan)
        _measure(inputs[0], inputs[1], values_TN)
        for x_TD, layer in zip(inputs, pair, strict=True):
            values_TN[~_has_run(x_TD, batch.ids_LTK[layer][rows], batch.nobody)] = np.nan
        values_TN[:, 4:] = values_TN[:, :4] ** 2
        return values_TN

    def _keep(self, step: Steps) -> None:
        request_S, position_S, kept_SPN = step
        if n := min(len(kept_SPN), self.steps - self.kept):
            self._steps.append((request_S[:n].copy(), position_S[:n].copy(), kept_SPN[:n]))
            self.kept += n

    def merge(self, later: GateDistances) -> None:
        self.width = self.width or later.width
        self._sums.merge(later._sums)
        for step in later._steps:
            self._keep(step)

    def table(self) -> pd.DataFrame:
        """One row per pair: mean, population std; `undefined` rows have no cosine or correlation (constant input)."""
        count_PN = self._sums.counts(slice(None))[:, :4]
        mean_PN, square_PN = np.split(self._sums.means(slice(None)), 2, axis=1)
        std_PN = np.sqrt(np.maximum(square_PN - mean_PN**2, 0))
        means, stds = self._named(mean_PN), self._named(std_PN)
        # one minus a distance spreads as the distance does
        stds |= {"cosine_similarity": std_PN[:, COSINE], "pearson": std_PN[:, CORRELATION]}
        columns = {
            "phase": np.full(len(self.pairs), PHASES[self.phase], object),
            **self._pair_columns(np.arange(len(self.pairs))),
            "steps": count_PN[:, EUCLIDEAN],
            "undefined": count_PN[:, EUCLIDEAN] - count_PN.min(axis=1),
        }
        for name, mean_P in means.items():
            columns |= {f"{name}_mean": mean_P, f"{name}_std": stds[name]}
        return pd.DataFrame(columns)

    def by_step(self) -> pd.DataFrame:
        """One row per kept step and pair, in the order of the trace."""
        none = np.zeros(0, np.int32)
        empty: Steps = none, none, np.zeros((0, len(self.pairs), 4), np.float32)
        steps = zip(empty, *self._steps, strict=True)
        request_S, position_S, kept_SPN = (np.concatenate(arrays) for arrays in steps)
        has_run_SP = ~np.isnan(kept_SPN[:, :, EUCLIDEAN])
        step, pair = np.nonzero(has_run_SP)
        where = {"request": request_S[step], "position": position_S[step]}
        distances = self._named(kept_SPN[has_run_SP])
        return pd.DataFrame({**where, **self._pair_columns(pair), **distances})

    def _named(self, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """By the name of the distance; the last axis holds the four that are summed."""
        root = np.sqrt(self.width or np.nan).astype(values.dtype)
        return {
            "cosine_similarity": 1 - values[..., COSINE],
            "cosine_distance": values[..., COSINE],
            "euclidean": values[..., EUCLIDEAN],
            "l2_normalized": values[..., EUCLIDEAN] / root,
            "pearson": 1 - values[..., CORRELATION],
            "mean_absolute": values[..., ABSOLUTE],
        }

    def _pair_columns(self, pairs: NDArray[Any]) -> dict[str, Any]:
        slots_P2 = np.array(self.pairs, np.int64).reshape(-1, 2)[pairs]
        numbers = np.array(self.plan.card.layer_numbers)
        columns = layer_columns(self.plan.card, slots_P2[:, 0])
        return {**columns, "next_layer": numbers[slots_P2[:, 1]]}


def _has_run(x_TD: NDArray[np.float32], ids_TK: NDArray[Any], nobody: int) -> NDArray[np.bool_]:
    """A token over its expert's capacity has run; a layer of the other stack has not."""
    return (ids_TK != nobody).any(axis=1) | x_TD.any(axis=1)


# Sums may be reordered here: how depends on D alone, so that a row's values depend on nothing but the row.
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _measure(a_TD, b_TD, values_TN):  # type: ignore[no-untyped-def]
    n = a_TD.shape[1]
    for t in range(a_TD.shape[0]):
        a, b = a_TD[t], b_TD[t]
        dot = aa = bb = square = absolute = sum_a = sum_b = 0.0
        for d in range(n):
            x, y = np.float64(a[d]), np.float64(b[d])
            dot, aa, bb = dot + x * y, aa + x * x, bb + y * y
            square, absolute = square + (x - y) * (x - y), absolute + abs(x - y)
            sum_a, sum_b = sum_a + x, sum_b + y
        values_TN[t, EUCLIDEAN], values_TN[t, ABSOLUTE] = np.sqrt(square), absolute / n
        if aa > 0 and bb > 0:
            values_TN[t, COSINE] = 1 - dot / np.sqrt(aa * bb)
        values_TN[t, CORRELATION] = 1 - _correlation(a, b, sum_a / n, sum_b / n)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _correlation(a_D, b_D, mean_a, mean_b):  # type: ignore[no-untyped-def]
    both = aa = bb = 0.0
    for d in range(a_D.shape[0]):
        x, y = a_D[d] - mean_a, b_D[d] - mean_b
        both, aa, bb = both + x * y, aa + x * x, bb + y * y
    return both / np.sqrt(aa * bb) if aa > 0 and bb > 0 else np.nan


class Lookahead:
    """How many of a later layer's experts its own gate finds when it is given the gate input of an earlier layer.

    Horizon 0 is the control: a gate on its own input. Where the model adds a bias or limits groups the control stays
    below one, and caps what follows: read the other horizons against it. Inputs are recorded as float16, which also
    flips near ties. Ties go to the lower id.
    """

    given: ClassVar[tuple[str, ...]] = ("_gates",)

    def __init__(
        self,
        plan: Plan,
        router_weights: Gates,
        horizons: Iterable[int] = (1, 2, 3, 4),
        *,
        encoder_weights: Gates | None = None,
    ) -> None:
        _need_gate_inputs(plan)
        self.plan, self.horizons = plan, (0, *sorted(set(horizons) - {0}))
        gates = {"decoder": router_weights, "encoder": encoder_weights or {}}
        self._gates = _by_slot(plan.card, gates)
        if not self._gates:
            raise MissingData("the recorded router weights are of no layer of this trace")
        self._later_HL = self._later_layers()
        # groups are part and phase; counts are tokens, choices, those among the best k, and among the best 2k
        self.counts_HLGC = np.zeros((*self._later_HL.shape, 6, 4), np.int64)

    def _later_layers(self) -> NDArray[np.int64]:
        """[H, L]: the slot so many layers on, -1 where the stack ends or that gate is not known."""
        later_HL = np.full((len(self.horizons), self.plan.card.n_layers), -1)
        for slots in _stacks(self.plan.card):
            for h, horizon in enumerate(self.horizons):
                for here, there in zip(slots, slots[horizon:], strict=False):
                    later_HL[h, here] = there if there in self._gates else -1
        return later_HL

    def add(self, batch: Batch) -> None:
        inputs_TLD = _gate_inputs(batch)
        self._check_width(inputs_TLD.shape[2])
        group_T = 2 * batch.part_T.astype(np.int64) + batch.block.phase_T

        def look(layer: int) -> None:
            later_H = [(h, int(to)) for h, to in enumerate(self._later_HL[:, layer]) if to >= 0]
            for first in range(0, len(group_T) if later_H else 0, CHUNK):
                rows = slice(first, first + CHUNK)
                x_TD = inputs_TLD[rows, layer].astype(np.float32)
                has_run_T = _has_run(x_TD, batch.ids_LTK[layer][rows], batch.nobody)
                own_T = np.where(has_run_T, group_T[rows], -1)
                for h, to in later_H:
                    ids_TK = batch.ids_LTK[to][rows]
                    gate_ED = self._gates[to]
                    logits_TE, slack_T = x_TD @ gate_ED.T, _slack(x_TD, gate_ED)
                    row = x_TD, gate_ED, logits_TE, slack_T, ids_TK
                    _count_hits(*row, batch.nobody, own_T, self.counts_HLGC[h, layer])

        with _blas().limit(limits=1, user_api="blas"):  # layers are the threads here
            for_layers(look, self.plan.card.n_layers)

    def _check_width(self, width: int) -> None:
        for slot, gate_ED in self._gates.items():
            if gate_ED.shape[1] != width:
                raise FormatError(
                    f"layer {self.plan.card.layer_numbers[slot]}: its router weights take inputs of width "
                    f"{gate_ED.shape[1]}, but the recorded gate inputs have {width}"
                )

    def merge(self, later: Lookahead) -> None:
        self.counts_HLGC += later.counts_HLGC

    def table(self, part: int | None = None) -> pd.DataFrame:
        """One row per phase, horizon and layer: all rows but those of repeated requests, or those of one part."""
        return pd.concat([self._rows(p, part) for p in self.plan.phases], ignore_index=True)

    def _rows(self, phase: str, part: int | None) -> pd.DataFrame:
        part_G, phase_G = np.divmod(np.arange(6), 2)
        chosen_G = part_G != LEFT_OUT if part is None else part_G == part
        if phase != "all":
            chosen_G &= phase_G == PHASES.index(phase)
        h, layer = np.nonzero(self._later_HL >= 0)
        tokens, choices, hits, wide_hits = self.counts_HLGC[h, layer][:, chosen_G].sum(axis=1).T
        columns = {
            "phase": np.full(len(h), phase, object),
            "horizon": np.array(self.horizons)[h],
            **layer_columns(self.plan.card, layer),
            "later_layer": np.array(self.plan.card.layer_numbers)[self._later_HL[h, layer]],
            "tokens": tokens,
            "recall_at_k": ratio(hits, choices),
            "recall_at_2k": ratio(wide_hits, choices),
        }
        return pd.DataFrame(columns)


_blas = cache(ThreadpoolController)  # finds the libraries once


def _slack(x_TD: NDArray[np.float32], gate_ED: NDArray[np.float32]) -> NDArray[np.float64]:
    """The most that the difference of two logits can be off in float32, in whatever order it is summed."""
    length_T, longest = np.linalg.norm(x_TD, axis=1), np.linalg.norm(gate_ED, axis=1).max()
    return x_TD.shape[1] * 2.0**-22 * np.float64(longest) * length_T


@njit(cache=True, nogil=True)
def _count_hits(x_TD, gate_ED, logits_TE, slack_T, ids_TK, nobody, group_T, counts_GC):  # type: ignore[no-untyped-def]
    top_k = ids_TK.shape[1]
    for t in range(ids_TK.shape[0]):
        if group_T[t] < 0:
            continue
        counts_C, n = counts_GC[group_T[t]], 0
        for k in range(top_k):
            if ids_TK[t, k] != nobody:
                n += 1
                rank = _rank(x_TD[t], gate_ED, logits_TE[t], slack_T[t], ids_TK[t, k], top_k)
                counts_C[2] += rank < top_k
                counts_C[3] += rank < 2 * top_k
        counts_C[0] += n > 0
        counts_C[1] += n


@njit(cache=True, nogil=True)
def _rank(x_D, gate_ED, logit_E, slack, expert, top_k):  # type: ignore[no-untyped-def]
    """How many experts stand before this one, exactly wherever that decides on in or out of the best k or 2k."""
    # BLAS rounds a row by its place among others (OpenBLAS 0.3.31): what float32 cannot tell is told in float64
    above = near = 0
    own = np.float64(logit_E[expert])
    for e in range(logit_E.shape[0]):
        above += logit_E[e] - own > slack
        near += abs(logit_E[e] - own) <= slack
    if not near:  # NaN
        return logit_E.shape[0]
    last = above + near - 1
    if (above < top_k) == (last < top_k) and (above < 2 * top_k) == (last < 2 * top_k):
        return above
    exact = _product(x_D, gate_ED[expert])
    for e in range(logit_E.shape[0]):
        if e != expert and abs(logit_E[e] - own) <= slack:
            other = _product(x_D, gate_ED[e])
            above += other > exact or (other == exact and e < expert)
    return above


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _product(x_D, y_D):  # type: ignore[no-untyped-def]
    total = 0.0
    for d in range(x_D.shape[0]):
        total += np.float64(x_D[d]) * np.float64(y_D[d])
    return total


def _stacks(card: ModelCard) -> list[list[int]]:
    """The slots of every stack, in the card's order."""
    stack_L = card.layer_stacks
    return [
        [i for i, own in enumerate(stack_L) if own == stack] for stack in dict.fromkeys(stack_L)
    ]


def _by_slot(card: ModelCard, gates: Mapping[str, Gates]) -> dict[int, NDArray[np.float32]]:
    found = {}
    for slot, (stack, number) in enumerate(zip(card.layer_stacks, card.layer_numbers, strict=True)):
        gate_ED = gates[stack].get(number)
        if gate_ED is None:
            continue
        if gate_ED.ndim != 2 or len(gate_ED) != card.n_experts:
            raise FormatError(
                f"layer {number}: expected router weights of shape [{card.n_experts}, hidden size], "
                f"got {list(gate_ED.shape)}"
            )
        found[slot] = np.ascontiguousarray(gate_ED, np.float32)
    return found


def _need_gate_inputs(plan: Plan) -> None:
    if "gate_inputs" not in plan.columns:
        raise MissingData("the trace has no gate inputs; source.gate_inputs=true records them")


def _gate_inputs(batch: Batch) -> NDArray[np.float16]:
    inputs_TLD = batch.block.gate_inputs_TLD
    if inputs_TLD is None:
        raise MissingData("the gate inputs were not read: name gate_inputs among the columns")
    return inputs_TLD


def recorded_gates(trace: Traceable) -> tuple[Gates, Gates]:
    """The router weights beside a trace: of the decoder, of the encoder."""
    if isinstance(trace, RoutingTrace):
        raise MissingData("a trace in memory has no router weights beside it: pass router_weights")
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    names = "router_weights", "encoder_router_weights"
    found = [name for name in names if (reader.folder / f"{name}.safetensors").exists()]
    if not found:
        raise MissingData(
            "the trace has no router weights; source.gate_inputs=true records them, where a router is one matrix"
        )
    tensors = {name: reader.beside(name) if name in found else {} for name in names}
    decoder, encoder = (
        {int(key.removeprefix("layer.")): gate for key, gate in tensors[name].items()}
        for name in names
    )
    return decoder, encoder


def gate_distances(trace: Traceable, steps: int = 10_000) -> pd.DataFrame:
    """How far gate inputs move from one layer to the next."""
    plan = plan_of(trace)
    distances = GateDistances(plan, steps)
    accumulate(trace, plan, [distances], "gate_inputs")
    return distances.table()


def gate_lookahead(
    trace: Traceable, router_weights: Gates | None = None, horizons: Iterable[int] = (1, 2, 3, 4)
) -> pd.DataFrame:
    """Recall of every layer's gate on the gate inputs of earlier layers."""
    plan = plan_of(trace)
    _need_gate_inputs(plan)
    gates, encoder = recorded_gates(trace) if router_weights is None else (router_weights, {})
    lookahead = Lookahead(plan, gates, horizons, encoder_weights=encoder)
    accumulate(trace, plan, [lookahead], "gate_inputs")
    return lookahead.table()
