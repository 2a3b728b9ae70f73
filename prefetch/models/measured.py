"""The card of a loaded model, measured on its real parameters and its first decisions, not read from its configuration.

It knows no file and no batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from prefetch.models.capture import Decision, RoutedLayer
from prefetch.models.hf import DTYPES, LoadedModel
from prefetch.trace.card import ModelCard

PRECISIONS = {dtype: name for name, dtype in DTYPES.items()} | {"float8_e4m3fn": "fp8"}
# What models call the experts that every token uses, and their gate.
SHARED = frozenset({"shared_expert", "shared_experts", "shared_expert_gate", "shared_mlp"})
SAME = 0.02  # relative: bf16 weights carry three digits


def card_of(loaded: LoadedModel, layers: list[RoutedLayer], first: Decision) -> ModelCard:
    """`first` holds real tokens only: padding may be anything, NaN included."""
    n_experts = first.routing.scores_NE.shape[1]
    experts_bytes_L = [bytes_of(_expert_weights(layer)) for layer in layers]
    shared_bytes = bytes_of(_shared_weights(loaded.model))
    return ModelCard(
        name=loaded.name,
        revision=loaded.revision,
        n_experts=n_experts,
        top_k=first.routing.ids_NK.shape[1],
        layer_numbers=tuple(layer.number for layer in layers),
        layer_stacks=tuple(layer.stack for layer in layers),
        hidden_size=first.gate_input_ND.shape[1],
        score_function=score_function(first, layers[0].adapter.scores),
        weights_normalised=_sum_to_one(first),
        expert_bytes_L=tuple(n // n_experts for n in experts_bytes_L),
        expert_precision=precision_of(next(_expert_weights(layers[0]))),
        routed_precision=precision_of(first.gate_input_ND),
        dense_bytes=bytes_of(loaded.model.parameters()) - sum(experts_bytes_L) - shared_bytes,
        shared_bytes=shared_bytes,
        kv_bytes_per_token=kv_bytes_per_token(loaded),
    )


def router_matrix(layer: RoutedLayer, card: ModelCard) -> Tensor | None:
    """The router's one parameter of shape [E, D], or None where it is more than a matrix, or not here."""
    shape = card.n_experts, card.hidden_size
    found = [
        weight
        for weight in layer.router.parameters()
        if weight.shape == shape and not weight.is_meta
    ]
    return found[0].detach() if len(found) == 1 else None


def score_function(decision: Decision, meaning: str) -> str:
    """Which function of the logits the weights are proportional to, tried on tokens that dropped nothing."""
    if meaning == "probabilities":
        return "softmax"
    routing = decision.routing
    full_N = (routing.ids_NK >= 0).all(dim=1)
    logits_NE, weights_NK = routing.scores_NE[full_N].float(), routing.weights_NK[full_N].float()
    spread = {}
    for name, scores_NE in (("softmax", logits_NE.softmax(-1)), ("sigmoid", logits_NE.sigmoid())):
        ratio_NK = weights_NK / scores_NE.gather(1, routing.ids_NK[full_N].long())
        # One weight a token says nothing by its proportion: there it must be the score itself.
        base_N1 = ratio_NK.mean(1, keepdim=True) if ratio_NK.shape[1] > 1 else 1.0
        spread[name] = float((ratio_NK / base_N1 - 1).abs().max()) if full_N.any() else SAME
    best = min(spread, key=spread.__getitem__)
    return best if spread[best] < SAME else "other"


def _sum_to_one(decision: Decision) -> bool:
    full_N = (decision.routing.ids_NK >= 0).all(dim=1)
    sums_N = decision.routing.weights_NK[full_N].float().sum(dim=1)
    return bool(full_N.any() and ((sums_N - 1).abs() < SAME).all())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def precision_of(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return PRECISIONS.get(name, name)


def _expert_weights(layer: RoutedLayer) -> Iterator[Tensor]:
    for child in layer.adapter.experts:
        yield from getattr(layer.block, child).parameters()


def _shared_weights(model: torch.nn.Module) -> Iterator[Tensor]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SHARED:
            yield from module.parameters()


def kv_bytes_per_token(loaded: LoadedModel) -> int:
    """What the model's own cache grows by, measured on two tokens; with an encoder, the decoder's own cache."""
    model, token_BS = loaded.model, torch.full((1, 2), loaded.pad, device=loaded.model.device)
    with torch.no_grad():
        if loaded.has_encoder:
            encoded = model.get_encoder()(input_ids=token_BS, use_cache=False)
            output = model(encoder_outputs=encoded, decoder_input_ids=token_BS, use_cache=True)
        else:
            output = model(input_ids=token_BS, use_cache=True)
    cache = output.past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(bytes_of([t]) // t.shape[-2] for t in held if isinstance(t, Tensor) and t.numel())
