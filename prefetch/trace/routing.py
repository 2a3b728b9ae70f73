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
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        n_tokens, n_layers = len(self.ids_TLK), self.card.n_layers
        ids, small, half = id_dtype(self.card.n_experts), (n_tokens,), np.dtype(np.float16)
        n_scores = self.card.n_experts if self.score_ids_TLM is None else None
        expected: dict[str, tuple[np.dtype[Any], tuple[int | None, ...]]] = {
            "ids_TLK": (ids, (n_tokens, n_layers, self.card.top_k)),
            "request_T": (np.dtype(np.int32), small),
            "position_T": (np.dtype(np.int32), small),
            "phase_T": (np.dtype(np.uint8), small),
            "executed_T": (np.dtype(np.bool_), small),
            "token_T": (np.dtype(np.int32), small),
            "domain_T": (np.dtype(np.int32), small),
            "weights_TLK": (half, self.ids_TLK.shape),
            "scores_TLM": (half, (n_tokens, n_layers, n_scores)),
            "score_ids_TLM": (ids, (n_tokens, n_layers, None)),
            "gate_inputs_TLD": (half, (n_tokens, n_layers, None)),
            "pre_attention_TLD": (half, (n_tokens, n_layers, None)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            fits = array.ndim == len(shape) and all(
                want in (None, have) for want, have in zip(shape, array.shape, strict=True)
            )
            if not fits or array.dtype != dtype:
                wanted = ["any" if size is None else size for size in shape]
                raise FormatError(
                    f"{name} of {self.card.name}: expected {wanted} of {dtype}, "
                    f"got {list(array.shape)} of {array.dtype}"
                )

    def _check_values(self) -> None:
        for name in ("ids_TLK", "score_ids_TLM"):
            ids = getattr(self, name)
            if ids is not None and ids.size and int(ids.max()) >= self.card.n_experts:
                self._check_ids(ids)
        if self.n_tokens:
            starts = self.request_T[self.starts_R]
            if len(np.unique(starts)) != len(starts):
                raise FormatError("request_T: rows of one request must stand together")
            if int(self.phase_T.max()) >= len(PHASES):
                raise FormatError(
                    f"phase_T: expected indices into {PHASES}, got {int(self.phase_T.max())}"
                )
            if int(self.domain_T.max()) >= len(self.domains) or int(self.domain_T.min()) < -1:
                raise FormatError(f"domain_T: expected indices into {self.domains}, or -1")
        for domain in self.domains:
            if not domain.isprintable():
                raise FormatError(f"domain {domain!r}: expected printable text")

    def _check_ids(self, ids: NDArray[Any]) -> None:
        bad = (ids >= self.card.n_experts) & (ids != no_expert(self.card.n_experts))
        if bad.any():
            t, layer, _ = (int(x) for x in np.argwhere(bad)[0])
            raise FormatError(
                f"row {t}, layer {self.card.layer_numbers[layer]}: expert id {int(ids[bad][0])} is out of "
                f"range for {self.card.n_experts} experts"
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
    **recorded: Any,
) -> RoutingTrace:
    """A trace from what a source has: scalars are spread over the rows, ids are narrowed, -1 means no expert."""
    ids = np.asarray(ids_TLK)
    if ids.ndim != 3:
        raise FormatError(
            f"ids_TLK: expected three axes (token, layer, choice), got shape {list(ids.shape)}"
        )
    n_tokens, dtype = len(ids), id_dtype(card.n_experts)
    if ids.dtype != dtype:
        outside = ~((ids >= -1) & (ids < card.n_experts))  # so that NaN is outside
        if ids.dtype.kind == "f":
            outside |= ids != np.floor(ids)
        if outside.any():
            t, layer, _ = (int(x) for x in np.argwhere(outside)[0])
            raise FormatError(
                f"row {t}, layer slot {layer}: expert id {ids[outside][0]} is out of range for "
                f"{card.n_experts} experts; if the model has more, pass source.n_experts=..."
            )
        ids = np.where(ids < 0, no_expert(card.n_experts), ids).astype(dtype)
    request_T = np.asarray(request_T)
    if request_T.size and (request_T.min() < -(2**31) or request_T.max() >= 2**31):
        request_T = np.unique(request_T, return_inverse=True)[
            1
        ]  # hashes: only which is which counts

    def spread(value: Any, kind: Any) -> NDArray[Any]:
        if (
            kind is np.int32
            and np.size(value)
            and np.abs(np.asarray(value, np.int64)).max() >= 2**31
        ):
            raise FormatError("position_T and token_T: expected numbers below 2**31")
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
        weights_TLK=_half("weights_TLK", weights_TLK),
        **{name: _half(name, array) for name, array in recorded.items()},
    )


def _half(name: str, array: NDArray[Any] | None) -> Any:
    """Numbers as float16 (ids stay ids); one that it cannot hold is an error, not an infinity."""
    if array is None or array.dtype == np.float16 or name == "score_ids_TLM":
        return array
    with np.errstate(over="ignore"):
        half = np.asarray(array, np.float16)
    too_large = np.isinf(half) & np.isfinite(array)
    if too_large.any():
        t = int(np.argwhere(too_large)[0][0])
        raise FormatError(
            f"{name}, row {t}: {array[too_large][0]:g} does not fit float16 (65504 at most)"
        )
    return half


def _positions(request_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """0, 1, 2, ... within every run of equal request numbers."""
    rows = np.arange(len(request_T))
    starts = np.flatnonzero(np.diff(request_T, prepend=request_T[:1] - 1)) if len(rows) else rows
    return rows - np.repeat(starts, np.diff(np.append(starts, len(rows))))
