"""A transformers MoE model whose experts stay in host memory: a bounded pool on the device holds those that are needed.

    model = OffloadedMoE(model, capacity=0.25)      # a quarter of the experts on the device
    model.generate(**tokens)                         # the same tokens, in less memory
    model.counts()                                   # hits, misses, bytes

It knows no family of models: see `parts`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prefetch.engine.bodies import LiveBody
from prefetch.engine.cpu import CpuBackend
from prefetch.engine.live import LiveEngine, Watch
from prefetch.engine.parts import Blocks, blocks_of, expert_modules, need_same_answers
from prefetch.errors import ConfigError
from prefetch.sim.memory import rooms_of, slots_of
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.trace.card import ModelCard, plain_card


class OffloadedMoE(nn.Module):
    """`model`, with its experts moved out. Outputs do not change.

    capacity: of the cache, written as `simulator.cache`: a share of all experts (0.25), experts per layer (16), or
    bytes ("2GiB"). predictor: a fitted one that can be asked event by event (mlp, recurrent, route_memory, ...),
    `horizon` layers ahead, whose best `width` (default k) are copied ahead. staging: slots beside the cache.
    """

    def __init__(
        self,
        model: Any,
        *,
        capacity: float | str = 0.25,
        scope: str = "per_layer",
        policy: Policy | None = None,
        staging: int = 2,
        predictor: Any = None,
        horizon: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.blocks_L, self.card = _layers(model)
        room_G, size_L = rooms_of(self.card, scope, capacity)
        cache_slots = min(sum(slots_of(room_G, size_L)), self.card.n_layers * self.card.n_experts)
        _need_room(cache_slots, staging, self.card)
        watch = _watch_of(predictor, horizon, self.card)
        self.host_LEM: list[Tensor] = []
        self.pool_SM = torch.zeros(cache_slots + staging, self.blocks_L[0].numbers).to(
            self.blocks_L[0].dtype
        )
        self.body = LiveBody(self.blocks_L, self.pool_SM)
        backend = CpuBackend(
            self.pool_SM, lambda entry: self.host_LEM[entry[0]][entry[1]], self.body
        )
        self.engine = LiveEngine(
            backend,
            cache_slots + staging,
            self.card,
            policy or Lru(),
            room_G,
            size_L,
            staging=staging,
            watch=watch,
            horizon=horizon,
            width=self.card.top_k if width is None else width,
        )
        self._take_over()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def counts(self) -> dict[str, int]:
        """Since the model was made: experts needed per event that were there, on their way, missing; bytes copied."""
        engine = self.engine
        told = {
            name: engine.counts[name]
            for name in ("demand_loads", "prefetch_loads", "prefetch_used")
        }
        outcome = {"hits": engine.hits, "late_hits": engine.late, "misses": engine.misses}
        return {
            **outcome,
            **told,
            "moved_bytes": engine.copied_bytes,
            "device_bytes": self.device_bytes,
        }

    @property
    def device_bytes(self) -> int:
        """Of the pool: what the experts take on the device, staging included."""
        return self.pool_SM.numel() * self.pool_SM.element_size()

    def restore(self) -> Any:
        """The model as it was, its experts in their places again."""
        self._hook.remove()
        for blocks, host_EM in zip(self.blocks_L, self.host_LEM, strict=True):
            for part in blocks.parts:
                held = host_EM[:, part.start : part.stop].reshape(len(host_EM), *part.shape)
                getattr(blocks.module, part.name).data = held.clone()
            del blocks.module.forward
        self.engine.backend.close()
        return self.model

    def _take_over(self) -> None:
        """Layer by layer, so that no more than one of them is held twice."""
        for layer, blocks in enumerate(self.blocks_L):
            self.host_LEM.append(blocks.pack())
            blocks.module.forward = MethodType(_forward_of(self, layer), blocks.module)
            for part in blocks.parts:
                param = getattr(blocks.module, part.name)
                param.data = param.data.new_empty(0)
        self._hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """How many requests and tokens a forward pass is about, and whether it begins them."""
        given = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        if given is None:
            given = kwargs.get("inputs_embeds")
        if not isinstance(given, Tensor) or given.dim() < 2:
            raise ConfigError(
                "OffloadedMoE: expected input_ids or inputs_embeds of [requests, tokens]"
            )
        past = kwargs.get("past_key_values")
        is_new = past is None or int(past.get_seq_length()) == 0
        n_requests, n_tokens = given.shape[:2]
        self.engine.step(n_requests, n_requests * n_tokens, is_new=is_new)


def _forward_of(offloaded: OffloadedMoE, layer: int) -> Any:
    def forward(
        _self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        body, engine = offloaded.body, offloaded.engine
        shape = hidden_states.shape
        with torch.no_grad():
            body.take(hidden_states.reshape(-1, shape[-1]), top_k_index, top_k_weights)
            engine.layer(layer, top_k_index.cpu().numpy())
            return body.give().reshape(shape)

    return forward


def _layers(model: Any) -> tuple[list[Blocks], ModelCard]:
    """Blocks of every MoE layer, and what decisions need to know of them."""
    found = list(expert_modules(model))
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no layer holds its experts as gate_up_proj and down_proj with one entry per "
            "expert; OffloadedMoE serves transformers >= 5 models that do"
        )
    blocks_L = [blocks_of(module, name) for name, module in found]
    shapes = {(blocks.parts, blocks.n_experts, blocks.dtype) for blocks in blocks_L}
    if len(shapes) > 1:
        raise ConfigError(
            f"{type(model).__name__}: MoE layers differ in their experts; all must be alike"
        )
    need_same_answers(blocks_L[0], found[0][0])
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    top_k = next(int(getattr(config, name)) for name in TOP_K if getattr(config, name, None))
    card = plain_card(
        str(getattr(config, "model_type", type(model).__name__)),
        n_experts=blocks_L[0].n_experts,
        top_k=top_k,
        layer_numbers=tuple(range(len(blocks_L))),
        expert_bytes_L=tuple(blocks.bytes for blocks in blocks_L),
    )
    return blocks_L, card


TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")


def _need_room(cache_slots: int, staging: int, card: ModelCard) -> None:
    if cache_slots + staging < 1 or staging < 0:
        raise ConfigError(
            f"OffloadedMoE: {cache_slots} slots of cache and {staging} of staging: an expert that is missing needs one"
        )


def _watch_of(predictor: Any, horizon: int, card: ModelCard) -> Watch | None:
    if predictor is None:
        return None
    if not hasattr(predictor, "online"):
        raise ConfigError(
            f"{type(predictor).__name__} cannot be asked event by event; predictors that can: mlp, memory_mlp, "
            "recurrent, transformer, route_memory, ensemble"
        )
    if not 1 <= horizon <= card.n_layers:
        raise ConfigError(f"horizon={horizon}: expected 1 to {card.n_layers} layers ahead")
    return lambda: predictor.online(horizon)
