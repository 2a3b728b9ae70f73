"""The stage as a whole: rows, headline, laws between rows, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError
from prefetch.runs.outputs import Outputs
from prefetch.sim.evaluate import run
from prefetch.sim.tables.bench import Bench
from prefetch.trace.card import plain_card
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import trace_of
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker

PROMISED = {
    "hit_rate", "late_hit_rate", "stall_fraction", "tpot_ms", "speedup_over_static_split", "memory_savings",
    "memory_savings_at_5pct", "memory_savings_at_25pct", "bytes_per_token", "wasted_prefetch_bytes_per_token",
    "link_utilisation", "gap_closed", "capacity_token_cycles", "break_even_recall",
}  # fmt: skip
SMALL = (
    "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=20", "source.n_layers=4",
    "source.n_experts=8", "source.top_k=2", "simulator.model_card=mixtral_8x7b", "train.horizons=[1,2]",
    "simulator.horizon=2", "simulator.cache=0.5", "evaluate.figures=false", "evaluate.required_recall=false",
)  # fmt: skip


def configured(tmp_path: Path, *words: str) -> Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        overrides = ["stage=evaluate", f"store={tmp_path / 'store'}", *SMALL, *words]
        cfg = cast(Config, compose("config", overrides=overrides))
    config.check_values(cfg)
    return cfg


def bench_of(tmp_path: Path, *words: str) -> Bench:
    cfg = configured(tmp_path, *words)
    return Bench(cfg, Store(cfg.store, makers=cfg.makers))


def evaluated(tmp_path: Path, *words: str) -> tuple[dict[str, float], pd.DataFrame, str]:
    cfg = configured(tmp_path, *words)
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    metrics = run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(folder, NoTracker()))
    return metrics, pd.read_parquet(folder / "results.parquet"), (folder / "summary.md").read_text()


def test_every_number_that_is_promised_and_the_rows_beside(tmp_path):
    words = ("predictor=markov", "evaluate.required_recall=true")
    metrics, table, summary = evaluated(tmp_path, *words)
    assert set(metrics) >= PROMISED
    ways = set(table.way)
    assert ways >= {
        "chosen", "no prefetch", "optimum", "oracle prefetch", "static split by layer", "host compute",
        "host compute and uploads",
    }  # fmt: skip
    one = table[table.way != "curve"].set_index("way")
    assert one.hit_rate["optimum"] >= one.hit_rate["lru"] == one.hit_rate["no prefetch"]
    assert one.hit_rate["static split by layer"] == pytest.approx(0.5, abs=0.15)
    assert (table.slowdown >= 1 - 1e-9).all()
    assert (table[table.way == "curve"].memory_savings.diff().dropna() < 0).all()
    assert (table.hit_rate_low.dropna() <= table.hit_rate[table.hit_rate_low.notna()]).all()
    assert "no bound" in summary and "the routing is synthetic" in summary
    needed = pd.read_parquet(tmp_path / "run0" / "required_recall.parquet")
    assert len(needed) == 3 * 11 and (tmp_path / "run0" / "required_recall.csv").exists()
    assert set(needed) >= {
        "bandwidth_factor", "recall", "tpot_ms", "no_prefetch_tpot_ms", "break_even_recall", "steps", "of_steps",
    }  # fmt: skip
    this = needed[needed.bandwidth_factor == 1]
    assert metrics["break_even_recall"] == this.break_even_recall.iloc[0]
    assert f"from a recall of {metrics['break_even_recall']:.2f} on" in summary
    assert this.no_prefetch_tpot_ms.iloc[0] == one.tpot_ms["no prefetch"]
    assert this[this.recall == 1].tpot_ms.item() <= this.no_prefetch_tpot_ms.iloc[0]
    assert (
        needed.groupby("bandwidth_factor").no_prefetch_tpot_ms.first().diff().dropna() < 0
    ).all()


def test_a_grid_has_a_row_per_cell_and_the_same_numbers_twice(tmp_path):
    words = (
        "evaluate.policies=[lru,lfu]", "evaluate.predictors=[none,popularity]", "evaluate.capacities=[0.25,4]",
        "evaluate.horizons=[1,2]",
    )  # fmt: skip
    metrics, first, _ = evaluated(
        tmp_path, *words, "predictor=popularity", "policy=lfu", "simulator.cache=4"
    )
    root = first[
        (first.policy == "lfu") & (first.predictor == "popularity") & (first.capacity == "4")
    ]
    assert metrics["tpot_ms"] == root[(root.way == "chosen") & (root.horizon == 2)].tpot_ms.item()
    _, again, _ = evaluated(
        tmp_path, *words, "predictor=popularity", "policy=lfu", "simulator.cache=4"
    )
    chosen = first[first.way == "chosen"]
    assert len(chosen) == 2 * 2 * (1 + 2)  # without guesses there is one horizon
    pd.testing.assert_frame_equal(first, again)


def test_two_policies_beside_a_predictor_and_prompts_alone(tmp_path):
    """Each policy has its own row without guesses; without generated tokens nothing is told per token."""
    metrics, table, _ = evaluated(tmp_path, "evaluate.policies=[lru,lfu]", "predictor=popularity")
    assert (table.way == "no prefetch").sum() == 2 and metrics["tpot_ms"] > 0
    prompts, table, _ = evaluated(tmp_path, "simulator.phase=prefill", "predictor=popularity")
    assert table.tpot_ms.isna().all() and "tpot_ms" not in prompts and prompts["ttft_ms"] > 0


def test_all_requests_without_predictors(tmp_path):
    """Nobody has guesses about all of them, and a choice by use has seen what is replayed."""
    metrics, table, _ = evaluated(tmp_path, "simulator.requests=all", "predictor=none")
    one = table[table.way != "curve"].set_index("way")
    assert "oracle prefetch" not in one.index and metrics["tpot_ms"] > 0
    assert one.mark["host compute"] == "cheats" and one.mark["static split by layer"] == ""


def test_guesses_that_are_true_leave_fewer_misses_than_none(tmp_path):
    _, table, _ = evaluated(tmp_path, "predictor=oracle", "simulator.batch=2")
    one = table[table.way != "curve"].set_index("way")
    assert one.demand_loads["chosen"] < one.demand_loads["no prefetch"]
    assert one.mark["chosen"] == "cheats"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simulator.model_card=null",), "does not say how large an expert is"),
        (("simulator.model_card=qwen3_30b_a3b",), "has 128 experts per layer"),
        (("simulator.semantics=sequential",), "expected one of atomic, overshoot"),
        (("simulator.requests=all", "predictor=markov"), "predictors are fitted on some of them"),
        (("evaluate.policies=[mru]",), "there are arc, belady"),
        (("evaluate.predictors=[crystal_ball]",), "predictor 'crystal_ball': does not exist"),
        (("memory=3GiB",), "dense"),
        (("predictor=markov", "simulator.width=9"), "width"),
        (("simulator.width=0",), "simulator.width=0: must be at least 1"),
        (("evaluate.policies=[]",), r"evaluate.policies=\[\]: names nothing to evaluate"),
        (("evaluate.predictors=[]",), r"evaluate.predictors=\[\]: names nothing"),
        (("evaluate.capacities=[]",), r"evaluate.capacities=\[\]: names nothing"),
        (("evaluate.horizons=[]",), r"evaluate.horizons=\[\]: names nothing"),
        (("evaluate.horizons=[0]",), r"evaluate.horizons=\[0\]: each must be at least 1"),
        (("evaluate.workers=0",), "evaluate.workers=0: must be at least 1"),
        (("memory=20GiB", "evaluate.capacities=[0.5]"), "the memory leaves one capacity"),
        (("predictor=markov2", "simulator.threshold=0.5"), "no probabilities"),
        (("train.test_trace=elsewhere",), "guesses would be about that trace"),
        (("policy=static", "simulator.staging=0"), "no expert ever leaves a cache here"),
        (("simulator.pinned=4", "simulator.staging=0"), "no expert ever leaves a cache here"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(tmp_path, "predictor=popularity", *words)


@pytest.mark.parametrize(
    "word",
    [
        "simulator.cache=quarter", "evaluate.capacities=[0.5,12apples]", "memory=12GX", "simulator.host_cache=x",
        "simulator.scope=everywhere", "simulator.misses=x", "simulator.model_card=qwen4",
    ],
)  # fmt: skip
def test_what_is_misspelt_is_said_before_a_trace_is_made(tmp_path, word):
    with pytest.raises(ConfigError, match=word.split("=")[1].strip("[]").split(",")[-1]):
        evaluated(tmp_path, word)
    assert not Store(tmp_path / "store").sealed("trace")


def test_guesses_with_negative_scores_are_copied(tmp_path):
    """`markov2` scores in logits, all below 0: every one of its guesses was dropped at threshold 0."""
    _, table, _ = evaluated(tmp_path, "predictor=markov2")
    copied = table.set_index("way").prefetch_loads
    assert copied["chosen"] > 0 and copied["no prefetch"] == 0


def test_copies_of_what_is_replayed_are_no_other_requests(tmp_path):
    """What is fitted on "other" requests must not have seen a test request's twin."""
    card = plain_card("twice", n_experts=8, top_k=2, layer_numbers=(0, 1, 2, 3))
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(8)[:2] for _ in range(10 * 12 * 4)]).reshape(-1, 4, 2)
    folder = tmp_path / "twins"
    folder.mkdir()
    writer = TraceWriter(folder, Provenance("real", "test"))
    writer.begin(card)
    request_T, position_T = np.repeat(np.arange(20), 12), np.tile(np.arange(12), 20)
    twins = trace_of(card, np.concatenate([ids, ids]), request_T=request_T, position_T=position_T)
    writer.append(twins)
    writer.close()
    bench = bench_of(tmp_path, f"trace={folder}")
    asked = {int(request) % 10 for request in bench.trace.request_T}
    others = {int(request) % 10 for request in bench.others.requests()}
    assert asked and others and not asked & others


