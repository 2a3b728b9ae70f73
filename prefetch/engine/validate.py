"""Stage `validate`: what the simulator says of a grid, written down first; then the engine runs it on this device.

Decisions must be the same to the last byte. Times are judged on a GPU; on a CPU copies share the cores.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any, cast

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.engine.profiling.device import facts, place_of
from prefetch.engine.validating.calibrated import seal_error
from prefetch.engine.validating.cases import Case, cases_of, check
from prefetch.engine.validating.compare import compared, headline
from prefetch.engine.validating.page import page, steps_of
from prefetch.progress import Progress
from prefetch.sim.clock import need_simulated

log = logging.getLogger(__name__)


def run(cfg: Config, store: Store, outputs: Any) -> dict[str, float]:
    """Tables of predictions and of what became of them, a page, a figure."""
    need_simulated(cfg, "validate")
    check(cfg)
    cases = cases_of(cfg, store)
    predictions = _predicted(cases, outputs)
    table = _measured(cases, predictions, cfg.validate.repeats)
    outputs.table("cells", table)
    metrics = headline(table)
    outputs.metrics(metrics)
    error = metrics.get("file_median_abs_error")
    is_stores = OmegaConf.select(cast(DictConfig, cfg.hardware), "path") is None
    if cases[0].clock.device.type == "cuda" and error is not None and is_stores:
        seal_error(
            store,
            error,
            f"stage=validate: median of {len(table)} cells, {steps_of(cases)} steps each",
            facts(place_of(str(cases[0].clock.device))),
        )
    text = page(table, metrics, cases)
    (outputs.folder / "validation.md").write_text(text)
    if cfg.validate.figures:
        from prefetch.engine.validating.picture import predicted_and_measured  # matplotlib is slow

        for path in predicted_and_measured(table, outputs.folder, cases[0].clock.machine):
            if path.suffix == ".png":
                outputs.figure(path)
    print(text)
    return metrics


def _predicted(cases: list[Case], outputs: Any) -> list[dict[str, Any]]:
    """Written, and its digest said, before the engine runs anything."""
    with Progress("predicting", len(cases), "cells") as progress:
        rows = []
        for case in cases:
            rows.append(case.predicted())
            progress.advance()
    outputs.table("predictions", pd.DataFrame(rows))
    text = (outputs.folder / "predictions.csv").read_bytes()
    log.info("predictions.csv: sha256 %s", hashlib.sha256(text).hexdigest())
    return rows


def _measured(cases: list[Case], predictions: list[dict[str, Any]], repeats: int) -> pd.DataFrame:
    """Round after round over all cells, so that a slow minute is not one cell's."""
    cases[0].ran()  # warms up
    runs: list[list[dict[str, Any]]] = [[] for _ in cases]
    with Progress("running", len(cases) * repeats, "cells") as progress:
        for _ in range(repeats):
            for case, of_case in zip(cases, runs, strict=True):
                of_case.append(case.measured())
                progress.advance()
    return compared(predictions, runs)
