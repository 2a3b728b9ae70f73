"""The Triton twin of routing: one program ranks a few tokens by k sweeps over all their experts.

It knows no expert. Ranks are compared as integers whose order is that of the floats: -inf is a rank like any other, and
what is taken or is no expert is below all of them. T tokens, E experts (padded to a power of two), K choices, P groups.
"""
# mypy: disable-error-code="no-untyped-def"
# a kernel's arguments are typed by Triton when it is called

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefetch.kernels.shipped import next_power, route_tokens, route_warps

BELOW_ALL = tl.constexpr(-(2**31))


@triton.jit
def _ordered(value):
    """float32 as int32 of the same order; -0 counts as 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float_of(key):
    """The float whose place in the order this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _keep_groups(
    key_TE, e_E, SIZE: tl.constexpr, N_GROUPS: tl.constexpr, KEPT: tl.constexpr,
    P: tl.constexpr, BEST_TWO: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The keys of all groups but the best `KEPT` fall below all."""
    p_P = tl.arange(0, P)
    group_TP = tl.full([BLOCK_T, P], BELOW_ALL, tl.int32)
    for p in range(N_GROUPS):
        in_group = (e_E[None, :] // SIZE) == p
        own_TE = tl.where(in_group, key_TE, BELOW_ALL)
        best_T = tl.max(own_TE, 1)
        if BEST_TWO:
            first_T = tl.argmax(own_TE, 1, tie_break_left=True)
            rest_TE = tl.where(e_E[None, :] == first_T[:, None], BELOW_ALL, own_TE)
            best_T = _ordered(_float_of(best_T) + _float_of(tl.max(rest_TE, 1)))
        group_TP = tl.where(p_P[None, :] == p, best_T[:, None], group_TP)
    kept_TE = tl.zeros_like(key_TE)
    for _ in range(KEPT):
        best_T = tl.argmax(group_TP, 1, tie_break_left=True)
        kept_TE = tl.where((e_E[None, :] // SIZE) == best_T[:, None], 1, kept_TE)
        group_TP = tl.where(p_P[None, :] == best_T[:, None], BELOW_ALL, group_TP)
    return tl.where(kept_TE == 1, key_TE, BELOW_ALL)


@triton.jit
def _scores(logit_TE, is_expert, SIGMOID: tl.constexpr):
    """0 where there is no expert."""
    if SIGMOID:
        return tl.where(is_expert, tl.sigmoid(logit_TE), 0.0)
    else:
        most_T = tl.max(tl.where(is_expert, logit_TE, -float("inf")), 1)
        power_TE = tl.where(is_expert, tl.exp(logit_TE - most_T[:, None]), 0.0)
        return power_TE / tl.sum(power_TE, 1)[:, None]


@triton.jit
def _best(key_TE, score_TE, e_E, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr):
    """The K highest keys one after another, of equal ones the first: their places and scores."""
    k_K = tl.arange(0, K_PAD)
    id_TK = tl.zeros([BLOCK_T, K_PAD], tl.int32)
    weight_TK = tl.zeros([BLOCK_T, K_PAD], tl.float32)
    for k in range(K):
        best_T = tl.argmax(key_TE, 1, tie_break_left=True)
        is_best = e_E[None, :] == best_T[:, None]
        of_best_T = tl.sum(tl.where(is_best, score_TE, 0.0), 1)
        id_TK = tl.where(k_K[None, :] == k, best_T[:, None].to(tl.int32), id_TK)
        weight_TK = tl.where(k_K[None, :] == k, of_best_T[:, None], weight_TK)
        key_TE = tl.where(is_best, BELOW_ALL, key_TE)
    return id_TK, weight_TK


@triton.jit
def route_rows(
    logits_TE, bias_E, ids_TK, weights_TK, T, stride, scale,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
    N_GROUPS: tl.constexpr, KEPT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """ids and weights of BLOCK_T tokens, one store each."""
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, E_PAD)
    is_expert = e_E[None, :] < E
    row_T = logits_TE + t_T.to(tl.int64) * stride
    here = (t_T[:, None] < T) & is_expert
    logit_TE = tl.load(row_T[:, None] + e_E[None, :], mask=here, other=0.0).to(tl.float32)
    score_TE = _scores(logit_TE, is_expert, SIGMOID)
    rank_TE = logit_TE
    if HAS_BIAS:
        rank_TE = score_TE + tl.load(bias_E + e_E, mask=e_E < E, other=0.0).to(tl.float32)[None, :]
    elif SIGMOID and N_GROUPS > 1:
        rank_TE = score_TE
    key_TE = tl.where(is_expert, _ordered(rank_TE), BELOW_ALL)
    if N_GROUPS > 1:
        best_two: tl.constexpr = SIGMOID and E > N_GROUPS
        key_TE = _keep_groups(key_TE, e_E, E // N_GROUPS, N_GROUPS, KEPT, P, best_two, BLOCK_T)
    id_TK, weight_TK = _best(key_TE, score_TE, e_E, K, K_PAD, BLOCK_T)
    if RENORMALISE:
        weight_TK = weight_TK / (tl.sum(weight_TK, 1)[:, None] + 1e-20)
    k_K = tl.arange(0, K_PAD)
    place = t_T.to(tl.int64)[:, None] * K + k_K[None, :]
    wanted = (t_T[:, None] < T) & (k_K[None, :] < K)
    tl.store(ids_TK + place, id_TK, mask=wanted)
    tl.store(weights_TK + place, weight_TK * scale, mask=wanted)


def launch_route(
    logits_TE: Tensor,
    k: int,
    score: str,
    bias_E: Tensor | None,
    n_groups: int,
    groups_kept: int,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, E = logits_TE.shape
    logits_TE = logits_TE.float() if logits_TE.dtype == torch.bfloat16 else logits_TE
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    ids_TK = torch.empty(T, k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, k, dtype=torch.float32, device=logits_TE.device)
    if T == 0:
        return ids_TK, weights_TK
    block = route_tokens(T)
    bias = logits_TE if bias_E is None else bias_E.float().contiguous()
    route_rows[(triton.cdiv(T, block),)](
        logits_TE, bias, ids_TK, weights_TK, T, logits_TE.stride(0), float(scale),
        E=E, K=k, E_PAD=next_power(E), K_PAD=next_power(k), BLOCK_T=block,
        SIGMOID=score == "sigmoid", HAS_BIAS=bias_E is not None, RENORMALISE=renormalise,
        N_GROUPS=n_groups, KEPT=groups_kept, P=next_power(n_groups), num_warps=route_warps(E),
        enable_fp_fusion=False,
    )  # fmt: skip
    return ids_TK, weights_TK
