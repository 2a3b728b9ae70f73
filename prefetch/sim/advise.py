"""Stage `advise`: what to set for a model on a machine: the fastest way there, how sure that is, what to type."""

from __future__ import annotations

import logging
import math
from typing import Any

from prefetch import leaves
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.sim.advising.at_hand import at_hand
from prefetch.sim.advising.cases import cases_of, predicted
from prefetch.sim.advising.page import between, page, placement_of
from prefetch.sim.advising.study import Study, study
from prefetch.sim.advising.ways import AHEAD, KINDS
from prefetch.sim.clock import need_simulated
from prefetch.sim.settings.placement import profile
from prefetch.sim.tables.asked import check_asked
from prefetch.sim.tables.summary import source

log = logging.getLogger(__name__)


def run(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """The page, one figure, the full table, and who should lie on the GPU; or predictions of an experiment's cases."""
    if cfg.advise.cases is not None:
        return _cases(cfg, store, outputs)
    _check(cfg)
    hand = at_hand(cfg, store)
    if hand.words:
        log.warning(hand.words)
    found = study(hand.cfg, store)
    outputs.table("ways", found.here)
    outputs.table("all_memories", found.table)
    outputs.table("experts", profile(placement_of(found)))
    metrics = headline(found)
    outputs.metrics(metrics)
    text = page(found, hand.words)
    (outputs.folder / "advice.md").write_text(text)
    if cfg.advise.figures:
        from prefetch.sim.advising.picture import tpot_by_memory  # matplotlib is slow to import

        for path in tpot_by_memory(found, outputs.folder, f"{source(found.bench)}."):
            if path.suffix == ".png":
                outputs.figure(path)
    print(text)
    return metrics


def _cases(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    table = predicted(cfg, store, cases_of(cfg.advise.cases))
    outputs.table("predictions", table)
    changes = zip(table.case, table.change_of_tokens_per_s, strict=True)
    metrics = {f"change_of_tokens_per_s/{name}": float(change) for name, change in changes}
    outputs.metrics(metrics)
    print(table.to_string(index=False, float_format="%.3f"))
    return metrics


def _check(cfg: Config) -> None:
    need_simulated(cfg, "advise")
    if cfg.simulator.misses != "wait" or cfg.simulator.semantics != "atomic":
        raise ConfigError(
            f"simulator.misses={cfg.simulator.misses}, simulator.semantics={cfg.simulator.semantics}: stage=advise "
            "tries every way by itself; leave them out"
        )
    if cfg.simulator.requests != "test":
        raise ConfigError(
            f"simulator.requests={cfg.simulator.requests}: stage=advise counts on some requests and times others; "
            "leave it out"
        )
    if cfg.advise.predictors is not None and not len(cfg.advise.predictors):
        raise ConfigError(
            "advise.predictors=[]: names nobody; advise.predictors=null is the default"
        )
    check_asked(cfg, ())
    for name in cfg.advise.policies:
        leaves.with_choice(cfg, "policy", name)
    for name in cfg.advise.predictors or ():
        leaves.with_choice(cfg, "predictor", name)


def headline(found: Study) -> dict[str, float]:
    best, pays = found.best, found.pays
    low, high = between(best)
    metrics = {
        "tpot_ms": float(best.tpot_ms),
        "tpot_ms_low": low * (1 - found.error[0]),
        "tpot_ms_high": high * (1 + found.error[1]),
        "tokens_per_s": float(best.tokens_per_s),
        "slots": float(best.slots),
        "host_bytes": float(best.host_bytes),
        "best": float(KINDS.index(best.way)),
        "prefetch_pays": float(best.way == AHEAD),
    }
    if pays is not None:
        metrics["break_even_recall"] = pays.break_even_recall
        metrics["break_even_link_gb_s"] = pays.break_even_gb_s
        metrics["guess_recall"] = pays.recall
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
