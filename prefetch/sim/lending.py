"""Which sizes a trace is replayed with: its own, or those of another model of the same shape. It knows no machine."""

from __future__ import annotations

import logging

from prefetch.config import SimulatorConfig
from prefetch.errors import ConfigError
from prefetch.models.cards import card_names, load_architecture
from prefetch.sim.costs import UNKNOWN, Beside, beside_of
from prefetch.sim.sizes import SIZES, lent_to
from prefetch.trace.card import ModelCard

log = logging.getLogger(__name__)


def replayed_with(own: ModelCard, told: SimulatorConfig) -> tuple[ModelCard, Beside]:
    """The card, and what it does not say of weights that are no experts."""
    name = told.model_card
    if name is None:
        _need_own_sizes(own, told)
        return own, _beside_own(own)
    architecture = load_architecture(name)
    lent = architecture.card(told.precision, told.matrix_precision)
    if lent.n_experts != own.n_experts:
        raise ConfigError(
            f"simulator.model_card={name}: has {lent.n_experts} experts per layer, the trace {own.n_experts}"
        )
    if (lent.n_layers, lent.top_k) != (own.n_layers, own.top_k):
        log.warning(
            f"simulator.model_card={name} has {lent.n_layers} layers and k = {lent.top_k}, the trace "
            f"{own.n_layers} and {own.top_k}: the trace's are replayed, with its sizes"
        )
    return lent_to(lent, own), beside_of(architecture, told.matrix_precision)


def _beside_own(own: ModelCard) -> Beside:
    """A shipped card's sizes come with what it says beside them, whether the trace lent them or the simulator does."""
    for name in card_names():
        architecture = load_architecture(name)
        if architecture.name == own.name and _sizes(architecture.card(None, None)) == _sizes(own):
            return beside_of(architecture)
    return UNKNOWN


def _sizes(card: ModelCard) -> list[object]:
    return [getattr(card, name) for name in (*SIZES, "expert_precision")]


def _need_own_sizes(own: ModelCard, told: SimulatorConfig) -> None:
    if (told.precision or told.matrix_precision) is not None:
        raise ConfigError(
            f"simulator.precision={told.precision}, simulator.matrix_precision={told.matrix_precision}: of which "
            "model? Pass simulator.model_card=NAME"
        )
    if own.expert_bytes_L is None:
        raise ConfigError(
            f"the trace of {own.name} does not say how large an expert is; pass simulator.model_card=NAME, "
            f"one of {', '.join(card_names())}"
        )
