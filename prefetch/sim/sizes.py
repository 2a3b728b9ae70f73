"""What a card must say before bytes and times can be counted, and what its precisions are to a device."""

from __future__ import annotations

import dataclasses
import math

from prefetch.errors import ConfigError, MissingData
from prefetch.models.architecture import BITS_PER_WEIGHT
from prefetch.sim.hardware import Device
from prefetch.trace.card import ModelCard

SIZES = ("expert_bytes_L", "dense_bytes", "shared_bytes", "kv_bytes_per_token", "hidden_size")
LEND = "pass simulator.model_card=..., a name in configs/model_card or the path of a YAML"


def need_sizes(card: ModelCard) -> None:
    """Recorded traces often know no sizes: what is missing is named before anything is counted."""
    if missing := [name for name in SIZES if getattr(card, name) is None]:
        raise MissingData(f"{card.name}: the model card does not say {', '.join(missing)}; {LEND}")


def lent_to(lent: ModelCard, own: ModelCard) -> ModelCard:
    """Sizes of the lent card on the layers of the trace: where those differ in number, of its first layer."""
    sizes_L = lent.expert_bytes_L or ()
    if lent.n_layers != own.n_layers:
        sizes_L = (sizes_L[0],) * own.n_layers
    return dataclasses.replace(
        lent,
        top_k=own.top_k,
        layer_numbers=own.layer_numbers,
        layer_stacks=own.layer_stacks,
        expert_bytes_L=sizes_L,
    )


def weights_of(n_bytes: int, precision: str | None, card: ModelCard) -> int:
    """How many weights these bytes hold."""
    if precision not in BITS_PER_WEIGHT:
        there = ", ".join(sorted(BITS_PER_WEIGHT))
        raise ConfigError(f"{card.name}: no precision {precision!r}; there are {there}; {LEND}")
    return math.ceil(n_bytes * 8 / BITS_PER_WEIGHT[precision])


def operations_per_s(device: Device, precision: str) -> int:
    """The rate of the units that multiply weights of this precision.

    fp8 runs in fp8 where the device can. 4-bit and int8 weights are only stored so: kernels for few tokens expand
    them to bf16, and so runs fp8 on a device without it. fp32 runs in fp32.
    """
    rates = device.operations_per_s
    if precision == "fp32":
        return rates.fp32
    if precision.startswith("fp8") and rates.fp8 is not None:
        return rates.fp8
    return rates.bf16
