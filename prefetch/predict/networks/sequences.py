"""Requests in order, cut into chunks, for networks that read one token after the other. It knows no network.

T tokens of a part; B chunks of a batch, C tokens of the longest, S tokens with what lies before it, M tokens that
are asked about; L layers, K choices, F words of a memory, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from prefetch.errors import MissingData
from prefetch.predict.past import Past


class Batch(NamedTuple):
    """What stands before a chunk lies left of column S - C; the first column is always empty."""

    ids_BSLK: Tensor  # E where there is no expert, and where there is no token
    real_BS: Tensor
    asked_BC: Tensor
    weights_BSLK: Tensor  # nothing, where no weights are used
    told_MLFE: Tensor  # nothing, where no memory is asked
    sure_ML2: Tensor

    def used(self, n_experts: int) -> Tensor:
        """[B, S, L, E]: 1 for who was chosen."""
        return spread(self.ids_BSLK, torch.ones_like(self.ids_BSLK, dtype=torch.float), n_experts)


@dataclass(frozen=True, eq=False)
class Told:
    """Tokens to learn from or to be asked about, whole requests in order."""

    ids_TLK: NDArray[Any]
    first_T: NDArray[np.int64]  # the first row of each row's request
    counted_T: NDArray[np.bool_]
    weights_TLK: NDArray[np.float32] | None = None
    told_TLFE: NDArray[np.float16] | None = None
    sure_TL2: NDArray[np.float32] | None = None

    @classmethod
    def gathered(cls, blocks: Iterable[Told]) -> Told:
        kept: list[Told] = []
        total = 0
        for block in blocks:
            kept.append(block._from(total))
            total += len(block.ids_TLK)
        if not any(block.counted_T.any() for block in kept):
            raise MissingData(
                "a network needs training and validation rows; there are too few requests"
            )
        columns = zip(*(vars(block).values() for block in kept), strict=True)
        return cls(*(None if c[0] is None else np.concatenate(c) for c in columns))  # type: ignore[arg-type]

    def _from(self, row: int) -> Told:
        return Told(**{**vars(self), "first_T": self.first_T + row})


class Chunks(Dataset[Any]):
    """A row is a chunk of a request of at most `chunk` tokens, with at most `window` tokens before it."""

    def __init__(self, told: Told, n_experts: int, *, chunk: int, window: int) -> None:
        self.told, self.n_experts = told, n_experts
        n_layers, top_k = told.ids_TLK.shape[1:]
        nobody = np.full((1, n_layers, top_k), n_experts, np.int16)
        ids_TLK = np.minimum(told.ids_TLK, n_experts).astype(np.int16)
        self._ids_TLK = np.concatenate([ids_TLK, nobody])  # row -1 is no token
        self._counted_T = np.append(told.counted_T, False)
        self._weights_TLK = told.weights_TLK
        if told.weights_TLK is not None:
            self._weights_TLK = np.concatenate([told.weights_TLK, np.zeros(nobody.shape, np.float32)])  # fmt: skip
        self.chunks = list(_chunks(told, chunk, window))

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitems__(self, chosen: list[int]) -> Batch:
        rows_BS, before = _rows([self.chunks[i] for i in chosen])
        asked_BC = self._counted_T[rows_BS[:, before:]]
        asked_M = rows_BS[:, before:][asked_BC]
        given = (
            None if self._weights_TLK is None else self._weights_TLK[rows_BS],
            None if self.told.told_TLFE is None else self.told.told_TLFE[asked_M],
            None if self.told.sure_TL2 is None else self.told.sure_TL2[asked_M],
        )
        return Batch(
            torch.from_numpy(self._ids_TLK[rows_BS].astype(np.int64)),
            torch.from_numpy(rows_BS >= 0),
            torch.from_numpy(asked_BC),
            *(torch.zeros(0) if one is None else torch.from_numpy(one).float() for one in given),
        )


def spread(ids: Tensor, values: Tensor, n_experts: int) -> Tensor:
    """[..., E] of [..., K]; what belongs to no expert is dropped."""
    out = torch.zeros(*ids.shape[:-1], n_experts + 1, device=ids.device)
    return out.scatter_(-1, ids, values)[..., :-1]


def known_ids(past: Past) -> NDArray[Any]:
    """[T, L, K]: all that any guess of these requests may know; of the last tokens what lies above the horizon."""
    top_k = past.here().shape[2]
    ids_TLK = np.full((*past.shape[:2], top_k), past.nobody, np.int64)
    reach = past.card.n_layers - past.horizon
    if reach > 0:
        ids_TLK[:, :reach] = past.here()[:, past.horizon :]
    for first, stop in requests(past):
        ids_TLK[first : stop - 1] = past.earlier(stop - 1)
    return ids_TLK


def known_weights(past: Past) -> NDArray[np.float32]:
    """Their weights."""
    weights_TLK = np.zeros_like(past.here_weights())
    reach = past.card.n_layers - past.horizon
    if reach > 0:
        weights_TLK[:, :reach] = past.here_weights()[:, past.horizon :]
    before_TLK = past.before_weights()
    for first, stop in requests(past):
        weights_TLK[first : stop - 1] = before_TLK[first + 1 : stop]
    return weights_TLK


def requests(past: Past) -> Iterator[tuple[int, int]]:
    yield from zip(past.starts_R.tolist(), [*past.starts_R[1:].tolist(), past.n_tokens], strict=True)  # fmt: skip


def loss(net: nn.Module, batch: Any) -> Tensor:
    """Binary cross-entropy over experts, so that a score is a chance; per choice, not per expert."""
    batch = Batch(*batch)
    logits_MLE = net(batch)
    used_MLE = _came(batch, logits_MLE.shape[2])
    total = F.binary_cross_entropy_with_logits(logits_MLE, used_MLE, reduction="sum")
    return total / used_MLE.sum().clamp(min=1)


def right(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Choices among as many guesses, from the horizon on."""
    batch = Batch(*batch)
    horizon = int(net.horizon)  # type: ignore[arg-type]
    logits_MLE = net(batch)[:, horizon:]
    used_MLE = _came(batch, logits_MLE.shape[2])[:, horizon:]
    best = logits_MLE.topk(min(batch.ids_BSLK.shape[3], logits_MLE.shape[2]), dim=2).indices
    return used_MLE.gather(2, best).sum().long(), used_MLE.sum().long()


