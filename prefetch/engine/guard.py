"""What must not be done to a model whose experts are elsewhere: said before anything is changed, and not by a crash.

It knows no experts: modules, and what is asked of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from prefetch.errors import ConfigError


class Process:
    """The one in which a model was offloaded: there the thread that copies lives, and the GPU's context."""

    def __init__(self) -> None:
        self.id = os.getpid()

    def need(self) -> None:
        if os.getpid() != self.id:
            raise ConfigError(
                f"OffloadedMoE: this model was offloaded in process {self.id} and is used in {os.getpid()}: what "
                "copies its experts is not there after a fork. Offload it in the process that runs it (start that one "
                "with `spawn`), or call restore() before forking"
            )


def refuse_to_save(module: Any, *_: Any) -> None:
    raise ConfigError(
        f"{type(module).__name__} holds no weights while its model is offloaded: restore() gives them back, then save"
    )


def refuse_changes(model: nn.Module, held: Sequence[nn.Module], probe: Tensor) -> None:
    """Casts and moves of the model, of modules whose experts are elsewhere, and of whatever holds one of those."""
    for module in _around(model, held):
        vars(module)["_apply"] = _refusing(module._apply, probe)


def lift(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("_apply", None)


def _around(model: nn.Module, held: Sequence[nn.Module]) -> Iterator[nn.Module]:
    found = {id(module) for module in held}
    for module in [*model.modules()]:
        if any(id(inner) in found for inner in module.modules()):
            yield module


def _refusing(apply: Callable[..., Any], probe: Tensor) -> Callable[..., Any]:
    """Of a module: a cast or a move is refused before anything is changed; what changes nothing may be."""

    def checked(change: Callable[[Tensor], Tensor], *told: Any, **more: Any) -> Any:
        wanted = change(probe)
        if (wanted.dtype, wanted.device) != (probe.dtype, probe.device):
            raise ConfigError(
                f"OffloadedMoE: a cast or move to {wanted.dtype} on {wanted.device}, while experts are blocks of "
                f"{probe.dtype} for a pool on {probe.device}: restore() the model, cast it, and offload it again "
                "(device= says where to)"
            )
        return apply(change, *told, **more)

    return checked
