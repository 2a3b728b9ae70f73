"""Which routing stands for a model that is asked about: its own, that of another with as many experts, or made-up.

It simulates nothing. Whoever is taken is said, with how it differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from prefetch import config, leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.models.cards import load_architecture
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader

# of the made-up routing: two fifths of it are fitted on, a fifth is replayed
REQUESTS, PROMPT, NEW = 40, 16, 64
SAID_AS = ("n_experts", "experts")


@dataclass(frozen=True)
class AtHand:
    """The configuration with the trace that is taken, and why."""

    cfg: Config
    words: str  # empty where it is the one that was asked for


def at_hand(cfg: Config, store: Store) -> AtHand:
    """A source that says how many experts it has, and has others than the model, cannot be what is meant."""
    name = cfg.simulator.model_card
    if name is None or cfg.trace is not None:
        return AtHand(cfg, "")
    wanted = load_architecture(name).card(None, None)
    if _experts_of(cfg) in (None, wanted.n_experts):
        return AtHand(cfg, "")
    found = nearest(wanted, store)
    if found is None:
        return _made_up(cfg, wanted)
    own, words = found.card, _words(found, wanted)
    top_k = min(wanted.top_k, own.top_k)
    if (own.n_layers, own.top_k) == (wanted.n_layers, top_k):
        taken = OmegaConf.merge(cast(DictConfig, cfg), {"trace": str(found.folder)})
        return AtHand(cast(Config, taken), words)
    shape = {"n_layers": wanted.n_layers, "top_k": top_k}
    return AtHand(_from(cfg, "trimmed", path=str(found.folder), **shape), words)


def _experts_of(cfg: Config) -> int | None:
    """What the settings of the source say, where they say it: of drawn choices, or of a model that it makes."""
    names = (OmegaConf.select(cast(DictConfig, cfg), f"source.{name}") for name in SAID_AS)
    return next((int(n) for n in names if n is not None), None)


def nearest(wanted: ModelCard, store: Store) -> TraceReader | None:
    """Of the real traces in the store with as many experts, and layers enough: its own, then by k, then by layers.

    One with more choices per token can lend as many as are wanted, one with fewer cannot.
    """

    def distance(reader: TraceReader) -> tuple[object, ...]:
        own = reader.card
        return (
            own.name != wanted.name,
            own.top_k < wanted.top_k,
            abs(own.top_k - wanted.top_k),
            own.n_layers - wanted.n_layers,
            -reader.n_tokens,
            str(reader.folder),
        )

    there = (TraceReader(folder) for folder in store.sealed("trace"))
    fitting = [
        reader
        for reader in there
        if reader.provenance.kind == "real"
        and reader.provenance.source != "trimmed"
        and reader.card.n_experts == wanted.n_experts
        and reader.card.n_layers >= wanted.n_layers
    ]
    return min(fitting, key=distance) if fitting else None


def _words(found: TraceReader, wanted: ModelCard) -> str:
    own = found.card
    shape = f"{own.n_layers} layers, {own.top_k} of {own.n_experts}"
    words = f"the routing is that of {own.name} ({shape}, found in the store)"
    if (own.n_layers, own.top_k) == (wanted.n_layers, wanted.top_k):
        return words
    words += f", its first {wanted.n_layers} layers and {min(own.top_k, wanted.top_k)} choices"
    if own.top_k < wanted.top_k:
        words += f"; {wanted.name} takes {wanted.top_k}, so that times are too short"
    return words


def _made_up(cfg: Config, wanted: ModelCard) -> AtHand:
    """A chain from layer to layer of the model's shape; where none can be, tokens that repeat each other."""
    shape = {
        "n_layers": wanted.n_layers,
        "n_experts": wanted.n_experts,
        "top_k": wanted.top_k,
        "n_requests": REQUESTS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    made, process = _from(cfg, "synthetic", **shape, process="chain"), "chain from layer to layer"
    try:
        leaves.instantiate(made.source, "source")
    except ConfigError:
        made, process = (
            _from(cfg, "synthetic", **shape, process="sticky"),
            "walk of repeating tokens",
        )
    words = (
        f"there is no routing with {wanted.n_experts} experts in {wanted.n_layers} layers: a made-up {process} stands "
        f"for {wanted.name}, and no number here is about its text. Record a trace of it (stage=collect) for that"
    )
    return AtHand(made, words)


def _from(cfg: Config, source: str, **settings: Any) -> Config:
    """The configuration with another source."""
    leaf = OmegaConf.load(config.CONFIGS / "source" / f"{source}.yaml")
    return leaves.with_leaf(cfg, "source", OmegaConf.merge(leaf, settings))
