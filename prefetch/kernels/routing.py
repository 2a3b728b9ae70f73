"""Which experts a token takes, and with what weights: softmax or sigmoid scores, a bias, groups, the best k of them.

It knows no expert and no trace. `route_torch` is the definition; `route` runs its Triton twin where there is a GPU.
T tokens, E experts, K choices, P groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefetch.errors import ConfigError
from prefetch.kernels.twins import check_together, on_device_of, runs_triton

SCORES = ("softmax", "sigmoid")


class Routed(NamedTuple):
    ids_TK: Tensor  # int32, best first
    weights_TK: Tensor  # float32


def route(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    n_groups: int = 1,
    groups_kept: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
) -> Routed:
    """`route_torch`, by one kernel on a GPU."""
    options = (score, bias_E, n_groups, groups_kept, renormalise, scale)
    _check(logits_TE, k, score, bias_E, n_groups, groups_kept)
    if not runs_triton(logits_TE):
        return _route(logits_TE, k, *options)
    from prefetch.kernels.route_kernel import launch_route

    with on_device_of(logits_TE):
        return Routed(*launch_route(logits_TE, k, *options))


def route_torch(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    n_groups: int = 1,
    groups_kept: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
) -> Routed:
    """The definition. Equal ranks: the lowest id first.

    A weight is the score of its expert; `renormalise` makes a token's weights sum to 1, `scale` multiplies them after.
    Experts are ranked by logit, or by score + bias where there is a bias (which no weight contains). Of `n_groups`
    equal groups of neighbours only the best `groups_kept` may be chosen from: a group is as good as its best
    expert for softmax (DeepSeek-V2, arXiv 2405.04434), as its best two together for sigmoid (V3, arXiv 2412.19437).
    """
    _check(logits_TE, k, score, bias_E, n_groups, groups_kept)
    return _route(logits_TE, k, score, bias_E, n_groups, groups_kept, renormalise, scale)


def _route(
    logits_TE: Tensor,
    k: int,
    score: str,
    bias_E: Tensor | None,
    n_groups: int,
    groups_kept: int,
    renormalise: bool,
    scale: float,
) -> Routed:
    logits_TE = logits_TE.float()
    score_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    rank_TE = _ranked(logits_TE, score_TE, score, bias_E, n_groups)
    allowed_TE = torch.ones_like(rank_TE, dtype=torch.bool)
    if n_groups > 1:
        rank_TPe = rank_TE.unflatten(1, (n_groups, -1))
        best = 1 if score == "softmax" else min(2, rank_TPe.shape[2])
        group_TP = rank_TPe.sort(descending=True).values[:, :, :best].sum(-1)
        kept_TP = _first(group_TP, torch.ones_like(group_TP, dtype=torch.bool), groups_kept)
        allowed_TE = torch.zeros_like(group_TP, dtype=torch.bool).scatter(1, kept_TP, True)
        allowed_TE = allowed_TE.repeat_interleave(rank_TPe.shape[2], 1)
    ids_TK = _first(rank_TE, allowed_TE, k)
    weights_TK = score_TE.gather(1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routed(ids_TK.int(), weights_TK * scale)


def _ranked(logits: Tensor, scores: Tensor, score: str, bias: Tensor | None, groups: int) -> Tensor:
    """What experts are ranked by. Two scores may round to one number where their logits do not, so logits rank; but the
    sum of a group's best two is a sum of scores."""
    if bias is not None:
        return scores + bias.float()
    return scores if score == "sigmoid" and groups > 1 else logits


def _first(rank_TE: Tensor, allowed_TE: Tensor, k: int) -> Tensor:
    """Ids of the k highest that are allowed: a stable sort, so that among equals the lowest id is first."""
    ids_TE = rank_TE.sort(dim=1, descending=True, stable=True).indices
    allowed_TE = allowed_TE.gather(1, ids_TE)
    order_TE = (~allowed_TE).int().sort(dim=1, stable=True).indices
    return ids_TE.gather(1, order_TE)[:, :k]


def _check(
    logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, n_groups: int, groups_kept: int
) -> None:
    check_together(logits_TE, bias_E)
    if logits_TE.ndim != 2:
        raise ConfigError(f"logits must be [tokens, experts]; found {list(logits_TE.shape)}")
    E = logits_TE.shape[1]
    if score not in SCORES:
        raise ConfigError(f"score {score!r} is not known; use one of {', '.join(SCORES)}")
    if bias_E is not None and tuple(bias_E.shape) != (E,):
        raise ConfigError(f"bias_E must be ({E},); found {tuple(bias_E.shape)}")
    if n_groups < 1 or E % n_groups or not 1 <= groups_kept <= n_groups:
        raise ConfigError(
            f"{E} experts cannot be split into {n_groups} groups of which {groups_kept} are kept"
        )
    most = groups_kept * (E // n_groups)
    if not 1 <= k <= most:
        raise ConfigError(f"k must be 1 to {most}, the experts that may be chosen; found {k}")
