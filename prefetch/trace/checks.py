"""What every trace must hold, whoever read it: the checks that catch a damaged or misread recording.

It knows no file format. A source hands blocks of rows to `RowChecks` through the writer.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import PHASES, RoutingTrace, no_expert

WARM_UP_ROWS = (
    8  # so many equal rows at the start of a file are a server's dummy batches, not a text
)
WARM_UP_CHOICES = 8  # ... where a row holds at least so many choices; fewer repeat by chance
LOG_CHANCE = (
    -30.0
)  # 1e-13: what is less likely than this under uniform routing did not come from a router
DUPLICATE_ROWS = 8  # shorter requests are equal by chance


@njit(cache=True, nogil=True)
def _scan(ids_TLK, n_experts, nobody, seen_E, hash_L, first_LK, varies_L):  # type: ignore[no-untyped-def]
    """First (row, layer) that names an expert twice, or (-1, -1); every layer's running hash is carried on."""
    stamp = np.int64(0)
    bad_row, bad_layer = -1, -1
    seen_E[:] = 0
    for t in range(ids_TLK.shape[0]):
        for layer in range(ids_TLK.shape[1]):
            stamp += 1
            mixed, varies = hash_L[layer], False
            for k in range(ids_TLK.shape[2]):
                expert = ids_TLK[t, layer, k]
                mixed = (mixed ^ np.uint64(expert)) * np.uint64(0x100000001B3)
                varies |= expert != first_LK[layer, k]
                if expert == nobody:
                    continue
                if seen_E[expert] == stamp and bad_row < 0:
                    bad_row, bad_layer = t, layer
                seen_E[expert] = stamp
            hash_L[layer] = mixed
            varies_L[layer] |= varies
    return bad_row, bad_layer


