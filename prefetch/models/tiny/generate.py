"""Running the embedded model on prompts: prefill, then sampled continuations, with everything the routers did.

It knows no trace. B sequences, S positions, L layers, K chosen, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefetch.models.tiny.net import KVCache, Routed, TinyMoE


@dataclass(frozen=True)
class Generated:
    """What ran, position by position; every array starts with [B, S], and `routed` goes on with a layer axis."""

    tokens_BS: Tensor
    routed: Routed  # fields [B, S, L, ...]


@torch.inference_mode()
def generate(
    net: TinyMoE,
    prompts_BS: Tensor,
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Generated:
    """The prompt in one pass, then one pass per sampled token; every sampled token is run, none follows the last."""
    cache = KVCache(net.shape, len(prompts_BS))
    logits_BSV, routed_L = net(prompts_BS, cache)
    tokens, steps = [prompts_BS], [routed_L]
    for _ in range(new_tokens):
        tokens.append(sample(logits_BSV[:, -1], temperature, generator))
        logits_BSV, routed_L = net(tokens[-1], cache)
        steps.append(routed_L)
    return Generated(torch.cat(tokens, 1), _join(steps, len(prompts_BS)))


def _join(steps: list[list[Routed]], n_sequences: int) -> Routed:
    """Layers [B * S, X] of every step, as one [B, S, L, X] per field."""

    def joined(name: str) -> Tensor:
        layers = (
            torch.stack([getattr(routed, name) for routed in routed_L], 1) for routed_L in steps
        )
        return torch.cat([part.unflatten(0, (n_sequences, -1)) for part in layers], 1)

    return Routed(**{field.name: joined(field.name) for field in fields(Routed)})


def sample(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per sequence, [B, 1]; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)


@torch.inference_mode()
def own_gate_choices(net: TinyMoE, routed: Routed) -> int:
    """How many recorded choices each layer's router makes again, rank by rank, from the recorded gate inputs."""
    equal = 0
    for layer, router in enumerate(net.routers):
        _, _, ids_BSK = router(routed.gate_inputs[:, :, layer])
        equal += int((ids_BSK == routed.ids[:, :, layer]).sum())
    return equal
