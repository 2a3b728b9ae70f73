"""What routing is: `RoutingTrace`, a block of tokens with the experts that each layer chose for them.

T tokens, L layers, K choices, E experts, M recorded scores, D hidden. It knows no file and no model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard

IdArray = NDArray[np.uint8] | NDArray[np.uint16]
PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
NO_TOKEN = -1  # the source does not say which vocabulary entry this was


def id_dtype(n_experts: int) -> np.dtype[Any]:
    """One byte while the maximum value is free to mean "no expert", two above."""
    return np.dtype(np.uint8 if n_experts <= 255 else np.uint16)


def no_expert(n_experts: int) -> int:
    return int(np.iinfo(id_dtype(n_experts)).max)


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Which experts the router chose: `ids_TLK[t, l]` lists the K experts of token t at layer l.

    Rows of one request stand together and in order of position. What the source did not record is None.
    """

    card: ModelCard
    ids_TLK: IdArray  # the dtype's maximum = no expert (dropped token, other stack, not run)
    request_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    phase_T: NDArray[np.uint8]  # index into PHASES
    executed_T: NDArray[np.bool_]  # False: answered from a prefix cache, never run, never replayed
    token_T: NDArray[np.int32]  # NO_TOKEN where unknown
    domain_T: NDArray[np.int32]  # index into `domains`, -1 where unknown
    domains: tuple[str, ...] = ()
    weights_TLK: NDArray[np.float16] | None = None
    scores_TLM: NDArray[np.float16] | None = None  # all E scores in id order, or the best M
    score_ids_TLM: IdArray | None = None  # whose scores they are; None = all E
    gate_inputs_TLD: NDArray[np.float16] | None = None
    pre_attention_TLD: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        card, shape = self.card, self.ids_TLK.shape
        if shape[1:] != (card.n_layers, card.top_k) or self.ids_TLK.dtype != id_dtype(
            card.n_experts
        ):
            raise FormatError(
                f"ids_TLK of {card.name}: expected [T, {card.n_layers}, {card.top_k}] of "
                f"{id_dtype(card.n_experts)}, got {list(shape)} of {self.ids_TLK.dtype}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray) and len(value) != shape[0]:
                raise FormatError(f"{field.name}: expected {shape[0]} rows, got {len(value)}")
        for name in (
            "weights_TLK",
            "scores_TLM",
            "score_ids_TLM",
            "gate_inputs_TLD",
            "pre_attention_TLD",
        ):
            value = getattr(self, name)
            if value is not None and value.shape[1] != card.n_layers:
                raise FormatError(f"{name}: expected {card.n_layers} layers, got {value.shape[1]}")
        if self.weights_TLK is not None and self.weights_TLK.shape != shape:
            raise FormatError(
                f"weights_TLK: expected {list(shape)}, got {list(self.weights_TLK.shape)}"
            )
        ids = self.ids_TLK
        if ids.size and int(ids.max()) >= card.n_experts:
            bad = (ids >= card.n_experts) & (ids != no_expert(card.n_experts))
            if bad.any():
                t, layer, _ = (int(x) for x in np.argwhere(bad)[0])
                raise FormatError(
                    f"row {t}, layer {card.layer_numbers[layer]}: expert id {int(ids[bad][0])} is out of "
                    f"range for {card.n_experts} experts"
                )

    @property
    def n_tokens(self) -> int:
        return len(self.ids_TLK)

    @property
    def starts_R(self) -> NDArray[np.int64]:
        """First row of every request in this block."""
        if not self.n_tokens:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.diff(self.request_T, prepend=self.request_T[0] - 1)).astype(
            np.int64
        )

    def rows(self, rows: slice | NDArray[Any]) -> RoutingTrace:
        """The same trace, only these rows."""
        arrays = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays)


def trace_of(
    card: ModelCard,
    ids_TLK: NDArray[Any],
    *,
    request_T: Any = 0,
    position_T: Any = None,
    phase_T: Any = PREFILL,
    executed_T: Any = True,
    token_T: Any = NO_TOKEN,
    domain: str | None = None,
    weights_TLK: NDArray[Any] | None = None,
    **recorded: NDArray[Any] | None,
) -> RoutingTrace:
    """A trace from what a source has: scalars are spread over the rows, ids are narrowed, -1 means no expert."""
    ids = np.asarray(ids_TLK)
    if ids.ndim != 3:
        raise FormatError(
            f"ids_TLK: expected three axes (token, layer, choice), got shape {list(ids.shape)}"
        )
    n_tokens, dtype = len(ids), id_dtype(card.n_experts)
    if ids.dtype != dtype:
        outside = (ids < -1) | (ids >= card.n_experts)
        if outside.any():
            t, layer, _ = (int(x) for x in np.argwhere(outside)[0])
            raise FormatError(
                f"row {t}, layer slot {layer}: expert id {ids[outside][0]} is out of range for "
                f"{card.n_experts} experts; if the model has more, pass source.n_experts=..."
            )
        ids = np.where(ids < 0, no_expert(card.n_experts), ids).astype(dtype)

    def spread(value: Any, kind: Any) -> NDArray[Any]:
        return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype=kind), (n_tokens,)))

    if position_T is None:
        position_T = _positions(spread(request_T, np.int32))
    return RoutingTrace(
        card=card,
        ids_TLK=np.ascontiguousarray(ids),
        request_T=spread(request_T, np.int32),
        position_T=spread(position_T, np.int32),
        phase_T=spread(phase_T, np.uint8),
        executed_T=spread(executed_T, np.bool_),
        token_T=spread(token_T, np.int32),
        domain_T=spread(-1 if domain is None else 0, np.int32),
        domains=() if domain is None else (domain,),
        weights_TLK=None if weights_TLK is None else np.asarray(weights_TLK, np.float16),
        **recorded,
    )


def _positions(request_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """0, 1, 2, ... within every run of equal request numbers."""
    rows = np.arange(len(request_T))
    starts = np.flatnonzero(np.diff(request_T, prepend=request_T[:1] - 1)) if len(rows) else rows
    return rows - np.repeat(starts, np.diff(np.append(starts, len(rows))))
