"""What a router said, read from its output by an explicit adapter per router class, never recomputed from logits.

It knows no hook, no batch and no trace. Classes are of transformers 5; they are named, not imported, because importing
them all takes seconds. N tokens of a forward pass (padding included), K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefetch.errors import ConfigError

DROPPED = -1  # the token goes to no expert: over capacity, or to an expert without weights


@dataclass(frozen=True, eq=False)
class Routing:
    """One router's decision for the tokens of one forward pass."""

    ids_NK: Tensor
    weights_NK: Tensor
    scores_NE: Tensor


@dataclass(frozen=True)
class Adapter:
    """How one router class says what it decided, and how its experts hear of it."""

    read: Callable[[Any, Any], Routing]  # (the router's output, the block around it)
    scores: str = "logits"  # what scores_NE holds: logits | probabilities
    heard: str = "ids"  # ids: the experts' second argument | modules: a module per expert | nothing: cannot be seen
    experts: tuple[str, ...] = ("experts",)  # the block's children that hold the routed experts


def _triple(output: Any, _block: Any) -> Routing:
    """(logits, weights, ids): what 64 of the 72 MoE families of transformers 5.23 return."""
    logits_NE, weights_NK, ids_NK = output
    return Routing(ids_NK, weights_NK, logits_NE.reshape(-1, logits_NE.shape[-1]))


def _first_three(output: Any, block: Any) -> Routing:
    return _triple(output[:3], block)


def _zaya(output: Any, block: Any) -> Routing:
    """The last router class skips the experts; the model spells that expert 0 with weight 0."""
    routing = _triple(output[:3], block)
    is_skip_NK = (routing.ids_NK == 0) & (routing.weights_NK == 0)
    ids_NK = routing.ids_NK.masked_fill(is_skip_NK, DROPPED)
    return Routing(ids_NK, routing.weights_NK, routing.scores_NE[:, :-1])


def _longcat(output: Any, block: Any) -> Routing:
    """The highest ids are identity experts, which have no weights to load."""
    routing, n_experts = _triple(output, block), block.experts.num_routed_experts
    ids_NK = routing.ids_NK.masked_fill(routing.ids_NK >= n_experts, DROPPED)
    return Routing(ids_NK, routing.weights_NK, routing.scores_NE[:, :n_experts])


def _dbrx(logits_NE: Tensor, block: Any) -> Routing:
    """The router gives logits only; the block's own function decides."""
    weights_NK, ids_NK = block.route_tokens_to_experts(logits_NE)
    return Routing(ids_NK, weights_NK, logits_NE)


def _llama4(output: Any, block: Any) -> Routing:
    """Dense sigmoid scores, exactly 0 for experts that were not chosen: every expert runs on score x input."""
    scores_NE, logits_NE = output
    weights_NK, ids_NK = scores_NE.topk(block.router.top_k, dim=-1)
    return Routing(ids_NK, weights_NK, logits_NE)


def _switch(output: Any, _block: Any) -> Routing:
    """One-hot dispatch, all zero for a token over its expert's capacity."""
    dispatch_BSE, weights_BS1, logits_BSE = output
    n_experts = dispatch_BSE.shape[-1]
    dispatch_NE = dispatch_BSE.reshape(-1, n_experts)
    chosen_N1, ids_N1 = dispatch_NE.max(dim=-1, keepdim=True)
    return Routing(
        ids_N1.masked_fill(chosen_N1 == 0, DROPPED),
        weights_BS1.reshape(-1, 1) * chosen_N1,
        logits_BSE.reshape(-1, n_experts),
    )


def _nllb(output: Any, _block: Any) -> Routing:
    """Dense combine weights: at most two are not 0, fewer where a choice was over capacity or is padding."""
    _top_1_NE, combine_NE, logits_NE = output
    weights_NK, ids_NK = combine_NE.topk(2, dim=-1)
    return Routing(ids_NK.masked_fill(weights_NK <= 0, DROPPED), weights_NK, logits_NE)


def _jetmoe(output: Any, _block: Any) -> Routing:
    """Choices sorted by expert: `order` says where each stood, `expert_size` how many each expert got."""
    order, _token, gates, expert_size, logits_NE = output
    experts = torch.arange(len(expert_size), device=order.device)
    sorted_ids = experts.repeat_interleave(torch.as_tensor(expert_size, device=order.device))
    shape = len(logits_NE), -1
    ids_NK = torch.empty_like(order).index_copy(0, order, sorted_ids).reshape(shape)
    return Routing(
        ids_NK, torch.empty_like(gates).index_copy(0, order, gates).reshape(shape), logits_NE
    )


TRIPLE = Adapter(_triple)
ADAPTERS: Mapping[str, Adapter] = {
    "DbrxRouter": Adapter(_dbrx),
    "DeepseekV4HashRouter": TRIPLE,  # its class does not declare it; ids are a table of the token
    "DiffusionGemmaTextRouter": Adapter(_triple, scores="probabilities"),
    "Gemma4TextRouter": Adapter(_triple, scores="probabilities"),
    "InklingTopkRouter": Adapter(_first_three),
    "JetMoeTopKGating": Adapter(
        _jetmoe, heard="nothing", experts=("input_linear", "output_linear")
    ),
    "Llama4Router": Adapter(_llama4, heard="nothing"),
    "LongcatFlashTopkRouter": Adapter(_longcat),
    "NllbMoeTop2Router": Adapter(_nllb, heard="modules"),
    "SwitchTransformersTop1Router": Adapter(_switch, heard="modules"),
    "ZayaRouter": Adapter(_zaya),
}
# Classes whose mixture is one of attention heads, not of feed-forward experts: counted as dense, not recorded.
ATTENTION = frozenset({"JetMoeAttention", "JetMoeMoA"})


def adapter_of(router: nn.Module) -> Adapter:
    return ADAPTERS.get(type(router).__name__, TRIPLE)


def read(adapter: Adapter, output: Any, block: Any, where: str) -> Routing:
    """The routing in a router's output; what does not have the form that its class promises is refused."""
    router = where.split()[0]
    try:
        routing = adapter.read(output, block)
        ids_NK, scores_NE = routing.ids_NK, routing.scores_NE
        holds = (
            ids_NK.dim() == scores_NE.dim() == 2
            and not ids_NK.is_floating_point()
            and not ids_NK.is_complex()
            and ids_NK.dtype != torch.bool
            and routing.weights_NK.shape == ids_NK.shape
            and len(scores_NE) == len(ids_NK)
            and ids_NK.shape[1] <= scores_NE.shape[1]
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        holds = False
    if not holds:
        known = (
            "(logits[N, E], weights[N, K], ids[N, K])"
            if adapter is TRIPLE
            else "what its adapter reads"
        )
        raise ConfigError(
            f"router class {where}: expected {known}, got {_form(output)}; to add this class, write a function from "
            f'its output to a Routing in prefetch/models/routers.py and enter it as ADAPTERS["{router}"]'
        )
    return routing


def _form(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')}{list(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(_form(part) for part in output)})"
    return type(output).__name__
