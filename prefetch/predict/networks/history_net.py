"""The network that `mlp` trains, in torch; `history` runs the same sums without it. It knows no file and no trace.

B tokens of a batch, L layers, E experts, K choices, N hidden units, C contexts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from prefetch.predict.networks.history import Weights


class HistoryNet(nn.Module):
    """One network for all layers: its experts' rows are per layer, its hidden block is shared.

    Layer l is told the sum over this token's layers up to l - horizon, the nearest of them once more, and what earlier
    tokens used: everywhere, and at layer l. Straight lines from the nearest layer and from usage to the scores carry
    what counts would say; the network adds the rest.
    """

    def __init__(
        self, chance_LE: Tensor, n_contexts: int, hidden: int, horizon: int, dropout: float
    ) -> None:
        super().__init__()
        n_layers, n_experts = chance_LE.shape
        self.horizon = horizon
        shape = (n_layers, n_experts, hidden)

        def drawn(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * std)

        self.above_LEN = drawn(*shape, std=0.05)
        self.nearest_LEN = drawn(*shape, std=0.05)
        self.context_CLEN = drawn(n_contexts, *shape, std=0.02)
        self.own_CLEN = drawn(n_contexts, *shape, std=0.02)
        self.bias_LN = nn.Parameter(torch.zeros(n_layers, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, hidden)
        self.out_LNE = drawn(n_layers, hidden, n_experts, std=0.03)
        self.prior_LE = nn.Parameter(torch.logit(chance_LE, eps=1e-4))
        self.skip_LEE = nn.Parameter(torch.zeros(n_layers, n_experts, n_experts))
        self.own_skip_CLEE = nn.Parameter(torch.zeros(n_contexts, n_layers, n_experts, n_experts))
        self.dropout = nn.Dropout(dropout)

    def forward(self, used_BLE: Tensor, context_BCLE: Tensor) -> Tensor:
        """Logits [B, L, E]; `used` is this token's routing, of which layer l sees what lies `horizon` above."""
        return self.answer(*self.told_by_history(used_BLE, context_BCLE))

    def told_by_history(self, used_BLE: Tensor, context_BCLE: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units before the norm [L, B, N], and what goes straight to the logits [L, B, E]."""
        used_LBE = used_BLE.transpose(0, 1)
        nothing = torch.zeros_like(used_LBE[: self.horizon])
        nearest_LBE = torch.cat([nothing, used_LBE[: -self.horizon]])
        above_LBN = torch.bmm(used_LBE, self.above_LEN).cumsum(0)
        above_LBN = torch.cat(
            [torch.zeros_like(above_LBN[: self.horizon]), above_LBN[: -self.horizon]]
        )
        x_LBN = above_LBN + torch.bmm(nearest_LBE, self.nearest_LEN) + self.bias_LN[:, None]
        logits_LBE = torch.bmm(nearest_LBE, self.skip_LEE) + self.prior_LE[:, None]
        for c, context_LBE in enumerate(context_BCLE.permute(1, 2, 0, 3)):
            everywhere_LBN = torch.bmm(context_LBE, self.context_CLEN[c])
            x_LBN = x_LBN + everywhere_LBN.sum(0) + torch.bmm(context_LBE, self.own_CLEN[c])
            logits_LBE = logits_LBE + torch.bmm(context_LBE, self.own_skip_CLEE[c])
        return x_LBN, logits_LBE

    def answer(self, x_LBN: Tensor, logits_LBE: Tensor) -> Tensor:
        x_LBN = self.dropout(F.relu(self.norm(x_LBN)))
        x_LBN = x_LBN + self.outer(F.relu(self.inner(x_LBN)))
        return (logits_LBE + torch.bmm(x_LBN, self.out_LNE)).transpose(0, 1)

    def weights(self) -> Weights:
        """For the compiled loops."""

        def plain(tensor: Tensor) -> NDArray[np.float32]:
            return np.ascontiguousarray(tensor.detach().cpu().numpy(), np.float32)

        return Weights(
            above_LEN=plain(self.above_LEN),
            nearest_LEN=plain(self.nearest_LEN),
            context_CLEN=plain(self.context_CLEN),
            own_CLEN=plain(self.own_CLEN),
            bias_LN=plain(self.bias_LN),
            gain_N=plain(self.norm.weight),
            shift_N=plain(self.norm.bias),
            inner_NN=plain(self.inner.weight.T),
            inner_bias_N=plain(self.inner.bias),
            outer_NN=plain(self.outer.weight.T),
            outer_bias_N=plain(self.outer.bias),
            out_LNE=plain(self.out_LNE),
            prior_LE=plain(self.prior_LE),
            skip_LEE=plain(self.skip_LEE),
            own_skip_CLEE=plain(self.own_skip_CLEE),
        )


class Rows(Dataset[Any]):
    """Batches of (routing, contexts, ...), spread over the experts only when they are asked for."""

    def __init__(
        self, ids_TLK: NDArray[Any], context_TCLE: NDArray[np.float16], rows: NDArray[np.int64], *others: NDArray[Any]
    ) -> None:  # fmt: skip
        self.rows, self.n_experts = rows, context_TCLE.shape[3]
        ids = np.minimum(ids_TLK, self.n_experts).astype(np.int64)  # nobody is the last
        self.ids_TLK, self.others = torch.from_numpy(ids), [torch.from_numpy(context_TCLE)]
        self.others += [torch.from_numpy(other) for other in others]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, chosen: list[int]) -> tuple[Tensor, ...]:
        t = torch.from_numpy(self.rows[chosen])
        used = torch.zeros(len(t), self.ids_TLK.shape[1], self.n_experts + 1)
        used = used.scatter_(2, self.ids_TLK[t], 1.0)[:, :, :-1]
        return used, *(other[t].float() for other in self.others)


def loss(net: nn.Module, batch: Any) -> Tensor:
    """Binary cross-entropy over experts, so that a score is a chance; per choice, not per expert."""
    used_BLE = batch[0]
    total = F.binary_cross_entropy_with_logits(net(*batch), used_BLE, reduction="sum")
    return total / used_BLE.sum().clamp(min=1)


def right(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Choices among as many guesses, from the horizon on; of all layers where all are guessed as a token begins."""
    used_BLE = batch[0]
    horizon = int(net.horizon)  # type: ignore[arg-type]
    first = horizon if horizon < used_BLE.shape[1] else 0
    used = used_BLE[:, first:]
    width = int(used.sum(dim=2).max())
    best = net(*batch)[:, first:].topk(width, dim=2).indices
    return used.gather(2, best).sum().long(), used.sum().long()
