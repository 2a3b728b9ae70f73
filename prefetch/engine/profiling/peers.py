"""How others compute the same layer: a loop over experts, and torch's grouped product. They know no kernel of ours.

Each takes a token's experts and weights as given, and is differentiable. Experts lie as `kernels.layout` says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.kernels.experts import gated
from prefetch.kernels.layout import ExpertLayout


class Sorted(NamedTuple):
    """What grouped products need before they can begin."""

    order_R: Tensor  # places of the flat choices, expert by expert
    token_R: Tensor
    ends_E: Tensor  # int32: where each expert's rows end
    x_RD: Tensor


def torch_router(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax, the best k, renormalised: three operations of torch."""
    weights_TK, ids_TK = logits_TE.float().softmax(-1).topk(k, dim=-1)
    return ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True)


def loop_moe(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, pool_EN: Tensor, layout: ExpertLayout
) -> Tensor:
    """One expert after another, as models are mostly written: its tokens, its two products, added where they belong."""
    parts, out_TD = layout.views(pool_EN), torch.zeros_like(x_TD)
    up_E, down_E = parts.w13_SGD.unbind(0), parts.w2_SDF.unbind(0)
    for e in ids_TK.unique().tolist():
        t_R, k_R = torch.where(ids_TK == e)
        h_RF = gated(layout.activation, F.linear(x_TD[t_R], up_E[e]))
        y_RD = F.linear(h_RF, down_E[e]) * weights_TK[t_R, k_R, None].to(x_TD.dtype)
        out_TD.index_add_(0, t_R, y_RD)
    return out_TD


def grouped_moe(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, pool_EN: Tensor, layout: ExpertLayout
) -> Tensor:
    of = grouped_dispatch(x_TD, ids_TK, len(pool_EN))
    return grouped_combine(grouped_experts(of, pool_EN, layout), of, weights_TK, len(x_TD))


def grouped_dispatch(x_TD: Tensor, ids_TK: Tensor, n_experts: int) -> Sorted:
    sorted_R, order_R = ids_TK.flatten().sort(stable=True)
    token_R = order_R // ids_TK.shape[1]
    each_E = torch.arange(n_experts, device=ids_TK.device, dtype=sorted_R.dtype)
    ends_E = torch.searchsorted(sorted_R, each_E, right=True).int()
    return Sorted(order_R, token_R, ends_E, x_TD[token_R])


def grouped_experts(of: Sorted, pool_EN: Tensor, layout: ExpertLayout) -> Tensor:
    parts = layout.views(pool_EN)
    a_RG = F.grouped_mm(of.x_RD, parts.w13_SGD.transpose(1, 2), offs=of.ends_E)
    h_RF = gated(layout.activation, a_RG)
    return F.grouped_mm(h_RF, parts.w2_SDF.transpose(1, 2), offs=of.ends_E)


def grouped_combine(y_RD: Tensor, of: Sorted, weights_TK: Tensor, n_tokens: int) -> Tensor:
    weight_R = weights_TK.flatten()[of.order_R].to(y_RD.dtype)
    out_TD = y_RD.new_zeros(n_tokens, y_RD.shape[1])
    return out_TD.index_add(0, of.token_R, y_RD * weight_R[:, None])
