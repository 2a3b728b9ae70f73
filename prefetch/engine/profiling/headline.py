"""The numbers of `metrics.json`: flat, finite, each a number of a row or of the machine. It measures nothing."""

from __future__ import annotations

import math

import pandas as pd

from prefetch.engine.profiling.machine import Measured
from prefetch.engine.profiling.measure import NO_MEMORY, NO_TIME, REFUSED
from prefetch.engine.profiling.operations import DENSE, GROUPED, LOOP, PRODUCT
from prefetch.engine.profiling.told import Told, layers_per_copy, of_headline, skewed
from prefetch.engine.profiling.whose import spread_of
from prefetch.engine.profiling.work import BACKWARD, FORWARD, LAYER, ROUTER


def headline(told: Told, machine: Measured) -> dict[str, float]:
    rows = told.rows
    metrics: dict[str, float] = {"rows": len(rows.table), "rows_ran": len(rows.ran)}
    for name, status in (("memory", NO_MEMORY), ("time", NO_TIME), ("refused", REFUSED)):
        metrics[f"rows_left_out/{name}"] = int(rows.table.status.str.startswith(status).sum())
    metrics["spread"] = float(rows.spread.median())
    for part in (ROUTER, LAYER):
        for tokens in rows.ends:
            if (one := rows.one(part, tokens)) is not None:
                metrics[f"{part}_us/{tokens}"] = float(one.median_ns) / 1e3
                metrics[f"{part}_of_bound/{tokens}"] = float(one.of_bound)
                metrics[f"{part}_peak_bytes/{tokens}"] = int(one.peak_bytes)
    for name in (LOOP, GROUPED, DENSE, PRODUCT):
        metrics[f"{name}_times_ours"] = _median(rows.of(LAYER, name, FORWARD))
    for name in (GROUPED, DENSE):
        metrics[f"{name}_backward_times_loop"] = _median(rows.of(LAYER, name, BACKWARD))
    pairs = skewed(rows)
    metrics["zipf_times_uniform"] = float(pairs.ratio.median()) if len(pairs) else math.nan
    for _, row in of_headline(told).iterrows():
        metrics[f"most_tokens/{row.implementation}"] = int(row.most_tokens)
    metrics |= _of_machine(machine)
    metrics["copy_ns"] = told.copy.ns(told.expert_bytes)
    metrics["layers_per_copy"] = layers_per_copy(told)
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _of_machine(machine: Measured) -> dict[str, float]:
    link = machine.fields["link"]
    found: dict[str, float] = {
        "read_gb_per_s": machine.roofs.read_bytes_per_s / 1e9,
        "copy_latency_us": link["latency_ns"] / 1e3,
        "copy_gb_per_s": link["pinned"]["bytes_per_s"][-1][1] / 1e9,
        "threads": int(machine.machine["threads"]),
    }
    spread = spread_of(machine.copies)
    found |= {} if spread is None else {"copy_spread": spread}
    return found | {
        f"tflop_per_s/{dtype}": rate / 1e12 for dtype, rate in machine.roofs.flops_per_s.items()
    }


def _median(rows: pd.DataFrame) -> float:
    return float(rows.times_reference.astype(float).median()) if len(rows) else math.nan
