"""A fitted predictor to take along: one file, and a folder that asks it with NumPy alone.

How a predictor answers there stands in `runtime`; what it is told stands here. It knows no trace and no store.
L layers, E experts, D width of a gate's input.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import prefetch
from prefetch.errors import ConfigError
from prefetch.predict import activation_matrix, alike, linear, markov2, mixing
from prefetch.predict.activation_matrix import ActivationMatrix
from prefetch.predict.ensemble import Ensemble
from prefetch.predict.gate_lookahead import GateLookahead
from prefetch.predict.hidden_mlp import HiddenMlp
from prefetch.predict.linear import Linear
from prefetch.predict.markov import Markov
from prefetch.predict.markov2 import Markov2
from prefetch.predict.memory_mlp import MemoryMlp
from prefetch.predict.mlp import DECAYS, Mlp
from prefetch.predict.networks import history
from prefetch.predict.popularity import Popularity
from prefetch.predict.predictor import PROBABILITY, Predictor, cheats, made_of
from prefetch.predict.previous_token import PreviousToken
from prefetch.predict.recurrent import Recurrent
from prefetch.predict.route_memory import RouteMemory
from prefetch.predict.runtime.reading import SCHEMA, Arrays
from prefetch.predict.transformer import Transformer
from prefetch.trace.routing import id_dtype

RUNTIME = Path(__file__).parent / "runtime"
FILE, FOLDER, CONTRACT = "predictor.safetensors", "predictor_runtime", "README.md"
SHARP = (alike.SHARP_INSIDE, alike.SHARP_OUTSIDE, alike.SHARP_BOTH)
TRANSFORMER = (  # what the runtime takes as it is
    "chance_LE", "recent_FL", "nobody_FL", "trust_LF", "bias_LN", "layer_bias_HLL", "out_LNE", "prior_LE",
)  # fmt: skip
MEANS = {
    PROBABILITY: "the chance that the expert is among the chosen ones",
    "logit": "larger = likelier; no probability",
    "rank": "larger = likelier; nothing but the order counts",
}


class Taken(NamedTuple):
    """What the runtime is told of a predictor: numbers, and arrays; those of one horizon are called `h4.name`."""

    kind: str  # of `runtime.KINDS`
    plan: dict[str, Any]
    arrays: Arrays


def check_exportable(predictor: Predictor, name: str) -> None:
    """Before anything is fitted."""
    for member, one in {name: predictor, **made_of(predictor)}.items():
        if why := _why_not(one):
            known = sorted(kind.__module__.rpartition(".")[2] for kind in TAKEN)
            raise ConfigError(
                f"train.export=true: {member} {why}: it cannot be exported; these can: {', '.join(known)}"
            )


def _why_not(predictor: Predictor) -> str | None:
    if cheats(predictor):
        return "sees the answer, which no engine has"
    if unheard := set(predictor.needs) - {"gate_inputs"}:
        return f"reads {', '.join(sorted(unheard))}, which observe() is not told"
    if isinstance(predictor, Transformer) and predictor.memory:
        return "with memory=true has no runtime"
    return None if type(predictor) in TAKEN else "has no runtime"


def write(predictor: Predictor, about: Mapping[str, Any], trace: str, folder: Path) -> Path:
    """`about` is what was said when it was fitted, `trace` the key of what it was fitted on."""
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    plan, arrays = _plan(predictor)
    told = {**_told(predictor, about), "trace": trace, "plan": plan}
    texts = {name: json.dumps(value) for name, value in told.items()}
    plain = save(arrays)
    numbers = plain[8 + int.from_bytes(plain[:8], "little") :]
    texts["sha256"] = json.dumps(hashlib.sha256(numbers).hexdigest())
    (folder / FILE).write_bytes(save(arrays, texts))
    unwanted = shutil.ignore_patterns("__pycache__", CONTRACT)
    shutil.copytree(RUNTIME, folder / FOLDER, ignore=unwanted, dirs_exist_ok=True)
    (folder / CONTRACT).write_text(_heading(told) + (RUNTIME / CONTRACT).read_text())
    return folder / FILE


def _told(predictor: Predictor, about: Mapping[str, Any]) -> dict[str, Any]:
    card = about["card"]
    return {
        "schema": SCHEMA,
        "predictor": about["predictor"],
        "settings": about["settings"],
        "version": prefetch.__version__,
        "class_version": int(getattr(predictor, "version", 1)),
        "model": card["name"],
        "n_layers": len(card["layer_numbers"]),
        "n_experts": card["n_experts"],
        "top_k": card["top_k"],
        "layer_numbers": card["layer_numbers"],
        "horizons": list(predictor.horizons),
        "score": predictor.score,
        "score_means": MEANS[predictor.score],
        "sees": predictor.sees,
        "needs": list(predictor.needs),
        "fold": about["fold"],
        "split": about["split"],
    }


def _heading(told: Mapping[str, Any]) -> str:
    horizons = ", ".join(map(str, told["horizons"]))
    return (
        f"# Predictor `{told['predictor']}`, to take along\n\n"
        f"Fitted on routing of {told['model']}: {told['n_layers']} layers, {told['n_experts']} experts, "
        f"{told['top_k']} of them chosen. Horizons: {horizons}. It sees: {told['sees']}. A score is "
        f"{told['score_means']}.\nFold {told['fold'] + 1}, trace {told['trace']}, prefetch {told['version']}.\n\n"
    )


def _plan(predictor: Predictor) -> tuple[dict[str, Any], Arrays]:
    """Of an ensemble with its members, whose arrays are called `member/name`."""
    kind, plan, arrays = TAKEN[type(predictor)](predictor)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    plan = {"kind": kind, **plan, "axes": _axes(arrays)}
    for member, one in made_of(predictor).items():
        of, inner = _plan(one)
        plan.setdefault("members", {})[member] = of
        arrays |= {f"{member}/{name}": array for name, array in inner.items()}
    return plan, arrays


def _axes(arrays: Arrays) -> dict[str, int]:
    """How long every axis is: what a name ends in says which it has."""
    found: dict[str, int] = {}
    for name, array in arrays.items():
        axes = name.rpartition("_")[2]
        for axis, length in zip(axes, array.shape, strict=True):
            assert found.setdefault(axis, length) == length, f"{name}: two lengths of axis {axis}"
    return {axis: length for axis, length in found.items() if not axis.isdigit()}


def _by_horizon(predictor: Predictor, arrays_of: Callable[[int, int], Arrays]) -> Arrays:
    """`arrays_of` is asked about the place of every horizon, and the horizon."""
    return {
        f"h{horizon}.{name}": array
        for place, horizon in enumerate(predictor.horizons)
        for name, array in arrays_of(place, horizon).items()
    }


def _popularity(fitted: Popularity) -> Taken:
    return Taken("popularity", {}, {"chance_LE": fitted.chance_LE_})


def _previous_token(fitted: PreviousToken) -> Taken:
    return Taken("previous_token", {}, {"chance_LE": fitted.chance_LE_})


def _markov(fitted: Markov) -> Taken:
    rows = _by_horizon(fitted, lambda h, _: {"rows_LEE": fitted.rows_HLEE_[h]})
    return Taken("markov", {}, {"chance_LE": fitted.chance_LE_, **rows})


def _markov2(fitted: Markov2) -> Taken:
    above = _by_horizon(fitted, lambda h, _: {"above_LEE": fitted.above_HLEE_[h]})
    shared = {"prior_LE": fitted.prior_LE_, "before_LEE": fitted.before_LEE_}
    return Taken("markov2", {"tiny": markov2.TINY}, {**shared, **above})


def _linear(fitted: Linear) -> Taken:
    rows = _by_horizon(fitted, lambda h, _: {"rows_LFE": fitted.rows_HLFE_[h]})
    plan = {"depth": fitted.depth, "edge": linear.EDGE}
    return Taken("linear", plan, {"chance_LE": fitted.chance_LE_, **rows})


def _activation_matrix(fitted: ActivationMatrix) -> Taken:
    unit_LER, share_QLE = fitted.compared()
    decay = _by_horizon(fitted, lambda _, horizon: {"decay_L": fitted.decay(horizon)})
    is_paper = fitted.variant == "paper"
    plan = {
        "compares_all": is_paper,
        "fallback": len(share_QLE) - 1 if is_paper else 0,  # the average; the first
        "tie": activation_matrix.TIE,
    }
    return Taken("activation_matrix", plan, {"unit_LER": unit_LER, "share_QLE": share_QLE, **decay})


def _gate_lookahead(fitted: GateLookahead) -> Taken:
    def routers(_: int, horizon: int) -> Arrays:
        return {"first_LDN": fitted.routers(horizon).transpose(0, 2, 1)}

    learnt_L = fitted.routers_LED_.any(axis=(1, 2))
    shared: Arrays = {"popular_LE": fitted.popular_LE_}
    shared["is_learnt_L"] = np.asarray(learnt_L, np.uint8)
    return Taken("gate", {}, shared | _by_horizon(fitted, routers))


def _hidden_mlp(fitted: HiddenMlp) -> Taken:
    def nets(h: int, _: int) -> Arrays:
        return {
            "first_LDN": fitted.inner_HLDM_[h],
            "first_bias_LN": fitted.inner_bias_HLM_[h],
            "second_LNE": fitted.outer_HLME_[h],
            "second_bias_LE": fitted.outer_bias_HLE_[h],
            "is_learnt_L": fitted.inner_HLDM_[h].any(axis=(1, 2)).astype(np.uint8),
        }

    return Taken("gate", {}, {"popular_LE": fitted.popular_LE_, **_by_horizon(fitted, nets)})


def _remembered(fitted: RouteMemory) -> tuple[dict[str, Any], Arrays]:
    """Who is nobody there is called E here, whatever the numbers of experts."""
    plan = {
        "window": fitted.window,
        "nearest": fitted.nearest,
        "decay": fitted.decay,
        "carry": fitted.carry,
        "least_weight": alike.LEAST_WEIGHT,
    }
    n_experts = fitted.chance_LE_.shape[1]
    ids_MLK = np.minimum(fitted.ids_MLK_, n_experts).astype(id_dtype(n_experts))
    return plan, {"ids_MLK": ids_MLK, "goes_on_M": fitted.goes_on_M_.astype(np.uint8)}


def _route_memory(fitted: RouteMemory) -> Taken:
    plan, arrays = _remembered(fitted)
    mixes = _by_horizon(fitted, lambda h, _: {"mix_3": fitted.mix_H3_[h]})
    plan["prior"] = alike.PRIOR
    return Taken("route_memory", plan, {"chance_LE": fitted.chance_LE_, **arrays, **mixes})


def _mlp(fitted: Mlp) -> Taken:
    networks = _by_horizon(fitted, lambda _, h: history.taken_apart(fitted.network(h)))
    return Taken("mlp", {"decays": list(fitted.decays)}, networks)


def _memory_mlp(fitted: MemoryMlp) -> Taken:
    from prefetch.predict.networks import memory_net

    plan, arrays = _remembered(fitted.memory())
    plan |= {"decays": DECAYS, "sharp": SHARP, "least_chance": memory_net.LEAST_CHANCE}

    def networks(h: int, horizon: int) -> Arrays:
        return {"sure_22": fitted.sure_H22_[h], **_memory_net(_learnt(fitted.fitted(horizon)))}

    return Taken("memory_mlp", plan, {**arrays, **_by_horizon(fitted, networks)})


def _memory_net(net: Arrays) -> Arrays:
    """What is read together stands together: usage, what memories say, its logarithms, how sure they are."""
    n_layers, n_hidden = net["bias_LN"].shape
    context_LPN, context_skip_LPE = (
        net[name].swapaxes(0, 1).reshape(n_layers, -1, net[name].shape[3])
        for name in ("own_CLEN", "own_skip_CLEE")
    )
    read = [context_LPN, net["told_LGN"], net["sure_L2N"]]
    names = ("above_LEN", "nearest_LEN", "bias_LN", "prior_LE", "out_LNE")
    return {
        **{name: net[name] for name in names},
        "nearest_skip_LEE": net["skip_LEE"],
        "context_PN": net["context_CLEN"].reshape(-1, n_hidden),
        "read_LRN": np.concatenate(read, axis=1),
        "skip_LQE": np.concatenate([context_skip_LPE, net["told_skip_LGE"]], axis=1),
        "trust_L8": net["trust_LG"],
        "trust_by_sure_L82": net["trust_by_sure_LG2"],
        **_hidden(net),
    }


def _recurrent(fitted: Recurrent) -> Taken:
    def networks(_: int, horizon: int) -> Arrays:
        return _recurrent_net(_learnt(fitted.fitted(horizon)), fitted.chance_LE_.shape)

    return Taken("recurrent", {}, _by_horizon(fitted, networks))


def _recurrent_net(net: Arrays, shape_LE: tuple[int, ...]) -> Arrays:
    """What is read together stands together: nearest layer, token before, averages, state."""
    names = ("above_LEN", "bias_LN", "prior_LE", "out_LNE")
    return {
        **{name: net[name] for name in names},
        "token_LEG": net["token_DG"].reshape(*shape_LE, -1),
        "kept_U1": np.exp(-np.exp(net["fade_U"]))[:, None],
        "read_LRN": np.concatenate([net["read_LRN"], net["state_LGN"]], axis=1),
        "skip_LRE": np.concatenate([net["read_skip_LRE"], net["state_skip_LGE"]], axis=1),
        "gru_told_GV": net["cell.weight_ih_l0"].T,
        "gru_told_bias_V": net["cell.bias_ih_l0"],
        "gru_kept_GV": net["cell.weight_hh_l0"].T,
        "gru_kept_bias_V": net["cell.bias_hh_l0"],
        **_norm(net, "norm", "gain_N", "shift_N"),
        **_norm(net, "token_norm", "token_gain_G", "token_shift_G"),
        **_norm(net, "state_norm", "state_gain_I", "state_shift_I"),
        **_product(net, "inner", "inner_NN", "inner_bias_N"),
        **_product(net, "outer", "outer_NN", "outer_bias_N"),
    }


def _transformer(fitted: Transformer) -> Taken:
    from prefetch.predict.networks import transformer_net

    def networks(_: int, horizon: int) -> Arrays:
        return _transformer_net(_learnt(fitted.fitted(horizon)))

    plan = {"window": fitted.window, "least_chance": transformer_net.LEAST_CHANCE}
    return Taken("transformer", plan, _by_horizon(fitted, networks))


def _transformer_net(net: Arrays) -> Arrays:
    """What is read together stands together: nearest layer, recent tokens, alike ones, how alike, their logarithms."""
    alike_FLJ = net["alike_FLJ"] * net["known_LJ"]
    return {
        **{name: net[name] for name in TRANSFORMER},
        "metric_LEE": net["metric_LIE"],
        "above_LEN": net["above_LIN"],
        "alike_FLJ": alike_FLJ,
        "reach_FL": np.abs(alike_FLJ).sum(axis=2),
        "kept_V": np.exp(-np.exp(net["fade_U"])),
        "everywhere_PN": net["everywhere_UDN"].reshape(-1, net["bias_LN"].shape[1]),
        "read_LRN": np.concatenate([net["read_LRN"], net["sure_LQN"], net["log_LFN"]], axis=1),
        "skip_LQE": net["read_skip_LRE"],
        "trust_by_sure_LFF": net["trust_by_sure_LQF"],
        **_product(net, "query_key_value", "three_NA", "three_bias_A"),
        **_product(net, "mixed", "mixed_NN", "mixed_bias_N"),
        **_hidden(net),
    }


def _ensemble(fitted: Ensemble) -> Taken:
    def mixes(h: int, _: int) -> Arrays:
        return {"bias_2": fitted.bias_H2_[h], "weight_2A": fitted.weight_H2M_[h]}

    scores = {name: one.score for name, one in fitted.made_of.items()}
    plan = {"scores": scores, "floor": mixing.FLOOR, "farthest": mixing.FARTHEST}
    return Taken("ensemble", plan, _by_horizon(fitted, mixes))


def _learnt(net: Any) -> Arrays:
    """Of a torch module."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in net.state_dict().items()}


