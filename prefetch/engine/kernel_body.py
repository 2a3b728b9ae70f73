"""What a launch computes with the project's kernels: on a GPU by Triton, on a CPU by their torch definitions.

It knows no cache. The slot row of every launch goes to the device on the stream that computes, behind the wait for
what it names: no launch can see a slot before its payload.
T tokens, K choices, E experts, S slots, N numbers of a block, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefetch.kernels.experts import apply_experts, combine, moe
from prefetch.kernels.layout import ExpertLayout
from prefetch.kernels.routing import route
from prefetch.sim.workload import Workload

FEWEST_ROWS = 64
ABSENT = -1


class SlotRows:
    """Rows of a slot table, one per launch, used in turn. On a GPU they are written in pinned memory first.

    More than an event has launches: the host has waited for the routing behind them before it comes round.
    """

    def __init__(self, n_experts: int, device: torch.device) -> None:
        is_gpu, n_rows = device.type == "cuda", max(FEWEST_ROWS, n_experts + 2)
        self.host_RE = torch.full((n_rows, n_experts), ABSENT, dtype=torch.int32, pin_memory=is_gpu)
        self.device_RE = torch.empty_like(self.host_RE, device=device) if is_gpu else self.host_RE
        self.sent: list[Any] = [None] * n_rows  # the host may write a row again once it has gone
        self.at = 0
        self.kept: dict[tuple[int, ...], Tensor] = {}  # rows of whole layers do not change

    def of(self, slots: Mapping[int, int]) -> Tensor:
        if len(slots) == self.host_RE.shape[1]:
            return self._whole(tuple(slots[expert] for expert in range(len(slots))))
        row, self.at = self.at, (self.at + 1) % len(self.sent)
        if self.sent[row] is not None:
            self.sent[row].synchronize()
        self.host_RE[row] = ABSENT
        self.host_RE[row, list(slots)] = torch.tensor(list(slots.values()), dtype=torch.int32)
        if self.device_RE is not self.host_RE:
            self.device_RE[row].copy_(self.host_RE[row], non_blocking=True)
            self.sent[row] = torch.cuda.Event()
            self.sent[row].record(torch.cuda.current_stream(self.device_RE.device))
        return self.device_RE[row]

    def _whole(self, slots: tuple[int, ...]) -> Tensor:
        if slots not in self.kept:
            row_E = torch.tensor(slots, dtype=torch.int32)
            self.kept[slots] = row_E.to(self.device_RE.device)
        return self.kept[slots]


class KernelBody:
    """`take` an event's tokens, launch, `combine`; then `out_TD` is the layer's output.

    fuses: one launch of all experts may add them up as well, which is faster and rounds float32's last bits otherwise.
    Without it an output does not depend on who came late.
    """

    def __init__(
        self, pool_SN: Tensor, layout: ExpertLayout, n_experts: int, *, fuses: bool = False
    ) -> None:
        self.pool_SN, self.layout, self.fuses = pool_SN, layout, fuses
        self.rows = SlotRows(n_experts, pool_SN.device)
        self.out_TD: Tensor | None = None

    def take(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, needed: int) -> None:
        """`needed`: how many different experts the event asks for."""
        self.x_TD, self.ids_TK, self.weights_TK, self.needed = x_TD, ids_TK, weights_TK, needed
        self.rows_TKD: Tensor | None = None
        self.out_TD = None

    def before(self, step: int, layer: int) -> None:
        """The model itself has done it."""

    def launch(self, layer: int, tokens: Mapping[int, int], slots: Mapping[int, int]) -> None:
        """Rows of choices, whoever comes first, for `combine` to add."""
        is_whole = len(slots) == self.rows.host_RE.shape[1]  # others that are there harm nobody
        slot_E = self.rows.of(slots if is_whole else {expert: slots[expert] for expert in tokens})
        told = (self.x_TD, self.ids_TK, self.weights_TK, self.pool_SN, self.layout, slot_E)
        if self.fuses and (len(tokens) == self.needed or is_whole):
            self.out_TD = moe(*told)
            return
        if self.rows_TKD is None:
            shape = (*self.ids_TK.shape, self.layout.hidden)
            self.rows_TKD = torch.empty(shape, dtype=torch.float32, device=self.x_TD.device)
        apply_experts(*told, self.rows_TKD)

    def combine(self, layer: int) -> None:
        if self.rows_TKD is not None:
            self.out_TD = combine(self.rows_TKD, self.ids_TK, dtype=self.x_TD.dtype)


class ReplayBody(KernelBody):
    """A trace's routing with drawn weights: a layer routes for the time that it takes, and goes where the trace went.

    `beside_bytes`: of weights that a layer reads beside its experts (attention, shared experts), as one product.
    """

    def __init__(
        self,
        pool_SN: Tensor,
        layout: ExpertLayout,
        work: Workload,
        ids_TLK: NDArray[Any],
        *,
        beside_bytes: int,
        seed: int,
    ) -> None:
        card, device = work.card, pool_SN.device
        super().__init__(pool_SN, layout, card.n_experts, fuses=True)
        self.work = work
        ids = ids_TLK[work.rows_R].astype(np.int32)
        ids[ids >= card.n_experts] = ABSENT
        self.ids_RLK = torch.from_numpy(ids).to(device)
        draw = torch.Generator(device).manual_seed(seed)
        most = int(np.diff(work.row_start_S).max(initial=1))

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device).to(layout.dtype)

        self.states_TD = drawn(most, layout.hidden)
        self.gate_ED = drawn(card.n_experts, layout.hidden)
        width = beside_bytes // (layout.hidden * layout.dtype.itemsize)
        self.beside_BD = drawn(max(1, width), layout.hidden)
        self.even_TK = torch.full((most, card.top_k), 1 / card.top_k, device=device)
        is_gpu = device.type == "cuda"
        self.told_TK = torch.empty((most, card.top_k), dtype=torch.int32, pin_memory=is_gpu)

    def before(self, step: int, layer: int) -> None:
        work, n_layers = self.work, self.work.card.n_layers
        start, stop = int(work.row_start_S[step]), int(work.row_start_S[step + 1])
        x_TD = self.states_TD[: stop - start]
        torch.nn.functional.linear(x_TD, self.beside_BD)
        routed = route(torch.nn.functional.linear(x_TD, self.gate_ED).float(), work.card.top_k)
        self.told_TK[: stop - start].copy_(routed.ids_TK, non_blocking=True)
        event = step * n_layers + layer
        needed = int(work.start_V[event + 1] - work.start_V[event])
        self.take(x_TD, self.ids_RLK[start:stop, layer], self.even_TK[: stop - start], needed)
