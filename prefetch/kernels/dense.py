"""The memory-hungry way, as a baseline only: dispatch and combine tensors with a place for every token at every expert.

It knows no kernel of ours. An expert takes at most C tokens, first choices first; who finds no seat is dropped, and
counted. Differentiable by autograd. What it allocates is predicted here, beside what our path allocates, so that the
size at which memory ends is known before it happens. The scheme is GShard's (arXiv 2006.16668), as it is often written.
T tokens, K choices, E experts, C seats of an expert, D hidden, F inner, G = 2F; expert e lies in slot e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prefetch.errors import ConfigError
from prefetch.kernels.experts import gated
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.plan import most_tiles
from prefetch.kernels.shipped import config_of, path_of

INT32, FLOAT32 = 4, 4  # bytes


class Dense(NamedTuple):
    out_TD: Tensor
    n_dropped: Tensor  # choices without a seat: their share of the output is missing


def seats_of(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """C: `factor` times what an expert gets when all get the same."""
    if factor <= 0:
        raise ConfigError(f"a capacity factor must be above 0; found {factor}")
    return max(1, min(n_tokens, -int(-factor * n_tokens * top_k // n_experts)))


def dense_moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    pool_EN: Tensor,
    layout: ExpertLayout,
    *,
    factor: float = 1.0,
    product: bool = False,
) -> Dense:
    """`product` sums `outputs * combine` as one broadcast [T, E, C, D] tensor instead of a contraction."""
    (T, K), E = ids_TK.shape, len(pool_EN)
    C = seats_of(T, K, E, factor)
    dispatch_TEC, combine_TEC, n_dropped = _tensors(ids_TK.long(), weights_TK.to(x_TD.dtype), E, C)
    parts = layout.views(pool_EN)
    x_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    a_ECG = torch.einsum("ecd,egd->ecg", x_ECD, parts.w13_SGD)
    a_ECG = a_ECG if parts.b13_SG is None else a_ECG + parts.b13_SG[:, None]
    h_ECF = gated(layout.activation, a_ECG)
    y_ECD = torch.einsum("ecf,edf->ecd", h_ECF, parts.w2_SDF)
    y_ECD = y_ECD if parts.b2_SD is None else y_ECD + parts.b2_SD[:, None]
    if product:
        return Dense((y_ECD * combine_TEC[..., None]).sum((1, 2)), n_dropped)
    return Dense(torch.einsum("tec,ecd->td", combine_TEC, y_ECD), n_dropped)


def _tensors(ids_TK: Tensor, weights_TK: Tensor, E: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    T, K = ids_TK.shape
    taken_kE = F.one_hot(ids_TK.T.reshape(-1), E)  # all first choices, then all second ones
    seat_TK = ((taken_kE.cumsum(0) - 1) * taken_kE).sum(1).reshape(K, T).T
    t, k = torch.where(seat_TK < C)
    place = t, ids_TK[t, k], seat_TK[t, k]
    combine_TEC = weights_TK.new_zeros(T, E, C).index_put_(place, weights_TK[t, k])
    dispatch_TEC = weights_TK.new_zeros(T, E, C).index_put_(place, weights_TK.new_ones(()))
    return dispatch_TEC, combine_TEC, (seat_TK >= C).sum()


def dense_bytes(
    n_tokens: int,
    top_k: int,
    n_experts: int,
    layout: ExpertLayout,
    *,
    factor: float = 1.0,
    product: bool = False,
) -> dict[str, int]:
    """Bytes of every tensor of one forward pass beside its inputs, by name. All are alive when it ends: their sum is
    the least that it needs. What torch copies on the way comes on top, and so do gradients."""
    T, E, D = n_tokens, n_experts, layout.hidden
    C = seats_of(T, top_k, E, factor)
    cells = {"dispatch_TEC": T * E * C, "combine_TEC": T * E * C}
    cells |= {"inputs_ECD": E * C * D, "gates_ups_ECG": 2 * E * C * layout.inner}
    cells |= {"inner_ECF": E * C * layout.inner, "outputs_ECD": E * C * D}
    cells |= {"product_TECD": T * E * C * D} if product else {}
    return {name: n * layout.dtype.itemsize for name, n in (cells | {"out_TD": T * D}).items()}


def moe_bytes(n_tokens: int, top_k: int, n_experts: int, layout: ExpertLayout) -> dict[str, int]:
    """The same of `experts.moe` on a GPU."""
    R, size = n_tokens * top_k, layout.dtype.itemsize
    path = path_of(n_tokens, top_k)
    of = {"h_RF": R * layout.inner * size, "out_TD": n_tokens * layout.hidden * size}
    if path == "decode":
        return of
    block = config_of(path, layout, R, n_experts).up.rows
    entries = R + 2 * n_experts + 3 * most_tiles(R, n_experts, block) + 3
    return of | {"rows_TKD": R * layout.hidden * FLOAT32, "plan": entries * INT32}


def most_tokens(bytes_of: Callable[[int], int], room: int) -> int:
    """The most tokens whose bytes fit into `room`; `bytes_of` never falls as tokens rise. 0 = not even one."""
    most = 1
    while bytes_of(most) <= room and most < 2**40:
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if bytes_of(middle) <= room else (least, middle)
    return least