def _came(batch: Batch, n_experts: int) -> Tensor:
    ids_MLK = batch.ids_BSLK[:, -batch.asked_BC.shape[1] :][batch.asked_BC]
    return spread(ids_MLK, torch.ones_like(ids_MLK, dtype=torch.float), n_experts)


def answers(net: nn.Module, told: Told, *, chunk: int, window: int) -> NDArray[np.float32]:
    """[T, L, E] chances, a chunk at a time."""
    from prefetch.threads import one_thread

    n_experts = int(net.n_experts)  # type: ignore[arg-type]
    chunks = Chunks(told, n_experts, chunk=chunk, window=window)
    out_TLE = np.empty((*told.ids_TLK.shape[:2], n_experts), np.float32)
    with one_thread(), torch.no_grad():
        for i, (_, first, stop) in enumerate(chunks.chunks):
            out_TLE[first:stop] = torch.sigmoid(net(chunks.__getitems__([i]))).numpy()
    return out_TLE


def _chunks(told: Told, chunk: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first row that is seen, first row, the one after the last) of every chunk with rows that count."""
    firsts = np.unique(told.first_T).tolist()
    for begin, end in zip(firsts, [*firsts[1:], len(told.first_T)], strict=True):
        for first in range(begin, end, chunk):
            stop = min(first + chunk, end)
            if told.counted_T[first:stop].any():
                yield max(begin, first - window), first, stop


def _rows(chunks: list[tuple[int, int, int]]) -> tuple[NDArray[np.int64], int]:
    """[B, S] row numbers, -1 = none, and how many columns stand before the chunks."""
    before = 1 + max(first - seen for seen, first, _ in chunks)
    longest = max(stop - first for _, first, stop in chunks)
    rows_BS = np.full((len(chunks), before + longest), -1, np.int64)
    for row_S, (seen, first, stop) in zip(rows_BS, chunks, strict=True):
        row_S[before + seen - first : before + stop - first] = np.arange(seen, stop)
    return rows_BS, before
