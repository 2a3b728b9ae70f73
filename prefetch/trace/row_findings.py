"""What is wrong with rows of a trace, every row that is: ids, weights, positions, requests, phases, by file.

The checks of `checks.py` stop at the first fault; these go on. It reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.trace.card import ModelCard
from prefetch.trace.routing import no_expert

MOST_ROWS = 20  # of one kind in one row group that are listed; the others are counted
SUM_TOLERANCE = 0.02  # k float16 weights that were normalised add up to 1 within this
Columns = Mapping[str, NDArray[Any]]
RowFinding = tuple[int, str, bool]  # row in the block, what, is it damage


class RowFindings:
    """`of(columns)` for the row groups of all files in order."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.n_requests = 0
        self._request, self._position = -1, -1

    def of(self, columns: Columns) -> Iterator[RowFinding]:
        if "request_T" in columns:
            yield from self._order(columns["request_T"], columns["position_T"])
        for name in ("experts", "score_ids"):
            if name in columns:
                yield from self._ids(columns[name], name)
        for name in ("weights", "scores", "gate_inputs", "pre_attention"):
            if name in columns:
                yield from self._finite(columns[name], name)
        if {"weights", "experts"} <= columns.keys() and self.card.weights_normalised:
            yield from self._sums(columns["weights"], columns["experts"])

    def _order(
        self, request_T: NDArray[np.int32], position_T: NDArray[np.int32]
    ) -> Iterator[RowFinding]:
        if not len(request_T):
            return
        before_T = np.append(self._request, request_T[:-1])
        behind_T = np.append(self._position, position_T[:-1])
        is_new_T = request_T != before_T
        yield from _listed(
            request_T < before_T,
            lambda t: f"request {request_T[t]} after request {before_T[t]}: requests must ascend",
        )
        yield from _listed(
            ~is_new_T & (position_T <= behind_T),
            lambda t: (
                f"position {position_T[t]} after {behind_T[t]} in request {request_T[t]}: must ascend"
            ),
        )
        self.n_requests += int(is_new_T.sum())
        self._request, self._position = int(request_T[-1]), int(position_T[-1])

    def _ids(self, ids_TLK: NDArray[Any], name: str) -> Iterator[RowFinding]:
        n_experts, nobody = self.card.n_experts, no_expert(self.card.n_experts)
        for layer, number in enumerate(self.card.layer_numbers):
            ids_TK = np.sort(ids_TLK[:, layer], axis=1)
            out_T = ((ids_TK >= n_experts) & (ids_TK != nobody)).any(axis=1)
            twice_T = ((ids_TK[:, 1:] == ids_TK[:, :-1]) & (ids_TK[:, 1:] != nobody)).any(axis=1)

            def named(t: int, layer: int = layer, number: int = number) -> str:
                return f"layer {number}, {name} {ids_TLK[t, layer].tolist()}"

            yield from _listed(
                out_T,
                lambda t, n=named: f"{n(t)}: an id is out of range for {n_experts} experts",
            )
            yield from _listed(
                twice_T & ~out_T, lambda t, n=named: f"{n(t)}: an expert is named twice"
            )

    def _finite(self, values: NDArray[Any], name: str) -> Iterator[RowFinding]:
        bad_TL = ~np.isfinite(values).all(axis=2)

        def told(t: int) -> str:
            layer = int(bad_TL[t].argmax())
            found = values[t, layer].tolist()[:8]
            return f"layer {self.card.layer_numbers[layer]}: expected finite {name}, got {found}"

        yield from _listed(bad_TL.any(axis=1), told)

    def _sums(self, weights_TLK: NDArray[Any], ids_TLK: NDArray[Any]) -> Iterator[RowFinding]:
        """A doubt, not a damage: some engines scale their weights after normalising them."""
        chosen_TLK = ids_TLK != no_expert(self.card.n_experts)
        sums_TL = np.where(chosen_TLK, weights_TLK, 0).sum(axis=2, dtype=np.float32)
        odd_TL = chosen_TLK.all(axis=2) & ~(np.abs(sums_TL - 1) < SUM_TOLERANCE)
        if odd_TL.any():
            row = int(odd_TL.any(axis=1).argmax())
            yield (
                row,
                f"the card says normalised weights, but {int(odd_TL.sum())} of {odd_TL.size} rows of layers do not "
                f"add up to 1 ({float(sums_TL[odd_TL][0]):.3f} first)",
                False,
            )


def _listed(bad_T: NDArray[np.bool_], told: Any) -> Iterator[RowFinding]:
    """A finding for each of the first rows, and one that counts the others."""
    rows = np.flatnonzero(bad_T)
    for row in rows[:MOST_ROWS].tolist():
        yield row, told(row), True
    if len(rows) > MOST_ROWS:
        yield int(rows[MOST_ROWS]), f"and {len(rows) - MOST_ROWS} rows more of this kind", True
