"""Folders of runs that nobody ran: what stages leave, drawn by a seed, with names as hostile as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

SETTINGS: dict[str, Any] = {
    "predictor": {"_target_": "prefetch.predict.markov.Markov", "horizons": "${train.horizons}"},
    "policy": {"_target_": "prefetch.sim.policies.lru.Lru"},
    "source": {
        "_target_": "prefetch.sources.synthetic.Synthetic",
        "n_layers": 4,
        "seed": "${seed}",
    },
    "tracker": {"_target_": "prefetch.tracking.NoTracker"},
    "train": {"horizons": [1, 4], "baselines": "fast", "figures": True},
    "simulator": {"cache": 0.25, "clock": "simulated", "horizon": 4},
    "memory": None,
    "store": "artifacts",
}
CELLS = 48  # of the sweep on the page that tests open
CHOICES = {
    "predictor": "markov",
    "policy": "lru",
    "source": "synthetic",
    "hardware": "rtx4090_pcie4",
}
HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\"'`|\\ a|b", "{{data}} ${x} %{y}",
    "\u202eevil \u00e9\u4e2d\U0001f642 \u2028 end", "<!--<script>", "&lt;b&gt; &amp;", "=1+1", "--",
    "[x](javascript:alert(1))",
)  # fmt: skip


@dataclass
class Told:
    """One run to write."""

    stage: str = "evaluate"
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted name -> value
    choices: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()  # overrides beside the stage and the seed
    metrics: Mapping[str, float] | None = None  # None = drawn
    state: str = "finished"
    error: str | None = None
    log: str = ""
    pages: Mapping[str, str] = field(default_factory=dict)
    has_tables: bool = True
    has_standing: bool = True  # run.json; older versions wrote none
    began: str = "2026-01-02T03:04:05+00:00"


def write_run(folder: Path, told: Told) -> Path:
    """The folder, as a stage would have left it."""
    (folder / ".hydra").mkdir(parents=True)
    config = json.loads(json.dumps(SETTINGS)) | {"stage": {"name": told.stage}, "seed": told.seed}
    for name, value in told.settings.items():
        *above, last = name.split(".")
        node = config
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    words = [f"stage={told.stage}", f"seed={told.seed}", *told.words]
    _yaml(folder, "config", config)
    _yaml(folder, "overrides", words)
    _yaml(
        folder,
        "hydra",
        {"hydra": {"runtime": {"cwd": "/home/u", "choices": {**CHOICES, **told.choices}}}},
    )
    if told.has_standing:
        standing = {
            "stage": told.stage,
            "state": told.state,
            "error": told.error,
            "began": told.began,
            "seconds": 1.5,
        }
        _json(folder / "run.json", standing)
    if told.error is not None:
        (folder / "error.txt").write_text(told.error + "\n")
    (folder / "run.log").write_text(told.log)
    for name, text in told.pages.items():
        (folder / name).write_text(text)
    if told.state == "finished":
        _results(folder, told)
    return folder


def _results(folder: Path, told: Told) -> None:
    rng = np.random.default_rng([told.seed, len(str(sorted(told.settings.items(), key=str)))])
    cache = float(told.settings.get("simulator.cache", 0.25))
    predictor = told.choices.get("predictor", "markov")
    hit = cache**0.4 + 0.02 * rng.standard_normal()
    times = {"tpot_ms": 10 - 6 * hit, "slowdown": 4 - 3 * hit}
    drawn = {
        "evaluate": {"hit_rate": hit, **times, "memory_savings": 1 - cache},
        "train": {"recall_at_k": hit, "recall_at_k_h4": 0.9 * hit},
    }
    metrics = drawn.get(told.stage, {"tokens": 384}) if told.metrics is None else told.metrics
    _json(folder / "metrics.json", dict(metrics))
    _json(
        folder / "lineage.json",
        {"trace/0123456789abcdef": {"kind": "trace", "upstream": {"model": "fedc"}}},
    )
    if not told.has_tables:
        return
    mark = "cheats" if predictor == "oracle" else ""
    if told.stage == "evaluate":
        ways = [("chosen", "lru", predictor, mark, hit), ("optimum", "belady", "none", "cheats", 1.1 * hit),
                ("host compute", "static", "none", "", 0.8 * hit)]  # fmt: skip
        rows = [
            _cell(way, policy, name, sign, share, cache) for way, policy, name, sign, share in ways
        ]
        _table(folder, "results", rows)
        needed = [{"bandwidth_factor": factor, "recall": recall / 10, "tpot_ms": (9 - recall / 2) / factor,
                   "no_prefetch_tpot_ms": 6 / factor, "policy": "lru", "capacity": str(cache)}
                  for factor in (0.5, 1.0) for recall in range(11)]  # fmt: skip
        _table(folder, "required_recall", needed)
    if told.stage == "train":
        rows = [{"predictor": predictor, "mark": mark, "horizon": h, "rows": "new_text", "recall_at_k": hit / h**0.1,
                 "low": hit / h**0.1 - 0.01, "high": hit / h**0.1 + 0.01} for h in (1, 4)]  # fmt: skip
        _table(folder, "predictors", rows)
        named = {"predictor": predictor, "rows": "new_text"}
        layers = [{**named, "horizon": h, "layer": layer, "recall_at_k": hit - layer / 99}
                  for h in (1, 4) for layer in range(4)]  # fmt: skip
        _table(folder, "by_layer", layers)


def _cell(
    way: str, policy: str, predictor: str, mark: str, hit: float, cache: float
) -> dict[str, Any]:
    return {
        "way": way, "policy": policy, "predictor": predictor, "mark": mark, "capacity": str(cache), "horizon": 4,
        "misses": "wait", "hit_rate": hit, "hit_rate_low": hit - 0.01, "hit_rate_high": hit + 0.01,
        "tpot_ms": 10 - 6 * hit, "tpot_ms_low": 9.9 - 6 * hit, "tpot_ms_high": 10.1 - 6 * hit,
        "interval_over": "requests", "slowdown": 4 - 3 * hit, "memory_savings": 1 - cache,
    }  # fmt: skip


def hostile(name: str) -> Told:
    """A run that says this wherever a user may say something."""
    return Told(
        stage="train", choices={"predictor": name}, settings={"source.path": name, "train.baselines": name},
        words=(f"source.path={name}",), metrics={"recall_at_k": 0.5, name: 1.0}, log=f"WARNING {name}\n{name}",
        pages={"summary.md": f"# {name}\n\n{name}\n\n| a | b |\n|---|---|\n| {name} | 2 |\n"},
    )  # fmt: skip


def sweep(folder: Path, n: int) -> Path:
    """A sweep of so many cells: predictors x caches x seeds, a few of them failed."""
    names = ("markov", "popularity", "mlp", "oracle")
    for i in range(n):
        cache, name = (1 + i // 4 % 10) / 10, names[i % 4]
        failed = i % 97 == 96
        write_run(
            folder / str(i),
            Told(
                stage="train" if i % 3 == 2 else "evaluate", seed=i // 40, choices={"predictor": name},
                settings={"simulator.cache": cache}, words=(f"predictor={name}", f"simulator.cache={cache}"),
                state="failed" if failed else "finished", error="ConfigError: no such file" if failed else None,
                began=f"2026-01-{1 + i // 900:02}T{i // 60 % 24:02}:{i % 60:02}:00+00:00",
            ),
        )  # fmt: skip
    return folder


def _table(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / f"{name}.csv", index=False)


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _yaml(folder: Path, name: str, content: Any) -> None:
    (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
