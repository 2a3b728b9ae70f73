"""ProMoE's predictor (arXiv 2410.22134): a small net per layer reads the gate's input some layers before.

Nets of different horizons and layers share nothing. In the first layers, where no gate input of this token exists yet,
the most used experts are the guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefetch.predict.networks.layer_nets import InputNets


@dataclass
class HiddenMlp(InputNets):
    needs: ClassVar[tuple[str, ...]] = ("gate_inputs",)
    sees: ClassVar[str] = "gate inputs"
    loss: ClassVar[str] = "each_alone"
    title: ClassVar[str] = "hidden_mlp"
