"""A transformers MoE model whose experts stay in host memory: a bounded pool on the device holds those that are needed.

    model = OffloadedMoE(model, capacity=0.25, device="cuda")  # a quarter of the experts there, and all else
    model.generate(**tokens)                         # the same tokens, in less memory
    model.counts()                                   # hits, misses, bytes

It knows no family of models: see `parts`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor, nn

from prefetch import config, leaves
from prefetch.engine import guard
from prefetch.engine.arena import Arena
from prefetch.engine.backend import COMPUTE
from prefetch.engine.bodies import LiveBody, LiveKernels
from prefetch.engine.cpu import CpuBackend
from prefetch.engine.cuda import CudaBackend, need_device
from prefetch.engine.live import LiveEngine, Watch
from prefetch.engine.parts import Blocks, blocks_of, expert_modules, need_same_answers
from prefetch.engine.repacked import Repacked, repacked
from prefetch.errors import ConfigError
from prefetch.predict import runtime
from prefetch.predict.predictor import Online
from prefetch.sim.engines.reference import Entry
from prefetch.sim.hardware import is_count
from prefetch.sim.memory import SCOPES, rooms_of, slots_of
from prefetch.sim.policy import Policy
from prefetch.trace.card import ModelCard, plain_card


class OffloadedMoE(nn.Module):
    """`model`, with its experts moved out. On a CPU outputs are those of its eager experts; a GPU adds otherwise.

    capacity: of the cache, written as `simulator.cache`: a share of all experts (0.25), experts per layer (16), or
    bytes ("2GiB"). device: of the pool and of everything that is no expert; None = where the experts are now.
    policy: a name of configs/policy, or an object. predictor: a file of `train.export=true`, or a fitted one that can
    be asked event by event, `horizon` layers ahead, whose best `width` (default k) are copied ahead. staging: slots
    beside the cache. uses_kernels: None = on a GPU; a CPU runs the kernels' definitions.
    """

    def __init__(
        self,
        model: Any,
        *,
        capacity: float | str = 0.25,
        scope: str = "per_layer",
        device: str | None = None,
        policy: Policy | str = "lru",
        staging: int = 2,
        predictor: Any = None,
        horizon: int = 1,
        width: int | None = None,
        uses_kernels: bool | None = None,
    ) -> None:
        super().__init__()
        _check(scope=scope, staging=staging, horizon=horizon, width=width)
        self.model, blocks_L = model, _layers(model)
        self.home = next(blocks_L[0].module.parameters()).device
        self.device = self.home if device is None else need_device(device)
        is_gpu = self.device.type == "cuda"
        self.packed_L = _packed(blocks_L, is_gpu if uses_kernels is None else uses_kernels)
        self.card = _card_of(model, self.packed_L)
        room_G, size_L = rooms_of(self.card, scope, capacity)
        cached = min(sum(slots_of(room_G, size_L)), self.card.n_layers * self.card.n_experts)
        decided: dict[str, Any] = {
            "policy": _policy_of(policy),
            "room_G": room_G,
            "size_L": size_L,
            "staging": staging,
            "watch": _watch_of(predictor, horizon, self.card),
            "horizon": horizon,
            "width": self.card.top_k if width is None else width,
        }
        if cached + staging < 1:
            raise ConfigError(
                f"OffloadedMoE: capacity={capacity} holds no expert and staging={staging}: an expert that is missing "
                "needs a slot"
            )
        one, self.host_LEN = self.packed_L[0], list[Tensor]()
        shape = cached + staging, one.numbers
        with torch.inference_mode(False):  # whoever copies is another thread
            self.pool_SN = torch.zeros(shape, dtype=one.dtype, device=self.device)
        self.body: Any = LiveBody(blocks_L, self.pool_SN)
        if isinstance(one, Repacked):
            self.body = LiveKernels(self.pool_SN, one.layout, self.card.n_experts)
        backend = (CudaBackend if is_gpu else CpuBackend)(
            self.pool_SN, _block_of(self.host_LEN), self.body
        )
        self.arena = Arena(self.device)
        weakref.finalize(self, _ended, backend.stop, self.arena)  # whoever forgets the model
        self.engine = LiveEngine(backend, cached + staging, self.card, **decided)
        self._hooks: list[Any] = []
        self._passes, self._whose = threading.Lock(), 0  # the thread whose pass it is
        self.process = guard.Process()
        self._take_over()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def known(self, ids_TK: Tensor) -> NDArray[np.integer[Any]]:
        """The routing on the host. While a GPU computes it, copies go on."""
        if self.device.type != "cuda":
            return np.asarray(ids_TK.numpy())
        host_TK = torch.empty(ids_TK.shape, dtype=ids_TK.dtype, pin_memory=True)
        host_TK.copy_(ids_TK, non_blocking=True)
        self.engine.wait_for(self.engine.backend.record(COMPUTE))
        return np.asarray(host_TK.numpy())

    def counts(self) -> dict[str, int]:
        """Since the model was made: experts needed per event that were there, on their way, missing; bytes copied.

        `resident_events`: of layers that nobody had to ask, since every expert of the model was there.
        """
        engine, loads = self.engine, ("demand_loads", "prefetch_loads", "prefetch_used")
        return {
            "hits": engine.hits,
            "late_hits": engine.late,
            "misses": engine.misses,
            **{name: engine.counts[name] for name in loads},
            "resident_events": engine.resident_events,
            "moved_bytes": engine.copied_bytes,
            "device_bytes": self.device_bytes,
        }

    @property
    def device_bytes(self) -> int:
        """Of the pool: what the experts take on the device, staging included."""
        return self.pool_SN.numel() * self.pool_SN.element_size()

    def restore(self) -> Any:
        """The model as it was, its experts in their places again."""
        self.process.need()
        if not self.host_LEN:
            return self.model
        guard.lift(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _ended(self.engine.backend.close, self.arena)
        self.pool_SN = self.pool_SN.new_empty(0, self.pool_SN.shape[1])
        for packed in self.packed_L[: len(self.host_LEN)]:
            module = _module_of(packed)
            for name, weight in packed.unpack(self.host_LEN.pop(0)).items():
                getattr(module, name).data = weight.to(self.home)
            del module.forward
        return self.model.to(self.home)

    def _take_over(self) -> None:
        """A model that cannot be taken over, for want of memory, is left as it was."""
        try:
            for layer, packed in enumerate(self.packed_L):
                self._move_out(layer, packed)
            self.model.to(self.device)  # what is left of it
        except BaseException:
            self.restore()
            raise
        probe = torch.zeros(1, dtype=self.pool_SN.dtype, device=self.device)
        guard.refuse_changes(self, [_module_of(packed) for packed in self.packed_L], probe)
        model, begin, end = self.model, self._begin, self._end
        self._hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(end, always_call=True))

    def _move_out(self, layer: int, packed: Any) -> None:
        """Layer by layer, so that no more than one of them is held twice."""
        module = _module_of(packed)
        self.host_LEN.append(self.arena.hold(packed.pack()))
        module.forward = MethodType(_forward_of(self, layer), module)
        for param in module.parameters(recurse=False):
            param.data = param.data.new_empty(0)
        self._hooks.append(module.register_state_dict_pre_hook(guard.refuse_to_save))

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """How many requests and tokens a forward pass is about, and whether it begins them. One pass at a time."""
        self.process.need()
        if self._whose != threading.get_ident():  # else one of its own was interrupted
            self._passes.acquire()
            self._whose = threading.get_ident()
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
        mask = kwargs.get("attention_mask")
        told = None
        if isinstance(mask, Tensor) and mask.shape == (n_requests, n_tokens) and n_tokens > 1:
            told = mask.bool().cpu().numpy()
        self.engine.step(n_requests, n_requests * n_tokens, is_new=is_new, is_real_BS=told)

    def _end(self, *_: Any) -> None:
        """Also of a pass that failed."""
        if self._whose == threading.get_ident():
            self._whose = 0
            self._passes.release()


def _ended(stop: Callable[[], None], arena: Arena) -> None:
    """First the copies, then the memory that they are from."""
    stop()
    arena.close()


def _block_of(host_LEN: list[Tensor]) -> Callable[[Entry], Tensor]:
    return lambda entry: host_LEN[entry[0]][entry[1]]


def _forward_of(offloaded: OffloadedMoE, layer: int) -> Any:
    def forward(
        _self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        body, engine, shape = offloaded.body, offloaded.engine, hidden_states.shape
        if _self.training and torch.is_grad_enabled():
            raise ConfigError(
                "OffloadedMoE serves and does not train: experts have no gradients; call model.eval(), or train the "
                "untouched model (restore() gives it back)"
            )
        if layer == 0:
            offloaded.process.need()
        with torch.no_grad():
            if isinstance(body, LiveKernels) and engine.is_resident:
                body.take(hidden_states.reshape(-1, shape[-1]), top_k_index, top_k_weights, 0)
                engine.resident_layer(layer)
                return body.give().reshape(shape)
            ids_TK = offloaded.known(top_k_index)
            needed = len(np.unique(ids_TK[ids_TK < offloaded.card.n_experts]))
            body.take(hidden_states.reshape(-1, shape[-1]), top_k_index, top_k_weights, needed)
            engine.layer(layer, ids_TK)
            out: Tensor = body.give()
            return out.reshape(shape)

    return forward


def _module_of(packed: Any) -> Any:
    return packed.blocks.module if isinstance(packed, Repacked) else packed.module


def _layers(model: Any) -> list[Blocks]:
    """Blocks of every MoE layer."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"OffloadedMoE: expected a loaded model, got {model!r}")
    found = list(expert_modules(model))
    weights = [getattr(module, "gate_up_proj", None) for module in model.modules()]
    if any(isinstance(weight, nn.Parameter) and weight.numel() == 0 for weight in weights):
        raise ConfigError("the model is offloaded already; restore() gives it back")
    if any(module.gate_up_proj.is_meta for _, module in found):
        raise ConfigError(
            "the model's weights are not loaded (they are on `meta`): load it without a device map"
        )
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no layer holds its experts as gate_up_proj and down_proj with one entry per "
            "expert; OffloadedMoE serves transformers >= 5 models that do"
        )
    blocks_L = [blocks_of(module, name) for name, module in found]
    if len({(blocks.parts, blocks.n_experts, blocks.dtype) for blocks in blocks_L}) > 1:
        raise ConfigError(
            f"{type(model).__name__}: MoE layers differ in their experts; all must be alike"
        )
    return blocks_L