@njit(cache=True, nogil=True)
def _permuted_windows(ids_TLK, n_experts, nobody):  # type: ignore[no-untyped-def]
    """Per layer, how many E-sized windows of the flattened choices name every expert exactly once.

    The windows of a log whose beginning was lost start in the middle: the best of all first rows counts.
    """
    n_tokens, n_layers, k = ids_TLK.shape
    size = min(n_experts, n_tokens * k)
    offsets = (n_experts + k - 1) // k if size == n_experts else 1
    best_L = np.zeros(n_layers, np.int64)
    seen_E = np.zeros(n_experts, np.int64)
    stamp = 0
    for layer in range(n_layers):
        for offset in range(offsets):
            permuted = 0
            for begin in range(offset * k, n_tokens * k - size + 1, size):
                stamp += 1
                distinct = 0
                for i in range(begin, begin + size):
                    expert = ids_TLK[i // k, layer, i % k]
                    if expert == nobody or seen_E[expert] == stamp:
                        break
                    seen_E[expert] = stamp
                    distinct += 1
                permuted += distinct == size
            best_L[layer] = max(best_L[layer], permuted)
    return best_L


def permuted_windows(ids_TLK: NDArray[Any], n_experts: int) -> tuple[NDArray[np.int64], int]:
    """Per layer the windows of E consecutive choices that are a permutation of all experts, and how many there are."""
    n_choices = ids_TLK.shape[0] * ids_TLK.shape[2]
    if n_choices == 0:
        return np.zeros(ids_TLK.shape[1], np.int64), 0
    windows = n_choices // min(n_experts, n_choices)
    return _permuted_windows(ids_TLK, n_experts, no_expert(n_experts)), windows


def _log_chance_of_window(n_choices: int, n_experts: int, top_k: int) -> float:
    """log P(no expert twice among the first n_choices), every row an independent uniform k-subset."""

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    total = 0.0
    for start in range(0, n_choices, top_k):
        part = min(top_k, n_choices - start)
        total += log_choose(n_experts - start, part) - log_choose(n_experts, part)
    return total


def log_chance_of_uniformity(ids_TLK: NDArray[Any], n_experts: int) -> float:
    """How likely so even a run is by chance (log): the detector of logs that were written with a wrong stride.

    A strided view of an argsort lists each expert once in every E choices, in every layer. A run shorter than E
    choices is judged over all its layers together. 0 means nothing strange.
    """
    n_tokens, n_layers, top_k = ids_TLK.shape
    if n_tokens < 2 or top_k == n_experts:
        return 0.0
    permuted_L, windows = permuted_windows(ids_TLK, n_experts)
    size = min(n_experts, n_tokens * top_k)
    log_window = _log_chance_of_window(size, n_experts, top_k)
    if size < n_experts:
        return n_layers * log_window if int(permuted_L.sum()) == n_layers else 0.0
    most = int(permuted_L.max())
    expected = windows * math.exp(log_window)
    if most <= expected or most == 0:
        return 0.0
    return min(
        0.0, most * (math.log(windows / most) + 1.0 + log_window)
    )  # Chernoff's bound on the binomial tail


def leading_constant_rows(ids_TLK: NDArray[Any]) -> int:
    """Rows at the start that are equal in every layer: a server's warm-up batches, where there are enough of them."""
    rows = equal_rows(ids_TLK, ids_TLK[0]) if len(ids_TLK) else 0
    is_evidence = rows >= WARM_UP_ROWS and ids_TLK[0].size >= WARM_UP_CHOICES
    return rows if is_evidence else 0


def equal_rows(ids_TLK: NDArray[Any], row_LK: NDArray[Any]) -> int:
    """How many rows at the start are this row."""
    different = (ids_TLK != row_LK).any(axis=(1, 2))
    return int(different.argmax()) if different.any() else len(ids_TLK)


class RowChecks:
    """Judges the rows of a trace as they pass by: constant memory but for eight bytes a request."""

    def __init__(self, card: ModelCard, *, suspects: bool = True) -> None:
        self.n_experts, self.top_k, n_layers = card.n_experts, card.top_k, card.n_layers
        self.suspects = (
            suspects  # False for drawn routing, which may be as even or as constant as it likes
        )
        self.rows = 0
        self.duplicate_requests = 0
        self.requests_with_gaps = 0
        self._seen_E = np.zeros(card.n_experts, np.int64)
        self._hash_L = np.full(n_layers, 0xCBF29CE484222325, np.uint64)
        self._first_LK: NDArray[Any] | None = None
        self._varies_L = np.zeros(n_layers, bool)
        self._digests: set[bytes] = set()
        self._request: tuple[int, int, Any] | None = (
            None  # number, rows, hasher of the request that is open
        )
        self._position = -1

    def add(self, block: RoutingTrace, where: str, first_row: int) -> None:
        """`first_row` is where the block begins in the file that `where` names."""
        nobody, ids = no_expert(self.n_experts), np.ascontiguousarray(block.ids_TLK)
        if self._first_LK is None:
            self._first_LK = ids[0].copy()
        row, layer = _scan(
            ids, self.n_experts, nobody, self._seen_E, self._hash_L, self._first_LK, self._varies_L
        )
        if row >= 0:
            raise FormatError(
                f"{where}, row {first_row + row}, layer {block.card.layer_numbers[layer]}: expected "
                f"{self.top_k} distinct experts, got {ids[row, layer].tolist()}"
            )
        _check_weights(block, where, first_row)
        stops = [*block.starts_R[1:].tolist(), block.n_tokens]
        for start, stop in zip(block.starts_R.tolist(), stops, strict=True):
            self._request_part(block, start, stop, where, first_row)
        self.rows += block.n_tokens

    def _request_part(
        self, block: RoutingTrace, start: int, stop: int, where: str, first_row: int
    ) -> None:
        number = int(block.request_T[start])
        if self._request is None or self._request[0] != number:
            self._end_request()
            self._request, self._position = (number, 0, hashlib.blake2b(digest_size=8)), -1
        positions = block.position_T[start:stop]
        steps = np.diff(positions, prepend=self._position if self._request[1] else positions[0] - 1)
        if (steps <= 0).any():
            row = start + int((steps <= 0).argmax())
            raise FormatError(
                f"{where}, row {first_row + row}: positions of a request must ascend, got "
                f"{int(block.position_T[row])} in request {number}"
            )
        self.requests_with_gaps += int((steps > 1).any())
        self._position = int(positions[-1])
        self._request[2].update(np.ascontiguousarray(block.ids_TLK[start:stop]).data)
        self._request = (number, self._request[1] + stop - start, self._request[2])
        if not self.suspects:
            return
        phases = block.phase_T[start:stop]
        for phase in range(len(PHASES)):
            run = np.ascontiguousarray(block.ids_TLK[start:stop][phases == phase])
            if log_chance_of_uniformity(run, self.n_experts) < LOG_CHANCE:
                permuted_L, windows = permuted_windows(run, self.n_experts)
                raise FormatError(
                    f"{where}, request {number}, {PHASES[phase]}: {int(permuted_L.max())} of {windows} windows of "
                    f"{min(self.n_experts, run.shape[0] * self.top_k)} choices name every expert exactly once, which "
                    "no router does: the log was written with a wrong stride (ranks of one token instead of many "
                    "tokens); record it again with a fixed logger"
                )

    def _end_request(self) -> None:
        if self._request is None or self._request[1] < DUPLICATE_ROWS:
            return
        digest = self._request[2].digest()
        self.duplicate_requests += digest in self._digests
        self._digests.add(digest)

    def finish(self, layer_numbers: tuple[int, ...], where: str) -> None:
        """What can only be said at the end: requests that repeat, layers that are copies of each other."""
        self._end_request()
        self._request = None
        if self.rows < WARM_UP_ROWS or self.top_k == self.n_experts or not self.suspects:
            return
        first: dict[int, int] = {}
        for layer, mixed in enumerate(self._hash_L.tolist()):
            twin = first.setdefault(mixed, layer)
            if twin != layer and self._varies_L[layer]:
                raise FormatError(
                    f"{where}: layers {layer_numbers[twin]} and {layer_numbers[layer]} are byte-identical over "
                    f"{self.rows} rows; layers route independently, so one of them was copied or misread"
                )


def _check_weights(block: RoutingTrace, where: str, first_row: int) -> None:
    recorded = {
        "weight": block.weights_TLK,
        "score": block.scores_TLM,
        "gate input": block.gate_inputs_TLD,
        "pre-attention state": block.pre_attention_TLD,
    }
    for name, values in recorded.items():
        if values is not None and not np.isfinite(values).all():
            t, layer, _ = (int(x) for x in np.argwhere(~np.isfinite(values))[0])
            raise FormatError(
                f"{where}, row {first_row + t}, layer {block.card.layer_numbers[layer]}: expected finite {name}s, "
                f"got {values[t, layer].tolist()[:8]}"
            )


def check_trace(reader: TraceReader) -> None:
    """A trace that somebody else wrote holds what a trace must hold: one pass over its rows."""
    card = reader.card
    checks = RowChecks(card, suspects=reader.provenance.kind == "real")
    recorded = [name for name in reader.columns if name in ("weights", "scores", "score_ids")]
    last = -1
    for block in reader.batches(*recorded):
        if int(block.request_T[0]) <= last or (np.diff(block.request_T) < 0).any():
            raise FormatError(f"{reader.folder}: requests must ascend")
        last = int(block.request_T[-1])
        checks.add(block, str(reader.folder), checks.rows)
    checks.finish(card.layer_numbers, str(reader.folder))
    if not checks.rows:
        raise FormatError(f"{reader.folder}: the trace has no rows")
