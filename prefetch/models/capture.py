"""Hooks on the routers that a model's own class declares, and on the experts that really ran.

It knows no tokenizer, no padding and no trace: one forward pass in, one decision per MoE layer out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from prefetch.errors import ConfigError, FormatError
from prefetch.models.routers import ADAPTERS, ATTENTION, Adapter, Routing, adapter_of, read


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """One MoE layer of a model: the router, and the block in which its experts stand beside it."""

    stack: str  # encoder | decoder
    number: int  # the model's own number of the layer
    router: nn.Module
    block: Any  # a module with the children that its class has
    adapter: Adapter

    @property
    def where(self) -> str:
        return f"{type(self.router).__name__} of {self.stack} layer {self.number}"


@dataclass(eq=False)
class Call:
    """What one router got and gave in one forward pass, and what its experts heard."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    heard_ids: Tensor | None = None
    heard_rows: dict[int, int] = field(default_factory=dict)  # expert -> tokens that it ran

    @property
    def gate_input_ND(self) -> Tensor:
        x = self.args[0] if self.args else self.kwargs["hidden_states"]
        return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True, eq=False)
class Decision:
    """A router's routing with its controls: choices reproduced from the gate input, choices that the experts heard."""

    routing: Routing
    gate_input_ND: Tensor
    own_gate_N: Tensor  # did the router, applied again, choose the same experts for this token?
    heard: bool | None  # did the experts run what the router said? None = cannot be seen

    def kept(self, keep_N: Tensor) -> Decision:
        """The same, these tokens only."""
        routing = self.routing
        ids_NK, weights_NK = routing.ids_NK[keep_N], routing.weights_NK[keep_N]
        return Decision(
            Routing(ids_NK, weights_NK, routing.scores_NE[keep_N]),
            self.gate_input_ND[keep_N],
            self.own_gate_N[keep_N],
            self.heard,
        )


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Every MoE layer, the encoder's first, in the order of the model."""
    declared = _declared(model)
    has_encoder = getattr(model.config, "is_encoder_decoder", False)
    layers = []
    for name, router in model.named_modules():
        kind = type(router).__name__
        if type(router) in declared or kind in ADAPTERS:
            parts = name.split(".")
            block = model.get_submodule(".".join(parts[:-1]))
            if ATTENTION.isdisjoint((kind, type(block).__name__)):
                stack = "encoder" if has_encoder and "encoder" in parts else "decoder"
                number = next((int(part) for part in parts if part.isdigit()), 0)
                layers.append(RoutedLayer(stack, number, router, block, _adapter(router, block)))
    _check_layers(model, layers)
    return sorted(layers, key=lambda layer: (layer.stack == "decoder", layer.number))


def _adapter(router: nn.Module, block: nn.Module) -> Adapter:
    kind, adapter = type(router).__name__, adapter_of(router)
    missing = [child for child in adapter.experts if not hasattr(block, child)]
    if missing:
        raise ConfigError(
            f"router class {kind}: expected {missing} beside it in {type(block).__name__}; to add this class, enter it "
            f'in prefetch/models/routers.py as ADAPTERS["{kind}"]'
        )
    return adapter


def _declared(model: nn.Module) -> set[type]:
    """The classes that the model's own classes name as the origin of router logits."""
    recorders: list[Any] = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        recorders += recorded if isinstance(recorded, (list, tuple)) else [recorded]
    return {getattr(recorder, "target_class", recorder) for recorder in recorders}


def _check_layers(model: nn.Module, layers: list[RoutedLayer]) -> None:
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} declares no router: this is a dense model, or its class is not known; a router "
            "class can be entered in prefetch/models/routers.py"
        )
    keys = [(layer.stack, layer.number) for layer in layers]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(
            f"{type(model).__name__} has several routers in {twice[0][0]} layer {twice[0][1]}; a trace holds one each"
        )


class RouterHooks:
    """`with RouterHooks(model) as hooks: model(...); calls = hooks.take()`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = routed_layers(model)
        self._calls: dict[int, Call] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for slot, layer in enumerate(self.layers):
            hook = layer.router.register_forward_hook(self._on_router(slot), with_kwargs=True)
            self._handles += [hook, *self._on_experts(slot, layer)]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], {}

    def take(self) -> dict[int, Call]:
        """What fired since the last take, by slot in `layers`."""
        calls, self._calls = self._calls, {}
        return calls

    def _on_router(self, slot: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if slot in self._calls:
                raise FormatError(f"{self.layers[slot].where}: ran twice in one forward pass")
            self._calls[slot] = Call(args, kwargs, output)

        return hook

    def _on_experts(self, slot: int, layer: RoutedLayer) -> Iterator[Any]:
        if layer.adapter.heard == "ids":
            yield layer.block.experts.register_forward_pre_hook(
                self._on_ids(slot), with_kwargs=True
            )
        elif layer.adapter.heard == "modules":
            for expert, module in enumerate(layer.block.experts.values()):
                yield module.register_forward_pre_hook(self._on_rows(slot, expert))

    def _on_ids(self, slot: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [*args, *kwargs.values()]
            if slot in self._calls and len(given) > 1:
                self._calls[slot].heard_ids = given[1]

        return hook

    def _on_rows(self, slot: int, expert: int) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            rows = self._calls[slot].heard_rows
            rows[expert] = rows.get(expert, 0) + len(args[0])

        return hook


def decide(layer: RoutedLayer, call: Call) -> Decision:
    """Reads one call and runs its controls; ids that the experts did not get are an error, not a trace."""
    routing = read(layer.adapter, call.output, layer.block, layer.where)
    # Past the hooks, with what the router was given: in the forward's own precision, before any rounding.
    again = read(
        layer.adapter, layer.router.forward(*call.args, **call.kwargs), layer.block, layer.where
    )
    own_gate_N = (again.ids_NK == routing.ids_NK).all(dim=1)
    return Decision(routing, call.gate_input_ND, own_gate_N, _heard(layer, call, routing))


def _heard(layer: RoutedLayer, call: Call, routing: Routing) -> bool | None:
    if layer.adapter.heard == "nothing":
        return None
    ids_NK = routing.ids_NK
    if layer.adapter.heard == "modules":
        n_experts = routing.scores_NE.shape[1]
        rows_E = torch.bincount(ids_NK[ids_NK >= 0], minlength=n_experts).tolist()
        return {expert: n for expert, n in enumerate(rows_E) if n} == call.heard_rows
    heard = call.heard_ids
    if heard is None or heard.shape != ids_NK.shape or not ((heard == ids_NK) | (ids_NK < 0)).all():
        got = "none" if heard is None else f"others, {list(heard.shape)}"
        raise FormatError(
            f"{layer.where}: its experts must receive the ids that it chose, {list(ids_NK.shape)}; they got {got}; "
            "this class needs an adapter in prefetch/models/routers.py"
        )
    return True