def _packed(blocks_L: list[Blocks], with_kernels: bool) -> list[Any]:
    """How every layer's experts lie on the host; what the first computes, all of them do."""
    if not with_kernels:
        need_same_answers(blocks_L[0], "OffloadedMoE")
        return list(blocks_L)
    layout = repacked(blocks_L[0], "OffloadedMoE").layout
    return [Repacked(blocks, layout) for blocks in blocks_L]


def _card_of(model: Any, packed_L: Sequence[Any]) -> ModelCard:
    """What decisions need to know of the layers."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    top_k = next(
        (int(getattr(config, name)) for name in TOP_K if getattr(config, name, None)), None
    )
    if top_k is None:
        raise ConfigError(
            f"{type(config).__name__}: expected one of {', '.join(TOP_K)}, experts per token"
        )
    blocks = packed_L[0].blocks if isinstance(packed_L[0], Repacked) else packed_L[0]
    return plain_card(
        str(getattr(config, "model_type", type(model).__name__)),
        n_experts=blocks.n_experts,
        top_k=top_k,
        layer_numbers=tuple(range(len(packed_L))),
        expert_bytes_L=tuple(packed.bytes for packed in packed_L),
    )


TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")


def _check(*, scope: str, staging: Any, horizon: Any, width: Any) -> None:
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r}: expected one of {', '.join(SCOPES)}")
    least = {"staging": (staging, 0), "horizon": (horizon, 1), "width": (width or 0, 0)}
    for name, (value, low) in least.items():
        if not is_count(value) or value < low:
            raise ConfigError(f"{name}={value!r}: expected a whole number from {low} on")


def _policy_of(policy: Policy | str) -> Policy:
    if not isinstance(policy, str):
        return _told_nothing(policy)
    path = config.CONFIGS / "policy" / f"{policy}.yaml"
    if not path.is_file():
        raise ConfigError(f"policy {policy!r}: there are {', '.join(config.choices('policy'))}")
    root = OmegaConf.create({"seed": 0, "policy": OmegaConf.load(path)})
    return _told_nothing(leaves.instantiate(root.policy, "policy"))


def _told_nothing(policy: Any) -> Policy:
    if not hasattr(policy, "rules"):
        raise ConfigError(f"policy={policy!r}: expected a name of configs/policy, or a policy")
    if policy.needs:
        raise ConfigError(
            f"policy {type(policy).__name__} needs {policy.needs[0]}, which a model that runs does not tell; use one "
            "that is told nothing but uses: lru, lfu, lfru, sieve, arc, s3fifo, ..."
        )
    made: Policy = policy
    return made


def _watch_of(predictor: Any, horizon: int, card: ModelCard) -> Watch | None:
    if predictor is None:
        return None
    if not 1 <= horizon <= card.n_layers:
        raise ConfigError(f"horizon={horizon}: expected 1 to {card.n_layers} layers ahead")
    if isinstance(predictor, str | Path):
        return _exported(predictor, horizon, card)
    if not hasattr(predictor, "online"):
        raise ConfigError(
            f"{type(predictor).__name__} cannot be asked event by event: give the file that train.export=true leaves, "
            "or a fitted mlp, memory_mlp, recurrent, transformer, route_memory or ensemble"
        )
    return lambda: predictor.online(horizon)


def _exported(path: str | Path, horizon: int, card: ModelCard) -> Watch:
    try:
        first: Any = runtime.load(path, horizon)
    except (OSError, ValueError) as error:
        raise ConfigError(f"predictor={path}: {error}") from error
    shape = first.n_layers, first.n_experts, first.top_k
    if shape != (card.n_layers, card.n_experts, card.top_k):
        raise ConfigError(
            f"predictor={path}: learnt on {shape[0]} layers of {shape[1]} experts, k = {shape[2]}; the model has "
            f"{card.n_layers} of {card.n_experts}, k = {card.top_k}"
        )
    if first.needs_gate_input:
        raise ConfigError(f"predictor={path}: needs gate inputs; give one that sees routing alone")
    return lambda: cast(Online, runtime.load(path, horizon))
