"""Guesses the next experts of a Mixture-of-Experts model from an exported file. It needs NumPy and nothing else.

It knows no engine, no trace and no fit. `stage=train train.export=true` writes the file and copies this folder beside
it, byte by byte: that is why its files import each other by relative names. README.md is the contract.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .attention import Transformer
from .counts import ActivationMatrix, Linear, Markov, Markov2, Popularity, PreviousToken
from .ensemble import Ensemble
from .memory import RouteMemory
from .networks import Gate, MemoryMlp, Mlp, Recurrent
from .predictor import Predictor
from .reading import Arrays, Told, check_sizes, read, reason

KINDS: dict[str, type[Predictor]] = {
    "popularity": Popularity,
    "previous_token": PreviousToken,
    "markov": Markov,
    "markov2": Markov2,
    "linear": Linear,
    "activation_matrix": ActivationMatrix,
    "gate": Gate,
    "route_memory": RouteMemory,
    "mlp": Mlp,
    "memory_mlp": MemoryMlp,
    "recurrent": Recurrent,
    "transformer": Transformer,
    "ensemble": Ensemble,
}


def load(path: str | Path, horizon: int | None = None) -> Predictor:
    """A predictor that guesses `horizon` layers ahead: one of those in the file, the farthest unless said."""
    told, arrays = read(path)
    try:
        chosen = max(told["horizons"]) if horizon is None else horizon
        if chosen not in told["horizons"]:
            raise ValueError(f"horizon {horizon}: was not learnt; there are {told['horizons']}")
        _try(_made(told, told["plan"], arrays, chosen), told["plan"])
        return _made(told, told["plan"], arrays, chosen)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {reason(error)}") from error


def _try(predictor: Predictor, plan: Told) -> None:
    """One token: what a file lacks shows here, and not to the engine that asks later."""
    gate_input = np.ones(_read_by_gates(plan), np.float32)
    for layer in range(predictor.n_layers):
        for ahead in predictor.ahead():
            if predictor.guess(ahead).shape != (predictor.n_experts,):
                raise ValueError(f"its arrays are not of {predictor.n_experts} experts")
        predictor.observe(layer, range(predictor.top_k), gate_input)


def _read_by_gates(plan: Told) -> int:
    """Numbers of a gate's input, where it or a member reads any."""
    of_members = (_read_by_gates(member) for member in plan.get("members", {}).values())
    return int(plan["axes"].get("D", 0)) or max(of_members, default=0)


def _made(told: Told, plan: Told, arrays: Arrays, horizon: int, name: str = "") -> Predictor:
    """Of the arrays those of this predictor (an ensemble holds several) and horizon, by their own names."""
    own: Arrays = {}
    for key, array in arrays.items():
        member, _, rest = key.rpartition("/")
        of, _, plain = rest.rpartition(".")
        if member == name and of in ("", f"h{horizon}"):
            own[plain] = array
    sizes = {**plan["axes"], "L": told["n_layers"], "E": told["n_experts"], "K": told["top_k"]}
    check_sizes(sizes)
    for key, array in own.items():
        axes = key.rpartition("_")[2]
        expected = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes)
        if array.shape != expected:
            raise ValueError(f"{key}: expected shape {expected}, found {array.shape}")
    predictor: Predictor = KINDS[plan["kind"]](told, plan, own, horizon)
    if isinstance(predictor, Ensemble):
        predictor.members = {
            member: _made(told, of, arrays, horizon, member)
            for member, of in plan["members"].items()
        }
    predictor.start()
    return predictor
