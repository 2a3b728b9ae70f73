"""A decoder-only MoE language model small enough to train on the spot; every layer is MoE.

It knows no text and no trace: tokens in, logits out, and beside them what every router saw and chose.
B sequences, S positions, N = B * S tokens, D hidden, F expert width, E experts, K chosen, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD = 32  # width of one attention head
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """The size of the net, as the user chose it."""

    layers: int
    experts: int
    top_k: int
    d: int
    ff: int
    context: int
    vocabulary: int


@dataclass(frozen=True)
class Routed:
    """What one layer's router saw and chose: one row per token."""

    attention_inputs: Tensor  # [N, D], normalised
    gate_inputs: Tensor  # [N, D], normalised
    logits: Tensor  # [N, E]
    weights: Tensor  # [N, K]
    ids: Tensor  # [N, K], best first


class KVCache:
    """Keys and values of the tokens that ran already, for every layer."""

    def __init__(self, shape: Shape, n_sequences: int) -> None:
        size = (shape.layers, 2, n_sequences, shape.d // HEAD, shape.context, HEAD)
        self._kv = torch.zeros(size)
        self.length = 0  # positions filled; the net moves it on once all layers have run

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + key.shape[2]
        kv = self._kv[layer, :, :, :, :stop]
        kv[0, :, :, self.length :], kv[1, :, :, self.length :] = key, value
        return kv[0], kv[1]


def _normal(generator: torch.Generator, *size: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=generator) * scale)


class Router(nn.Module):
    """Softmax over all experts, then the best K."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.weight_ED = _normal(generator, shape.experts, shape.d, scale=shape.d**-0.5)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE = functional.linear(x_ND, self.weight_ED)
        weights_NK, ids_NK = logits_NE.softmax(-1).topk(self.top_k, -1)
        # one renormalised weight is the constant 1, and the router would learn nothing from the text
        if self.top_k > 1:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return logits_NE, weights_NK, ids_NK


class Experts(nn.Module):
    """Two layers with a squared ReLU between (So et al. 2021); every choice is computed, none is dropped."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        n, d, ff = shape.experts, shape.d, shape.ff
        self.up_EDF = _normal(generator, n, d, ff, scale=d**-0.5)
        self.down_EFD = _normal(generator, n, ff, d, scale=(2 * shape.layers * ff) ** -0.5)

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Sorts the choices by expert, so that each layer's experts are two grouped products."""
        chosen = ids_NK.flatten()
        order = chosen.argsort(stable=True)
        stops_E = chosen.bincount(minlength=len(self.up_EDF)).cumsum(0).int()
        token = order // ids_NK.shape[1]
        hidden = functional.grouped_mm(x_ND.index_select(0, token), self.up_EDF, offs=stops_E)
        y = functional.grouped_mm(functional.relu(hidden).square(), self.down_EFD, offs=stops_E)
        y = y * weights_NK.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x_ND).index_add(0, token, y)


class Attention(nn.Module):
    """Causal attention with rotary positions (RoPE, Su et al. 2021)."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv = _normal(generator, 3 * shape.d, shape.d, scale=(3 * shape.d) ** -0.5)
        self.out = _normal(generator, shape.d, shape.d, scale=(3 * shape.d) ** -0.5)

    def forward(self, x_BSD: Tensor, turn: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        b, s, d = x_BSD.shape
        qkv = (
            functional.linear(x_BSD, self.qkv).view(b, s, 3, d // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        )
        q, k = _rotate(qkv[:2], turn)
        v = qkv[2]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=s > 1)
        return functional.linear(y.transpose(1, 2).reshape(b, s, d), self.out)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbours are one complex number, turned by the angle of its position; `turn` is complex [S, HEAD / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _norm(x: Tensor) -> Tensor:
    """Layer norm without gain and bias: the matrix that follows has a gain."""
    # torch composes an RMS norm of six operations on a CPU: a training step takes 7 % longer (AMD EPYC, 2026-11)
    return functional.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention, then routed experts, each on a normalised copy and added to the stream."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = Attention(shape, generator)
        self.router, self.experts = Router(shape, generator), Experts(shape, generator)

    def forward(
        self, x_BSD: Tensor, turn: Tensor, layer: int, cache: KVCache | None
    ) -> tuple[Tensor, Routed]:
        seen_BSD = _norm(x_BSD)
        x_BSD = x_BSD + self.attention(seen_BSD, turn, layer, cache)
        gate_ND = _norm(x_BSD).flatten(0, 1)
        logits_NE, weights_NK, ids_NK = self.router(gate_ND)
        y_ND = self.experts(gate_ND, ids_NK, weights_NK)
        routed = Routed(seen_BSD.flatten(0, 1), gate_ND, logits_NE, weights_NK, ids_NK)
        return x_BSD + y_ND.view_as(x_BSD), routed


class TinyMoE(nn.Module):
    """Embedding, blocks, and the embedding again as the output layer."""

    turn: Tensor

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = _normal(generator, shape.vocabulary, shape.d, scale=0.02)
        self.blocks = nn.ModuleList(Block(shape, generator) for _ in range(shape.layers))
        speed = ROPE_BASE ** (-torch.arange(0, HEAD, 2) / HEAD)
        angle = torch.outer(torch.arange(shape.context), speed)
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle), persistent=False)

    @property
    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self, tokens_BS: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, list[Routed]]:
        """Logits [B, S, V] and every layer's routing; with a cache, of the tokens that follow those it holds."""
        start, s = (cache.length if cache is not None else 0), tokens_BS.shape[1]
        assert start == 0 or s == 1, "the first call takes the prompt, every later one one token"
        x_BSD = functional.embedding(tokens_BS, self.embedding) * self.shape.d**0.5
        turn, routed_L = self.turn[start : start + s], []
        for layer, block in enumerate(self.blocks):
            x_BSD, routed = block(x_BSD, turn, layer, cache)
            routed_L.append(routed)
        if cache is not None:
            cache.length += s
        return functional.linear(_norm(x_BSD), self.embedding), routed_L
