"""The nets of the predictors, and what they are taught by. Imported when a net is trained: torch takes seconds.

B rows of a batch, L layers, D hidden, M units within, E experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[
    Tensor, Tensor
]  # inputs [B, L, D], and the ids that came [B, L, K]; E or more = nobody


class LayerNets(nn.Module):
    """One net of two linear layers for every layer; all of them are one product."""

    def __init__(
        self, mean_LD: Tensor, scale_LD: Tensor, bias_LE: Tensor, units: int, *, is_linear: bool
    ) -> None:
        super().__init__()
        n_layers, n_inputs = mean_LD.shape
        self.is_linear = is_linear
        self.mean_LD: Tensor
        self.scale_LD: Tensor
        self.register_buffer("mean_LD", mean_LD)
        self.register_buffer("scale_LD", scale_LD)
        inner_LDM = torch.randn(n_layers, n_inputs, units) / n_inputs**0.5
        outer_LME = torch.randn(n_layers, units, bias_LE.shape[1]) / units**0.5
        self.inner_LDM = nn.Parameter(inner_LDM)
        self.inner_bias_LM = nn.Parameter(torch.zeros(n_layers, units))
        self.outer_LME = nn.Parameter(outer_LME)
        self.outer_bias_LE = nn.Parameter(bias_LE.clone())  # it starts from popularity

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = (x_BLD.float() - self.mean_LD) / self.scale_LD
        inner_BLM = torch.einsum("bld,ldm->blm", x_BLD, self.inner_LDM) + self.inner_bias_LM
        if not self.is_linear:
            inner_BLM = F.relu(inner_BLM)
        logits_BLE = torch.einsum("blm,lme->ble", inner_BLM, self.outer_LME)
        return logits_BLE + self.outer_bias_LE

    @torch.inference_mode()
    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """inner, its bias, outer, its bias: of inputs as they are recorded, no more to be scaled."""
        inner_LDM = self.inner_LDM / self.scale_LD[:, :, None]
        bias_LM = self.inner_bias_LM - torch.einsum("ld,ldm->lm", self.mean_LD, inner_LDM)
        return inner_LDM, bias_LM, self.outer_LME, self.outer_bias_LE


def each_alone(net: nn.Module, batch: Batch) -> Tensor:
    """Binary cross entropy of every expert: what is learnt is its probability."""
    logits_NE, used_NE, _ = _taught(net, batch)
    return F.binary_cross_entropy_with_logits(logits_NE, used_NE, reduction="sum") / len(used_NE)


def against_others(net: nn.Module, batch: Batch) -> Tensor:
    """Every chosen expert against all that were not chosen: what is learnt is who stands before whom.

    -log of the softmax of one chosen expert among itself and the others; the chosen ones are not compared.
    """
    logits_NE, used_NE, _ = _taught(net, batch)
    others_N = logits_NE.masked_fill(used_NE > 0, -1e9).logsumexp(dim=1)
    lost_NE = F.softplus(others_N[:, None] - logits_NE) * used_NE
    return lost_NE.sum() / len(used_NE)


def recall(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """How many of the chosen experts stand among the best k, and how many were chosen."""
    logits_NE, used_NE, top_k = _taught(net, batch)
    best_NK = logits_NE.topk(min(top_k, logits_NE.shape[1]), dim=1).indices
    return used_NE.gather(1, best_NK).sum().long(), used_NE.sum().long()


def _taught(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """[N, E] logits and who was used, of the layers that ran and whose input was recorded."""
    x_BLD, ids_BLK = batch
    logits_BLE = net(x_BLD)
    n_experts = logits_BLE.shape[2]
    ids_BLK = ids_BLK.long().clamp(max=n_experts)
    used_BLE = logits_BLE.new_zeros(*logits_BLE.shape[:2], n_experts + 1).scatter(2, ids_BLK, 1.0)
    taught_BL = (ids_BLK < n_experts).any(dim=2) & x_BLD.any(dim=2)
    return logits_BLE[taught_BL], used_BLE[taught_BL][:, :-1], ids_BLK.shape[2]
