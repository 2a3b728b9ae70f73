"""Pre-attention expert prediction (arXiv 2511.10676): two linear layers on what the attention of a layer reads.

The input of attention at layer l - horizon + 1 exists once layer l - horizon is done: at horizon 1 it is that of the
guessed layer itself, which even the first layer has. Above that the first layers are guessed by popularity.

Where it differs from the published one: its ranking loss is not reproduced; here every chosen expert is compared with
all that were not chosen (`nets.against_others`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.predict.networks.layer_nets import InputNets


@dataclass
class PreAttention(InputNets):
    needs: ClassVar[tuple[str, ...]] = ("pre_attention",)
    sees: ClassVar[str] = "attention inputs"
    loss: ClassVar[str] = "against_others"
    title: ClassVar[str] = "pre_attention"

    activation: bool = False  # a rectifier between the two layers

    @property
    def is_linear(self) -> bool:
        return not self.activation
