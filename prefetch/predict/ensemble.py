"""Several predictors as one: their log-odds are added, with weights that the validation requests choose.

Members learn from the training requests as they would alone. Weights are found for every horizon, and for the first
layers of a token apart, because other things are known there. Every member alone is among the weights that are tried:
on the validation requests no member is better. It is a probability, calibrated on the same requests.

H horizons, 2 = first layers of a token and the others, M members, T tokens, L layers, E experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.errors import ConfigError
from prefetch.predict import mixing
from prefetch.predict.mixing import Mix, Told
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import (
    NOTHING,
    PROBABILITY,
    SEES,
    Online,
    Predictor,
    cheats,
    horizons_of,
)

log = logging.getLogger(__name__)
MOST_NUMBERS = 1 << 25  # that weights are tuned on; of more validation tokens some are left out
NO_MEMBERS = {
    "ensemble": "an ensemble is no member of another one; list its members",
    "imported": "guesses from a file cannot be members: they hold no more than the best experts of some requests",
    "none": "it guesses nothing",
}
KINDS = {PROBABILITY: mixing.PROBABILITY, "logit": mixing.LOGIT}  # every other score: its order


@dataclass
class Ensemble:
    """`members`: names of predictors, at their default settings, or one-entry mappings {name: settings}."""

    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    score: ClassVar[str] = PROBABILITY

    horizons: tuple[int, ...] = (1,)
    members: tuple[str | dict[str, dict[str, Any]], ...] = ("route_memory", "mlp")
    seed: int = 0
    needs: tuple[str, ...] = field(default=(), init=False)
    sees: str = field(default=NOTHING, init=False)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if not self.members:
            raise ConfigError("members: expected at least one, as in members=[route_memory,mlp]")
        self.leaves: dict[str, DictConfig] = {}  # how every member is described
        self.made_of: dict[str, Predictor] = {}  # the members themselves, by the same names
        for member in self.members:
            self._take(member)
        members = self.made_of.values()
        self.needs = tuple(sorted({column for member in members for column in member.needs}))
        seen = {part for member in members for part in member.sees.split(" + ")} - {NOTHING}
        self.sees = " + ".join(sorted(seen, key=SEES.index)) or NOTHING

    def _take(self, member: str | dict[str, dict[str, Any]]) -> None:
        """Builds one member; a second one of the same kind is called `name_2`."""
        if not isinstance(member, str) and len(member) != 1:
            raise ConfigError(f"members: expected a name or one name: settings, got {member}")
        name, settings = (member, {}) if isinstance(member, str) else next(iter(member.items()))
        leaf = self._leaf(name, settings)
        if leaf in self.leaves.values():
            raise ConfigError(f"members: {name} stands there twice with the same settings")
        predictor: Predictor = leaves.instantiate(leaf, name)
        if cheats(predictor):
            raise ConfigError(f"members: {name} sees the answer: nothing else would be asked")
        if not getattr(predictor, "stops_early", True):
            raise ConfigError(
                f"members: {name} learns from the validation requests, which choose the weights: nothing else would be "
                f"asked; expected {{{name}:{{stops_early:true}}}}"
            )
        if predictor.horizons != self.horizons:
            raise ConfigError(f"members: {name} has no horizons of its own; set train.horizons")
        label = f"{name}_{same}" if (same := self._count(leaf) + 1) > 1 else name
        self.leaves[label], self.made_of[label] = leaf, predictor

    def _leaf(self, name: str, settings: dict[str, Any]) -> DictConfig:
        if name in NO_MEMBERS:
            raise ConfigError(f"members: {name}: {NO_MEMBERS[name]}")
        known = [other for other in config.choices("predictor") if other not in NO_MEMBERS]
        if name not in known:
            raise ConfigError(f"members: {name!r} is no predictor; there are {', '.join(known)}")
        described = OmegaConf.load(config.CONFIGS / "predictor" / f"{name}.yaml")
        root = OmegaConf.create(
            {
                "seed": self.seed,
                "train": {"horizons": list(self.horizons)},
                "leaf": OmegaConf.merge(described, settings),
            }
        )
        return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(root.leaf, resolve=True)))

    def _count(self, leaf: DictConfig) -> int:
        return sum(other._target_ == leaf._target_ for other in self.leaves.values())

    def fit(self, train: Part, validation: Part) -> Self:
        for member in self.made_of.values():
            member.fit(train, validation)
        return self.combine(validation)

    def combine(self, validation: Part) -> Self:
        """Weights for members that are fitted."""
        mixes = [self._tuned(validation, horizon) for horizon in self.horizons]
        self.bias_H2_ = np.array([[mix.bias for mix in two] for two in mixes])
        self.weight_H2M_ = np.array([[mix.weight_M for mix in two] for two in mixes])
        return self

    def _tuned(self, validation: Part, horizon: int) -> tuple[Mix, Mix]:
        first, others = self._told(validation, horizon)
        mixes = mixing.tuned(first), mixing.tuned(others)
        weight_M = mixes[1].weight_M
        shares = zip(self.made_of, weight_M / weight_M.sum(), strict=True)
        said = ", ".join(f"{name} {share:.2f}" for name, share in shares)
        hits = mixing.hits_of(others, weight_M)
        most = max(mixing.hits_of(others, alone_M) for alone_M in np.eye(len(weight_M)))
        gain = (hits - most) / max(1, others.ids_NK.size)
        log.info("ensemble, %d ahead: %s; recall %+.4f over the best alone", horizon, said, gain)
        return mixes

    def _told(self, validation: Part, horizon: int) -> tuple[Told, Told]:
        """What members say about validation tokens: of the first layers of a token, and of the others."""
        card, passed = validation.card, 0
        total = sum(int(counted_T.sum()) for _, counted_T in validation.blocks())
        of_a_token = card.n_layers * len(self.made_of) * card.n_experts
        step = max(1, math.ceil(total * of_a_token / MOST_NUMBERS))
        odds = [np.zeros((0, card.n_layers, len(self.made_of), card.n_experts), np.float32)]
        ids = [np.zeros((0, card.n_layers, card.top_k), np.int64)]
        for past, ids_TLK, counted_T in validation.lessons(horizon, *self.needs):
            kept_T = np.flatnonzero(counted_T)
            kept_T = kept_T[(passed + np.arange(len(kept_T))) % step == 0]
            passed += int(counted_T.sum())
            odds.append(np.stack([self._odds(m, past)[kept_T] for m in self.made_of], axis=2))
            ids.append(ids_TLK[kept_T].astype(np.int64))
        odds_TLME, ids_TLK = np.concatenate(odds), np.concatenate(ids)
        ran_TL = (ids_TLK < card.n_experts).any(axis=2)
        is_first_L = np.arange(card.n_layers) < horizon
        first_TL, others_TL = ran_TL & is_first_L, ran_TL & ~is_first_L
        first, others = (Told(odds_TLME[at], ids_TLK[at]) for at in (first_TL, others_TL))
        return first, others

    def _odds(self, name: str, past: Past) -> NDArray[np.float32]:
        member = self.made_of[name]
        return mixing.log_odds(member.scores(past), kind_of(member))

    def scores(self, past: Past) -> NDArray[np.float32]:
        h, horizon = self.horizons.index(past.horizon), past.horizon
        sum_TLE, out_TLE = np.zeros(past.shape), np.empty(past.shape, np.float32)
        for name, weight_2 in zip(self.made_of, self.weight_H2M_[h].T, strict=True):
            if weight_2.any():
                mixing.add_odds(self._odds(name, past), weight_2.copy(), horizon, 0, sum_TLE)
        mixing.chances(sum_TLE, self.bias_H2_[h], horizon, 0, out_TLE)
        return out_TLE

    @property
    def online(self) -> Callable[[int], EnsembleOnline]:
        """There is one if every member has one."""
        lacking = [name for name, member in self.made_of.items() if not hasattr(member, "online")]
        if lacking:
            raise AttributeError(f"no incremental face: {', '.join(lacking)} has none")
        return partial(EnsembleOnline, self)


class EnsembleOnline:
    """The same answers, one event at a time."""

    def __init__(self, fitted: Ensemble, horizon: int) -> None:
        self._horizon, h = horizon, fitted.horizons.index(horizon)
        self._bias_2 = fitted.bias_H2_[h]
        self._asked: list[tuple[Online, int, NDArray[np.float64]]] = [
            (cast(Any, member).online(horizon), kind_of(member), weight_2.copy())
            for member, weight_2 in zip(
                fitted.made_of.values(), fitted.weight_H2M_[h].T, strict=True
            )
            if weight_2.any()
        ]

    def start(self) -> None:
        for member, _, _ in self._asked:
            member.start()

    def observe(
        self, layer: int, ids: NDArray[Any], gate_input: NDArray[Any] | None = None
    ) -> None:
        for member, _, _ in self._asked:
            member.observe(layer, ids, gate_input)

    def guess(self, layer: int) -> NDArray[np.float32]:
        sum_11E: NDArray[np.float64] | None = None
        for member, kind, weight_2 in self._asked:
            odds_11E = mixing.log_odds(member.guess(layer)[None, None], kind)
            if sum_11E is None:
                sum_11E = np.zeros(odds_11E.shape)
            mixing.add_odds(odds_11E, weight_2, self._horizon, layer, sum_11E)
        assert sum_11E is not None  # weights are not all 0
        out_11E = np.empty(sum_11E.shape, np.float32)
        mixing.chances(sum_11E, self._bias_2, self._horizon, layer, out_11E)
        return out_11E[0, 0]


def kind_of(member: Predictor) -> int:
    return KINDS.get(member.score, mixing.RANK)
