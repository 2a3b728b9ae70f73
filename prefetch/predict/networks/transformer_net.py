"""The network of `transformer`: attention from a token to alike tokens before it, and along its layers.

It knows no file and no trace. B chunks, C tokens of a chunk, S tokens with those before, M tokens that are asked
about, L layers, E experts, I inputs of a layer, N hidden units, F heads and words of a memory, U averages, R all that
is read, Q how alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefetch.predict.networks.sequences import Batch, spread

LEAST_CHANCE = 0.01  # under this a head says no
SHARP = (1.5, 0.5)  # at first: what an expert that two tokens share counts, a head each
DECAY, CARRY = 0.85, 0.05  # at first: of a layer further back; of how alike the tokens before were
HALF_LIVES = (3.0, 20.0)  # at first: tokens, of the heads that look at how long ago alone
LEAST_WEIGHT = 1e-4


class Shape(NamedTuple):
    hidden: int
    heads: int
    horizon: int
    window: int
    dropout: float
    has_weights: bool
    n_told: int  # words of route memory; 0 = it is not asked


class TransformerNet(nn.Module):
    """One network for all layers.

    Over tokens: how alike two tokens are is a sum over their layers, of this token's up to l - horizon; a head turns
    it into attention, and reads what the alike tokens used at layer l: at first this is route memory, and all of it
    is learnt. Along the layers of the token: causal self-attention. Straight lines lead from all that is read to the
    scores, and the logarithm of what a head says counts by how alike the most alike token is.
    """

    def __init__(self, chance_LE: Tensor, scale_2L: Tensor, shape: Shape) -> None:
        super().__init__()
        self.n_layers, self.n_experts = chance_LE.shape
        self.shape, self.horizon = shape, shape.horizon
        n_inputs = self.n_experts * (2 if shape.has_weights else 1)
        n_words = len(SHARP) + shape.n_told
        n_sure = len(SHARP) + (2 if shape.n_told else 0)
        n_read = n_inputs + (1 + len(HALF_LIVES) + n_words) * self.n_experts
        n_layers, n_experts, hidden = self.n_layers, self.n_experts, shape.hidden

        def drawn(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * std)

        self.chance_LE: Tensor
        self.scale_2L: Tensor
        self.register_buffer("chance_LE", chance_LE)
        self.register_buffer("scale_2L", scale_2L)  # mean and spread of logarithms of weights
        one_IE = torch.eye(n_inputs, n_experts)
        self.metric_LIE = nn.Parameter(one_IE.repeat(n_layers, 1, 1))
        self.alike_FLJ = nn.Parameter(_alike(n_layers, shape.horizon))
        self.known_LJ: Tensor
        self.register_buffer("known_LJ", (self.alike_FLJ[0] != 0).float())
        self.recent_FL = nn.Parameter(torch.zeros(len(SHARP), n_layers))
        self.nobody_FL = nn.Parameter(torch.zeros(len(SHARP), n_layers))
        self.fade_U = nn.Parameter(torch.log(math.log(2) / torch.tensor(HALF_LIVES)))
        self.above_LIN = drawn(n_layers, n_inputs, hidden, std=0.05)
        self.everywhere_UDN = drawn(1 + len(HALF_LIVES), n_layers * n_experts, hidden, std=0.02)
        self.read_LRN = drawn(n_layers, n_read, hidden, std=0.03)
        self.read_skip_LRE = nn.Parameter(torch.zeros(n_layers, n_read, n_experts))
        self.sure_LQN = drawn(n_layers, n_sure, hidden, std=0.1)
        self.log_LFN = drawn(n_layers, n_words * n_experts, hidden, std=0.02)
        self.trust_LF = nn.Parameter(torch.full((n_layers, n_words), 0.7 / n_words))
        self.trust_by_sure_LQF = nn.Parameter(torch.zeros(n_layers, n_sure, n_words))
        self.bias_LN = nn.Parameter(torch.zeros(n_layers, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.layer_bias_HLL = nn.Parameter(torch.zeros(shape.heads, n_layers, n_layers))
        self.mixed = nn.Linear(hidden, hidden)
        self.inner_norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, 2 * hidden)
        self.outer = nn.Linear(2 * hidden, hidden)
        self.out_LNE = drawn(n_layers, hidden, n_experts, std=0.03)
        self.prior_LE = nn.Parameter(0.3 * torch.logit(chance_LE, eps=1e-4))
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [M, L, E]."""
        used_BSLE = batch.used(self.n_experts)
        given_BSLI = used_BSLE
        if self.shape.has_weights:
            given_BSLI = torch.cat([used_BSLE, self._weighed(batch)], dim=3)
        words, sure = self._alike_tokens(used_BSLE, given_BSLI, batch)
        if self.shape.n_told:
            words += list(batch.told_MLFE.permute(2, 1, 0, 3))
            sure += list(batch.sure_ML2.permute(2, 1, 0))
        recent_UMLE = self._recent_tokens(used_BSLE, batch)
        n_asked = batch.asked_BC.shape[1]
        given_LMI = given_BSLI[:, -n_asked:][batch.asked_BC].transpose(0, 1)
        return self._answer(given_LMI, recent_UMLE, torch.stack(words), torch.stack(sure, dim=2))

    def _weighed(self, batch: Batch) -> Tensor:
        """[B, S, L, E]: the logarithm of the weight, as a distance from its mean at this layer."""
        logs_BSLK = torch.log(batch.weights_BSLK.clamp(min=LEAST_WEIGHT))
        mean_L, spread_L = self.scale_2L
        far_BSLK = (logs_BSLK - mean_L[:, None]) / spread_L[:, None]
        return spread(batch.ids_BSLK, far_BSLK, self.n_experts)

    def _alike_tokens(
        self, used_BSLE: Tensor, given_BSLI: Tensor, batch: Batch
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For every head [L, M, E] what alike tokens used, and [L, M] how alike the most alike one is."""
        shared_JBCS = self._shared(given_BSLI, batch.asked_BC.shape[1])
        back_CS, hidden_BCS = self._visible(batch)
        log_back_CS = torch.log(back_CS.clamp(min=1).float())
        values_LBSE = used_BSLE.permute(2, 0, 1, 3).clone()
        values_LBSE[:, :, 0] = self.chance_LE[:, None]  # of the empty column: nobody is alike
        words, sure = [], []
        heads = zip(self.alike_FLJ * self.known_LJ, self.recent_FL, self.nobody_FL, strict=True)
        for alike_LJ, recent_L, nobody_L in heads:
            alike_LBCS = (alike_LJ @ shared_JBCS.flatten(1)).view(-1, *shared_JBCS.shape[1:])
            logits = alike_LBCS - recent_L[:, None, None, None] * log_back_CS
            logits = logits.masked_fill(hidden_BCS, -math.inf)[..., 1:]
            nobody_LBC1 = nobody_L[:, None, None, None].expand(*logits.shape[:3], 1)
            weight_LBCS = torch.softmax(torch.cat([nobody_LBC1, logits], dim=3), dim=3)
            words.append((weight_LBCS @ values_LBSE)[:, batch.asked_BC])
            with torch.no_grad():
                most_LBC = alike_LBCS.masked_fill(hidden_BCS, 0.0).amax(dim=3)
                reach_L = alike_LJ.abs().sum(1) * batch.ids_BSLK.shape[3] + 1e-6
                sure.append(4 * most_LBC[:, batch.asked_BC] / reach_L[:, None] - 2)
        return words, sure

    def _shared(self, given_BSLI: Tensor, n_asked: int) -> Tensor:
        """[2 L, B, C, S]: what two tokens share at every layer; then, what the tokens before them share."""
        key_LBSE = torch.einsum("bsli,lie->lbse", given_BSLI, self.metric_LIE)
        query_LBCE = key_LBSE[:, :, -n_asked - 1 :]  # with the token before the first
        shared_LBCS = query_LBCE @ key_LBSE.transpose(2, 3)
        before_LBCS = F.pad(shared_LBCS[:, :, :-1, :-1], (1, 0))
        return torch.cat([shared_LBCS[:, :, 1:], before_LBCS])

    def _visible(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[C, S] how many tokens ago, and [B, C, S] whom a token does not see."""
        n_asked, n_seen = batch.asked_BC.shape[1], batch.real_BS.shape[1]
        place_S = torch.arange(n_seen, device=batch.real_BS.device)
        back_CS = place_S[-n_asked:, None] - place_S
        hidden_CS = (back_CS < 1) | (back_CS > self.shape.window)
        return back_CS, hidden_CS | ~batch.real_BS[:, None]

    def _recent_tokens(self, used_BSLE: Tensor, batch: Batch) -> Tensor:
        """[U, M, L, E]: the token before, and averages that fade."""
        n_asked = batch.asked_BC.shape[1]
        back_CS, hidden_BCS = self._visible(batch)
        values_BSD = used_BSLE.flatten(2)
        out = [values_BSD[:, -n_asked - 1 : -1][batch.asked_BC]]
        for kept in torch.exp(-torch.exp(self.fade_U)):
            weight_CS = (1 - kept) * kept ** (back_CS - 1).clamp(min=0)
            weight_BCS = weight_CS.masked_fill(hidden_BCS, 0.0)
            out.append((weight_BCS @ values_BSD)[batch.asked_BC])
        return torch.stack(out).unflatten(2, (self.n_layers, self.n_experts))

    def _answer(
        self, given_LMI: Tensor, recent_UMLE: Tensor, words_FLME: Tensor, sure_LMQ: Tensor
    ) -> Tensor:
        nearest_LMI = self._later(given_LMI)
        above_LMN = self._later(torch.bmm(given_LMI, self.above_LIN).cumsum(0))
        own_UML = torch.cat([recent_UMLE.transpose(1, 2), words_FLME])
        read_LMR = torch.cat([nearest_LMI, own_UML.permute(1, 2, 0, 3).flatten(2)], dim=2)
        logs_FLME = torch.log(words_FLME + LEAST_CHANCE)
        x_LMN = above_LMN + torch.bmm(read_LMR, self.read_LRN) + self.bias_LN[:, None]
        x_LMN = x_LMN + torch.bmm(recent_UMLE.flatten(2), self.everywhere_UDN).sum(0)
        x_LMN = x_LMN + torch.bmm(sure_LMQ, self.sure_LQN)
        centred = logs_FLME.permute(1, 2, 0, 3).flatten(2) - 0.5 * math.log(LEAST_CHANCE)
        x_LMN = x_LMN + torch.bmm(centred, self.log_LFN)
        trust_LMF = self.trust_LF[:, None] + torch.bmm(sure_LMQ, self.trust_by_sure_LQF)
        logits_LME = self.prior_LE[:, None] + torch.bmm(read_LMR, self.read_skip_LRE)
        logits_LME = logits_LME + torch.einsum("flme,lmf->lme", logs_FLME, trust_LMF)
        x_LMN = self.dropout(F.relu(self.norm(x_LMN)))
        x_LMN = x_LMN + self._along_layers(x_LMN)
        x_LMN = x_LMN + self.outer(F.relu(self.inner(self.inner_norm(x_LMN))))
        return (logits_LME + torch.bmm(x_LMN, self.out_LNE)).transpose(0, 1)

    def _along_layers(self, x_LMN: Tensor) -> Tensor:
        n_layers, n_asked, hidden = x_LMN.shape
        parts = self.query_key_value(x_LMN).view(n_layers, n_asked, 3, self.shape.heads, -1)
        query, key, value = parts.permute(2, 1, 3, 0, 4)
        later_LL = torch.ones(n_layers, n_layers, device=x_LMN.device).triu(1).bool()
        logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5 + self.layer_bias_HLL
        weight_MHLL = torch.softmax(logits.masked_fill(later_LL, -math.inf), dim=3)
        return self.mixed((weight_MHLL @ value).permute(2, 0, 1, 3).reshape(n_layers, n_asked, hidden))  # fmt: skip

    def _later(self, x_LMX: Tensor) -> Tensor:
        """What layer l sees of layer l - horizon."""
        return torch.cat([torch.zeros_like(x_LMX[: self.horizon]), x_LMX[: -self.horizon]])


def _alike(n_layers: int, horizon: int) -> Tensor:
    """[F, L, 2 L]: what an expert that two tokens share at a layer counts at layer l; then, of the tokens before."""
    back_LL = torch.arange(n_layers)[:, None] - horizon - torch.arange(n_layers)
    here_LL = torch.where(back_LL >= 0, DECAY**back_LL, torch.zeros(()))
    nearest_L = (torch.arange(n_layers) - horizon).clamp(min=0)
    before_LL = CARRY * DECAY ** (n_layers - 1 - torch.arange(n_layers).float())
    before_LL = before_LL * DECAY ** nearest_L[:, None].float()
    one_LJ = torch.cat([here_LL, before_LL.expand(n_layers, n_layers)], dim=1)
    return torch.stack([sharp * one_LJ for sharp in SHARP])
