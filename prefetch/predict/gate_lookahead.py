"""A layer's own router applied to the gate input of an earlier layer: no training, only the model's weights.

(mixtral-offloading, AdapMoE, Fate.) A router is the matrix recorded beside the training trace, without bias and
without group limits, as in `analysis.routing.gates`. In the first layers, where no gate input of this token exists
yet, the most used experts are the guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, MissingData
from prefetch.predict.networks.layer_nets import finite, popular_logits
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import horizons_of
from prefetch.trace.blocks import Traceable
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import RoutingTrace

FILES = {"decoder": "router_weights", "encoder": "encoder_router_weights"}  # by stack


@dataclass
class GateLookahead:
    """With `rescale` every dimension of an input gets the size that it has at the guessed layer.

    (One factor for the whole input would change no order: a router without bias ranks x and 2x alike.)
    """

    needs: ClassVar[tuple[str, ...]] = ("gate_inputs",)
    sees: ClassVar[str] = "gate inputs"
    score: ClassVar[str] = "logit"

    horizons: tuple[int, ...] = (1,)
    rescale: bool = False

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)

    def fit(self, train: Part, validation: Part) -> Self:
        self.routers_LED_ = _routers(train.trace)
        self.popular_LE_ = popular_logits(train)
        if self.rescale:
            self.rms_LD_ = _sizes(train, self.routers_LED_.shape[2])
        return self

    def scores(self, past: Past) -> NDArray[np.float32]:
        inputs_TLD = past.gate_inputs()
        _check_width(inputs_TLD, self.routers_LED_)
        scores_TLE = np.tile(self.popular_LE_, (past.n_tokens, 1, 1))
        routers_LED = self.routers(past.horizon)
        for layer in range(past.horizon, past.card.n_layers):
            router_ED = routers_LED[layer]
            if not router_ED.any():
                continue  # not recorded
            x_TD = finite(inputs_TLD[:, layer])
            known_T = x_TD.any(axis=1)
            scores_TLE[known_T, layer] = (x_TD @ router_ED.T)[known_T]
        return scores_TLE

    def routers(self, horizon: int) -> NDArray[np.float32]:
        """[L, E, D]: of inputs that are so many layers old; the first layers have none."""
        if not self.rescale:
            return self.routers_LED_
        grown_LD = np.ones_like(self.rms_LD_)
        grown_LD[horizon:] = self.rms_LD_[horizon:] / self.rms_LD_[:-horizon]
        return self.routers_LED_ * grown_LD[:, None]


def _routers(trace: Traceable) -> NDArray[np.float32]:
    """[L, E, D]; 0 for a layer whose router is not beside the trace."""
    if isinstance(trace, RoutingTrace):
        raise MissingData(
            "needs router weights, which stand beside a recorded trace: fit on its folder or a TraceReader, not on "
            "a trace in memory"
        )
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    card, found = reader.card, dict[int, NDArray[Any]]()
    stacks = {stack: _beside(reader, name) for stack, name in FILES.items()}
    for slot, (stack, number) in enumerate(zip(card.layer_stacks, card.layer_numbers, strict=True)):
        router_ED = stacks[stack].get(f"layer.{number}")
        if router_ED is None:
            continue
        if router_ED.ndim != 2 or len(router_ED) != card.n_experts:
            raise FormatError(
                f"layer {number}: expected router weights of shape [{card.n_experts}, hidden size], "
                f"got {list(router_ED.shape)}"
            )
        found[slot] = router_ED
    if not found:
        raise MissingData(
            "needs router weights, which this trace has not recorded; source.gate_inputs=true records them, where a "
            "router is one matrix"
        )
    none_ED = np.zeros_like(next(iter(found.values())))
    routers = [found.get(slot, none_ED) for slot in range(card.n_layers)]
    return np.stack(routers).astype(np.float32)


def _beside(reader: TraceReader, name: str) -> dict[str, NDArray[Any]]:
    if not (reader.folder / f"{name}.safetensors").exists():
        return {}
    return reader.beside(name)


def _check_width(inputs_TLD: NDArray[Any], routers_LED: NDArray[Any]) -> None:
    if inputs_TLD.shape[2] != routers_LED.shape[2]:
        raise FormatError(
            f"the router weights take inputs of width {routers_LED.shape[2]}, but the recorded gate inputs have "
            f"{inputs_TLD.shape[2]}"
        )


def _sizes(train: Part, width: int) -> NDArray[np.float32]:
    """[L, D]: root mean square of every dimension of a gate's input; 1 where it is always 0."""
    squares_LD, rows_L = np.zeros((train.card.n_layers, width)), np.zeros(train.card.n_layers)
    for block, counted_T in train.blocks("gate_inputs"):
        assert block.gate_inputs_TLD is not None
        for layer in range(block.card.n_layers):
            x_TD = finite(block.gate_inputs_TLD[counted_T, layer])
            squares_LD[layer] += np.square(x_TD, dtype=np.float64).sum(axis=0)
            rows_L[layer] += x_TD.any(axis=1).sum()
    rms_LD = np.sqrt(squares_LD / np.maximum(rows_L, 1)[:, None])
    return np.where(rms_LD > 0, rms_LD, 1).astype(np.float32)
