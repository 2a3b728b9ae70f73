"""Passes out of rows per layer: what every llama.cpp log needs, since none says where a token or a request begins.

A pass is a run of rows for each layer, in ascending layers, with as many rows as the pass has tokens; the last layer
may have fewer, because llama.cpp drops tokens without an output before it. It knows no text format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import DECODE, PREFILL, RoutingTrace, id_dtype, no_expert, trace_of

CUT = "rows of the last pass, which was cut off"
REQUESTS = "the log names no requests: a pass of several tokens is a prompt and starts one"


@dataclass(frozen=True, eq=False)
class Log:
    """The selection rows of one log: R rows of K ids, and the passes they belong to."""

    path: Path
    layers: tuple[int, ...]
    layer_R: NDArray[np.int32]
    ids_RK: NDArray[np.int32]
    weights_RK: NDArray[np.float32] | None
    line_R: NDArray[np.int64]
    token_R: NDArray[np.int64]  # which token of the log a row is about
    pass_R: NDArray[np.int64]
    tokens_P: NDArray[np.int64]  # of every pass
    n_cut: int  # rows after the last whole pass
    cut_line: int | None = None  # where they begin

    @property
    def pass_T(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.tokens_P)), self.tokens_P)

    @property
    def first_token_P(self) -> NDArray[np.int64]:
        return np.cumsum(self.tokens_P) - self.tokens_P


def trace_of_log(
    log: Log,
    card: ModelCard,
    *,
    domain: str,
    ubatch: int,
    one_request: bool = False,
    gate_inputs_TLD: NDArray[np.float16] | None = None,
) -> RoutingTrace:
    """The log as rows of tokens; a pass of several tokens starts a request, passes of one are its decode."""
    ids_TLK = ids_of(log, card.n_experts)
    weights = None
    if log.weights_RK is not None:
        weights = np.zeros(ids_TLK.shape, np.float16)
        weights[log.token_R, np.searchsorted(log.layers, log.layer_R)] = log.weights_RK
    request_P, phase_P = _requests(log.tokens_P, ubatch, one_request)
    return trace_of(
        card,
        ids_TLK,
        request_T=request_P[log.pass_T],
        phase_T=phase_P[log.pass_T],
        domain=domain,
        weights_TLK=weights,
        gate_inputs_TLD=gate_inputs_TLD,
    )


def ids_of(log: Log, n_experts: int) -> NDArray[Any]:
    """[T, L, K]; a token without a row in a layer has no expert there."""
    if log.ids_RK.size and int(log.ids_RK.max()) >= n_experts:
        row = int((log.ids_RK >= n_experts).any(axis=1).argmax())
        raise FormatError(
            f"{log.path}, line {log.line_R[row]}: expert id {log.ids_RK[row].max()} is out of range for "
            f"{n_experts} experts; if the model has more, pass source.n_experts=..."
        )
    shape = (int(log.tokens_P.sum()), len(log.layers), log.ids_RK.shape[1])
    ids_TLK = np.full(shape, no_expert(n_experts), id_dtype(n_experts))
    ids_TLK[log.token_R, np.searchsorted(log.layers, log.layer_R)] = log.ids_RK
    return ids_TLK


def _requests(
    tokens_P: NDArray[np.int64], ubatch: int, one_request: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Request and phase of every pass; a full micro-batch goes on in the next pass of several tokens."""
    is_prompt_P = tokens_P > 1
    goes_on_P = np.concatenate([[False], (tokens_P == ubatch)[:-1]]) & is_prompt_P
    request_P = np.cumsum(is_prompt_P & ~goes_on_P & (not one_request)).astype(np.int64)
    return request_P, np.where(is_prompt_P, PREFILL, DECODE).astype(np.int64)


def passes(
    path: Path,
    layer_R: NDArray[np.int32],
    ids_RK: NDArray[np.int32],
    weights_RK: NDArray[np.float32] | None,
    line_R: NDArray[np.int64],
    is_cut: bool = False,
) -> Log:
    """Ties rows to passes and tokens; a last pass that is not whole is cut off, any other is refused."""
    layers = np.flatnonzero(np.bincount(layer_R))
    start_U = np.flatnonzero(np.diff(layer_R, prepend=-1))  # runs of one layer
    size_U = np.diff(np.append(start_U, len(layer_R)))
    layer_U = layer_R[start_U]
    opens_U = np.diff(layer_U, prepend=2**16) < 0
    pass_U = np.cumsum(opens_U) - 1
    first_U = np.flatnonzero(opens_U)
    runs_P = np.diff(np.append(first_U, len(layer_U)))
    tokens_P = size_U[first_U]
    # every layer must be there, but the last one where a pass of a prompt gives no output
    lacks_last_P = (
        (runs_P == len(layers) - 1) & (tokens_P > 1) & (layer_U[first_U + runs_P - 1] != layers[-1])
    )
    whole_P = (runs_P == len(layers)) | lacks_last_P
    is_last_U = layer_U == layers[-1]
    fits_U = np.where(
        is_last_U & (len(layers) > 1), size_U <= tokens_P[pass_U], size_U == tokens_P[pass_U]
    )
    whole_P &= np.bincount(pass_U, ~fits_U, len(tokens_P)) == 0
    broken = np.flatnonzero(~whole_P)
    n_passes = len(tokens_P)
    if is_cut or (len(broken) and broken[0] == n_passes - 1):
        n_passes -= 1  # a server that was stopped leaves half a pass
    if len(broken) and broken[0] < n_passes:
        _refuse(path, int(broken[0]), layers, layer_U, size_U, first_U, runs_P, line_R[start_U])
    if not n_passes:
        raise FormatError(
            f"{path}: expected at least one whole pass over {len(layers)} layers, found none"
        )
    keep_U = pass_U < n_passes
    rows = int(size_U[keep_U].sum())
    run_R = np.repeat(np.arange(len(size_U)), size_U)[:rows]
    pass_R = pass_U[run_R]
    tokens_P = tokens_P[:n_passes]
    missing_R = (
        (tokens_P[pass_R] - size_U[run_R]) if len(layers) > 1 else 0
    )  # outputs are the last tokens
    token_R = (
        (np.cumsum(tokens_P) - tokens_P)[pass_R] + np.arange(rows) - start_U[run_R] + missing_R
    )
    return Log(
        path=path,
        layers=tuple(int(layer) for layer in layers),
        layer_R=layer_R[:rows],
        ids_RK=ids_RK[:rows],
        weights_RK=None if weights_RK is None else weights_RK[:rows],
        line_R=line_R[:rows],
        token_R=token_R,
        pass_R=pass_R,
        tokens_P=tokens_P,
        cut_line=int(line_R[start_U[first_U[n_passes]]]) if n_passes < len(first_U) else None,
        n_cut=0 if n_passes == len(first_U) else int(size_U[first_U[-1]]),
    )


def _refuse(
    path: Path,
    broken: int,
    layers: NDArray[Any],
    layer_U: NDArray[Any],
    size_U: NDArray[Any],
    first_U: NDArray[Any],
    runs_P: NDArray[Any],
    line_U: NDArray[Any],
) -> None:
    first, n = int(first_U[broken]), int(runs_P[broken])
    found = ", ".join(
        f"{layer}: {size}"
        for layer, size in zip(layer_U[first : first + n], size_U[first : first + n], strict=True)
    )
    raise FormatError(
        f"{path}, line {line_U[first]}: pass {broken} must have equal rows in each of the layers "
        f"{layers.tolist()} (the last one may have fewer), found rows by layer {{{found[:300]}}}"
    )