def test_of_one_request_the_end_is_replayed_and_its_beginning_counted(tmp_path):
    """Nothing that was fitted on is replayed, and what is not replayed is there to be counted."""
    words = "source.n_requests=1", "source.new_tokens=94", "predictor=markov"
    bench = bench_of(tmp_path, *words)
    (others,) = bench.others.blocks()
    last, first = bench.trace.position_T, others.position_T
    assert len(last) == 30 and last.min() == 70 and first.tolist() == list(range(70))
    assert bench.prior.uses_LE.sum() == 70 * 4 * 2
    guesses, _ = bench.guesses("markov", 2)
    assert len(guesses.ids_VW) == 30 * 4


def test_steps_of_several_prompts_tell_no_time_to_the_first_token(tmp_path):
    """Whose prompt a shared step was is not known; percentiles and the mean are of the same thing."""
    metrics, table, _ = evaluated(tmp_path, "simulator.batch=3", "simulator.chunk=3")
    assert "ttft_ms" not in metrics and table.ttft_ms.isna().all()
    row = table[table.way == "chosen"].iloc[0]
    assert row.tpot_ms_p50 <= row.tpot_ms_p95 <= row.tpot_ms_p99
    assert row.tpot_ms_p50 < 2 * row.tpot_ms


def test_overshoot_by_events_larger_than_the_cache_has_no_bound(tmp_path):
    words = (
        "source.top_k=4",
        "simulator.cache=1",
        "simulator.semantics=overshoot",
        "simulator.phase=decode",
    )
    _, table, _ = evaluated(tmp_path, *words)
    assert table[(table.way == "chosen")].tpot_bound_ms.isna().all()
    _, table, _ = evaluated(tmp_path, *words[:2], "simulator.phase=decode")
    bounded = table[table.tpot_bound_ms.notna()]
    assert len(bounded) and (bounded.tpot_ms >= bounded.tpot_bound_ms - 1e-9).all()
