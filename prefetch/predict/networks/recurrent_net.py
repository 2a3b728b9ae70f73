"""The network of `recurrent`: what a request is about runs along its tokens, what a token is about along its layers.

It knows no file and no trace. B chunks, C tokens of a chunk, M tokens that are asked about, L layers, E experts,
D = L x E, G units of the state, N hidden units, U averages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefetch.predict.networks.sequences import Batch

HALF_LIVES = (3.0, 20.0)  # at first: tokens, of the averages that fade


class State(NamedTuple):
    """What is kept of the tokens so far."""

    units_BG: Tensor
    before_BD: Tensor  # experts of the token before
    fading_UBD: Tensor  # averages of the experts of all tokens, with learnt half-lives


class RecurrentNet(nn.Module):
    """One network for all layers.

    Between tokens: a gated recurrent unit reads a finished token, all layers at once; averages of what was used fade.
    Within a token: the sum over its layers up to l - horizon. Straight lines lead from the nearest layer, the token
    before, the averages and the state to the scores.
    """

    def __init__(
        self, chance_LE: Tensor, hidden: int, units: int, horizon: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_layers, self.n_experts = n_layers, n_experts = chance_LE.shape
        self.horizon, self.hidden, n_all = horizon, hidden, n_layers * n_experts
        self.units = units
        n_read = (2 + len(HALF_LIVES)) * n_experts

        def drawn(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * std)

        self.token_DG = drawn(n_all, units, std=0.05)
        self.token_norm = nn.LayerNorm(units)
        self.cell = nn.GRU(units, units, batch_first=True)
        self.fade_U = nn.Parameter(torch.log(math.log(2) / torch.tensor(HALF_LIVES)))
        self.state_norm = nn.LayerNorm(2 * units)
        self.state_LGN = drawn(n_layers, 2 * units, hidden, std=0.05)
        self.state_skip_LGE = drawn(n_layers, 2 * units, n_experts, std=0.01)
        self.above_LEN = drawn(n_layers, n_experts, hidden, std=0.05)
        self.read_LRN = drawn(n_layers, n_read, hidden, std=0.03)
        self.read_skip_LRE = nn.Parameter(torch.zeros(n_layers, n_read, n_experts))
        self.bias_LN = nn.Parameter(torch.zeros(n_layers, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, hidden)
        self.out_LNE = drawn(n_layers, hidden, n_experts, std=0.03)
        self.prior_LE = nn.Parameter(torch.logit(chance_LE, eps=1e-4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [M, L, E]; every chunk begins with an empty state."""
        return self.run(batch, self.empty(len(batch.asked_BC)))[0]

    def run(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """The same from a state on, and the state after the last token of the chunk."""
        used_BCLE = batch.used(self.n_experts)[:, -batch.asked_BC.shape[1] :]
        states, read, after = self.between(used_BCLE.flatten(2), state)
        asked = batch.asked_BC
        states_MG, read_UMD = states[:, :-1][asked], read[:, :, :-1][:, asked]
        read_UMLE = read_UMD.unflatten(2, (self.n_layers, self.n_experts))
        used_LME = used_BCLE[asked].transpose(0, 1)
        above_LMN = self._later(torch.bmm(used_LME, self.above_LEN).cumsum(0))
        logits_LME = self.answer(above_LMN, self._later(used_LME), read_UMLE, states_MG)
        return logits_LME.transpose(0, 1), after

    def empty(self, n: int) -> State:
        like = self.bias_LN
        n_all = self.n_layers * self.n_experts
        return State(
            like.new_zeros(n, self.units),
            like.new_zeros(n, n_all),
            like.new_zeros(len(self.fade_U), n, n_all),
        )

    def between(self, used_BCD: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """[B, C + 1, 2 G] and [1 + U, B, C + 1, D] before every token and after the last; the state after it."""
        n_tokens = used_BCD.shape[1]
        since_BCD = torch.cat([state.before_BD[:, None], used_BCD], dim=1)
        token_BCG = self.token_norm(since_BCD @ self.token_DG)
        units_BCG = state.units_BG[:, None]
        if n_tokens:
            moved_BCG, _ = self.cell(token_BCG[:, 1:], state.units_BG[None])
            units_BCG = torch.cat([units_BCG, moved_BCG], dim=1)
        states_BCG = torch.cat([units_BCG, token_BCG], dim=2)
        age_C = torch.arange(n_tokens + 1, device=used_BCD.device)
        back_CC = age_C[:, None] - age_C[:-1] - 1  # a row more: after the last token
        faded = []
        for fade, start_BD in zip(self.kept_U(), state.fading_UBD, strict=True):
            weight_CC = ((1 - fade) * fade ** back_CC.clamp(min=0)).masked_fill(back_CC < 0, 0.0)
            faded.append(weight_CC @ used_BCD + (fade**age_C)[:, None] * start_BD[:, None])
        faded_UBCD = torch.stack(faded)
        after = State(units_BCG[:, -1], since_BCD[:, -1], faded_UBCD[:, :, -1])
        return states_BCG, torch.cat([since_BCD[None], faded_UBCD]), after

    def kept_U(self) -> Tensor:
        """What a token leaves of an average."""
        return torch.exp(-torch.exp(self.fade_U))

    def answer(
        self,
        above_LMN: Tensor,
        nearest_LME: Tensor,
        read_UMLE: Tensor,
        states_MG: Tensor,
        layers: slice = slice(None),
    ) -> Tensor:
        """Logits [L, M, E] of these layers."""
        states_MG = self.dropout(self.state_norm(states_MG))
        read_LMR = torch.cat([nearest_LME, read_UMLE.permute(2, 1, 0, 3).flatten(2)], dim=2)
        x_LMN = above_LMN + torch.bmm(read_LMR, self.read_LRN[layers]) + self.bias_LN[layers, None]
        x_LMN = x_LMN + states_MG @ self.state_LGN[layers]
        logits_LME = torch.bmm(read_LMR, self.read_skip_LRE[layers]) + self.prior_LE[layers, None]
        logits_LME = logits_LME + states_MG @ self.state_skip_LGE[layers]
        x_LMN = self.dropout(F.relu(self.norm(x_LMN)))
        x_LMN = x_LMN + self.outer(F.relu(self.inner(x_LMN)))
        return logits_LME + torch.bmm(x_LMN, self.out_LNE[layers])

    def _later(self, x_LMX: Tensor) -> Tensor:
        """What layer l sees of layer l - horizon."""
        return torch.cat([torch.zeros_like(x_LMX[: self.horizon]), x_LMX[: -self.horizon]])