def _hidden(net: Arrays) -> Arrays:
    """The norms and the wide residual block of two networks."""
    return {
        **_norm(net, "norm", "gain_N", "shift_N"),
        **_norm(net, "inner_norm", "inner_gain_N", "inner_shift_N"),
        **_product(net, "inner", "inner_NW", "inner_bias_W"),
        **_product(net, "outer", "outer_WN", "outer_bias_N"),
    }


def _norm(net: Arrays, name: str, gain: str, shift: str) -> Arrays:
    return {gain: net[f"{name}.weight"], shift: net[f"{name}.bias"]}


def _product(net: Arrays, name: str, rows: str, bias: str) -> Arrays:
    """torch keeps a row for every output, NumPy reads one for every input."""
    return {rows: net[f"{name}.weight"].T, bias: net[f"{name}.bias"]}


TAKEN: dict[type, Callable[[Any], Taken]] = {
    Popularity: _popularity,
    PreviousToken: _previous_token,
    Markov: _markov,
    Markov2: _markov2,
    Linear: _linear,
    ActivationMatrix: _activation_matrix,
    GateLookahead: _gate_lookahead,
    HiddenMlp: _hidden_mlp,
    RouteMemory: _route_memory,
    Mlp: _mlp,
    MemoryMlp: _memory_mlp,
    Recurrent: _recurrent,
    Transformer: _transformer,
    Ensemble: _ensemble,
}
