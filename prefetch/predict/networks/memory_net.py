"""The network that `memory_mlp` trains: the history network, told what route memory says. It knows no file.

B tokens of a batch, L layers, E experts, K choices, N hidden units, G things told.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefetch.predict.networks.history_net import HistoryNet, Rows
from prefetch.predict.networks.history_net import right as right_of

LEAST_CHANCE = 0.01  # under this a memory says no
WIDER = 2  # the inner width of the residual block, in hidden units
NEVER = -1e4  # a logit that no softmax notices


class MemoryNet(HistoryNet):
    """What route memory says comes as inputs, and goes straight to the logits with a weight of its own.

    How much a memory's word counts depends on the layer and on how alike the most alike tokens are.
    """

    def __init__(
        self, chance_LE: Tensor, n_contexts: int, hidden: int, horizon: int, dropout: float, n_told: int
    ) -> None:  # fmt: skip
        super().__init__(chance_LE, n_contexts, hidden, horizon, dropout)
        n_layers, n_experts = chance_LE.shape
        self.told_LGN = nn.Parameter(torch.randn(n_layers, 2 * n_told * n_experts, hidden) * 0.02)
        self.sure_L2N = nn.Parameter(torch.randn(n_layers, 2, hidden) * 0.1)
        trust_LG = torch.zeros(n_layers, 2 * n_told)
        trust_LG[:, n_told:] = 1 / n_told  # of the logarithms: at first their mean
        self.trust_LG = nn.Parameter(trust_LG)
        self.trust_by_sure_LG2 = nn.Parameter(torch.zeros(n_layers, 2 * n_told, 2))
        self.told_skip_LGE = nn.Parameter(torch.zeros(n_layers, n_told * n_experts, n_experts))
        self.inner = nn.Linear(hidden, WIDER * hidden)
        self.outer = nn.Linear(WIDER * hidden, hidden)
        self.inner_norm = nn.LayerNorm(hidden)
        self.inner_dropout = nn.Dropout(dropout / 2)

    def forward(  # type: ignore[override]  # it is told more
        self, used_BLE: Tensor, context_BCLE: Tensor, told_BLFE: Tensor, sure_BL2: Tensor
    ) -> Tensor:
        x_LBN, logits_LBE = self.told_by_history(used_BLE, context_BCLE)
        told_LBFE, sure_LB2 = told_BLFE.transpose(0, 1), sure_BL2.transpose(0, 1)
        logs_LBFE = torch.log(told_LBFE + LEAST_CHANCE) - 0.5 * math.log(LEAST_CHANCE)
        both_LBGE = torch.cat([told_LBFE, logs_LBFE], dim=2)
        x_LBN = x_LBN + torch.bmm(both_LBGE.flatten(2), self.told_LGN)
        x_LBN = x_LBN + torch.bmm(sure_LB2, self.sure_L2N)
        trust_LBG = self.trust_LG[:, None] + torch.einsum(
            "lbs,lgs->lbg", sure_LB2, self.trust_by_sure_LG2
        )
        logits_LBE = logits_LBE + torch.einsum("lbge,lbg->lbe", both_LBGE, trust_LBG)
        logits_LBE = logits_LBE + torch.bmm(told_LBFE.flatten(2), self.told_skip_LGE)
        return self.answer(x_LBN, logits_LBE)

    def answer(self, x_LBN: Tensor, logits_LBE: Tensor) -> Tensor:
        x_LBN = self.dropout(F.silu(self.norm(x_LBN)))
        inner = self.inner_dropout(F.gelu(self.inner(self.inner_norm(x_LBN))))
        x_LBN = x_LBN + self.outer(inner)
        return (logits_LBE + torch.bmm(x_LBN, self.out_LNE)).transpose(0, 1)


class OrderedRows(Rows):
    """The choices themselves come last, in the order of the trace: the likeliest first, where weights were known."""

    def __getitems__(self, chosen: list[int]) -> tuple[Tensor, ...]:
        return *super().__getitems__(chosen), self.ids_TLK[torch.from_numpy(self.rows[chosen])]


def loss(net: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of every expert, so that a score is a chance, and of the order, so that the best come first.

    The order's part is that of Plackett and Luce: each choice against itself, the later choices, and all the rest.
    """
    used_BLE, ids_BLK = batch[0], batch[-1]
    logits_BLE = net(*batch[:-1])
    of = used_BLE.sum().clamp(min=1)
    chances = F.binary_cross_entropy_with_logits(logits_BLE, used_BLE, reduction="sum") / of
    is_real_BLK = ids_BLK < logits_BLE.shape[2]
    own_BLK = logits_BLE.gather(2, ids_BLK.clamp(max=logits_BLE.shape[2] - 1))
    own_BLK = own_BLK.masked_fill(~is_real_BLK, NEVER)
    rest_BL1 = logits_BLE.masked_fill(used_BLE > 0, NEVER).logsumexp(dim=2, keepdim=True)
    from_last = torch.cat([rest_BL1, own_BLK.flip(2)], dim=2).logcumsumexp(dim=2)[..., 1:]
    order_BLK = (from_last.flip(2) - own_BLK).masked_fill(~is_real_BLK, 0)
    return chances + order_BLK.sum() / of


def right(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return right_of(net, batch[:-1])
