"""An advice holds at its limits, never asks for more memory to be slower, and says what it stands on."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from prefetch import config
from prefetch.artifacts import Store
from prefetch.errors import ConfigError
from prefetch.runs.outputs import Outputs
from prefetch.sim import advise
from prefetch.sim.advising.at_hand import at_hand
from prefetch.sim.advising.cases import cases_of, predicted
from prefetch.sim.advising.page import page, placement_of
from prefetch.sim.advising.pays import slowest_that_pays
from prefetch.sim.advising.study import Study, study
from prefetch.sim.advising.ways import AHEAD, KINDS, ON_HOST
from prefetch.sim.settings.placement import ALL, CACHE
from prefetch.tracking import NoTracker

# gpt-oss-20b: 24 layers, 4 of 32 experts of 12.6 MiB, on made-up routing of its shape
SHAPE = [
    "source=synthetic",
    "source.n_layers=24",
    "source.n_experts=32",
    "source.top_k=4",
    "source.n_requests=15",
]
SHAPE += [
    "source.prompt_tokens=4",
    "source.new_tokens=12",
    "simulator.model_card=gpt_oss_20b",
    "predictor=markov",
]
SHAPE += ["advise.policies=[lru,lfu]", "advise.horizons=[4]", "tracker=none"]
QUIET = "advise.figures=false"
FAST = "[[0,1000000000000000]]"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Traces, guesses and rows are made once."""
    return tmp_path_factory.mktemp("advise") / "store"


def composed(store: Path, *words: str) -> config.Config:
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["stage=advise", f"store={store}", *words])
    config.check_values(cfg)
    return cfg


def configured(store: Path, *words: str) -> config.Config:
    return composed(store, *SHAPE, *words)


def studied(store: Path, *words: str) -> Study:
    cfg = configured(store, *words)
    return study(cfg, Store(cfg.store, makers=cfg.makers))


def advised(store: Path, folder: Path, *words: str) -> tuple[dict[str, float], str]:
    cfg = configured(store, *words)
    folder.mkdir()
    outputs = Outputs(folder, NoTracker())
    metrics = advise.run(cfg, Store(cfg.store, makers=cfg.makers), outputs)
    return metrics, (folder / "advice.md").read_text()


def test_the_page_the_numbers_and_the_tables(store, tmp_path):
    metrics, text = advised(store, tmp_path / "run", "memory=8GiB")
    promised = {"tpot_ms", "tokens_per_s", "slots", "prefetch_pays", "best"}
    assert (
        promised <= set(metrics)
        and metrics["tpot_ms_low"] < metrics["tpot_ms"] < metrics["tpot_ms_high"]
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    ways = pd.read_csv(tmp_path / "run" / "ways.csv")
    assert ways.tpot_ms.is_monotonic_increasing and ways.way[0] == KINDS[int(metrics["best"])]
    assert ways.tpot_ms[0] == metrics["tpot_ms"] and ways.slots[0] == metrics["slots"]
    assert {*KINDS} - {*ways.way} == {ALL}  # every other way can run here
    experts = pd.read_csv(tmp_path / "run" / "experts.csv")
    assert len(experts) == 24 * 32 and experts.on_gpu.sum() == metrics["slots"]
    assert f"{metrics['tpot_ms']:.2f} ms per token" in text and "## Does prefetch pay?" in text
    assert "llama-server" in text and "a real engine may take 10% less or 150% longer" in text
    assert "the routing is synthetic: no number here is about a model" in text
    assert (tmp_path / "run" / "tpot_by_memory.png").stat().st_size > 10_000


def test_the_same_command_gives_the_same_bytes(store, tmp_path):
    for name in ("one", "other"):
        advised(store, tmp_path / name, "memory=8GiB", QUIET)
    for file in ("advice.md", "ways.csv", "all_memories.csv", "experts.csv", "metrics.json"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("one", "other"))
        assert one == other, file


def test_with_room_for_everything_nothing_is_elsewhere(store):
    found = studied(store, "memory=23GiB")
    assert found.best.way == ALL and found.best.host_bytes == 0 and found.pays is None
    assert advise.headline(found)["prefetch_pays"] == 0
    assert found.best.tpot_ms == pytest.approx(found.bench.full_ns / 1e6)
    assert "Every expert is there" in page(found, "")


def test_too_little_memory_says_what_is_missing(store):
    with pytest.raises(ConfigError, match=r"memory=2GiB is less than .*shortfall \d+\.\d+ GiB"):
        studied(store, "memory=2GiB")


def test_an_endlessly_slow_link_leaves_the_host_to_compute(store):
    slow = "hardware.link.pinned.bytes_per_s=[[0,1000000]]"
    found = studied(store, "memory=8GiB", slow)
    assert found.best.way in ON_HOST
    caches = found.here[found.here.way == CACHE]
    assert (caches.tpot_ms > 100 * found.best.tpot_ms).all()


def test_on_an_endlessly_fast_link_prefetch_does_not_matter(store):
    fast = [f"hardware.link.pinned.bytes_per_s={FAST}", "hardware.link.latency_ns=0"]
    found = studied(store, "memory=8GiB", *fast, "hardware.link.pinned.host_ns_per_copy=0")
    assert found.pays is not None and abs(found.pays.gain) < 0.01
    assert "**No, it does not matter**" in page(found, "")
    full_ms = found.bench.full_ns / 1e6
    assert found.here[found.here.way == CACHE].tpot_ms.min() < 1.05 * full_ms


def test_more_memory_is_never_slower(store):
    times = [
        float(studied(store, f"memory={gib}GiB").best.tpot_ms) for gib in (5, 6.5, 8, 11, 14.5, 20)
    ]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_a_faster_link_and_perfect_guesses_cost_nothing(store):
    slow, fast = (
        studied(store, "memory=8GiB", f"hardware.link.pinned.bytes_per_s=[[0,{rate}]]")
        for rate in (12_000_000_000, 48_000_000_000)
    )
    assert fast.best.tpot_ms <= 1.01 * slow.best.tpot_ms
    for found in (slow, fast):
        assert found.pays is not None and found.pays.perfect_ms <= 1.01 * found.pays.without_ms


def test_without_a_memory_it_is_that_of_the_cache(store):
    found = studied(store, "simulator.cache=0.5")
    assert found.bench.budget(found.memory).experts == 24 * 16


def test_a_host_that_cannot_hold_all_experts_reads_them_from_its_disk(store):
    found = studied(store, "memory=8GiB", "hardware.host.memory_bytes=9000000000")
    assert found.lacks_host and "lacks is read from the disk" in page(found, "")
    assert (found.here[found.here.way == CACHE].disk_bytes_per_token > 0).all()
    plenty = studied(store, "memory=8GiB")
    assert found.best.tpot_ms > plenty.best.tpot_ms and not plenty.lacks_host


def test_the_order_is_tried_on_machines_that_differ(store):
    found = studied(store, "memory=8GiB")
    assert len(found.swings) == 6 and all(way in KINDS for way, _ in found.swings.values())
    assert found.swings["GPU x 0.7"][1] >= found.swings["GPU x 1.3"][1]
    sure = studied(store, "memory=8GiB", "advise.swing=0")
    assert not sure.swings and sure.best.tpot_ms == found.best.tpot_ms


def test_other_precisions_have_other_numbers_of_experts(store):
    published = studied(store, "memory=8GiB")
    wider = studied(store, "memory=8GiB", "simulator.precision=bf16")
    assert wider.best.slots < 0.3 * published.best.slots  # 16 bits for 4.25
    assert "| mxfp4 |" in page(wider, "") and "Simulated: bf16" in page(wider, "")


def test_settings_are_about_the_best_way(store):
    found = studied(store, "memory=8GiB")
    placed = placement_of(found)
    assert sum(placed.room_G) == found.best.slots * placed.size_L[0]
    assert placed.uses_LE is not None and placed.uses_LE.sum() > 0


@pytest.mark.parametrize(
    ("gains", "pays_from"),
    [
        ((-0.5, -0.2, 0.0, 0.05), (0.5, 2.0)),  # between the last two
        ((0.1, 0.1, 0.1, 0.1), (0.25, 0.25)),
        ((-0.5, -0.1, -0.1, 0.005), None),
    ],
)
def test_the_slowest_link_that_pays(gains, pays_from):
    factors = (0.25, 0.5, 1.0, 2.0)
    by_link = {
        factor: (100.0, 100.0 * (1 - gain)) for factor, gain in zip(factors, gains, strict=True)
    }
    found = slowest_that_pays(by_link)
    if pays_from is None:
        assert math.isnan(found)
    else:
        assert pays_from[0] <= found <= pays_from[1]


def test_routing_that_stands_for_a_model_is_the_nearest_real_one(tmp_path):
    """Its own shape, or a larger one's first layers and choices; else made-up, and never a trimmed or made-up one."""
    store = tmp_path / "store"

    def taken(experts: int) -> config.Config:
        cfg = composed(store, "simulator.model_card=gpt_oss_20b", f"source.experts={experts}")
        hand = at_hand(cfg, Store(cfg.store, makers=cfg.makers))
        assert hand.words or experts == 32
        return hand.cfg

    assert taken(32).source._target_.endswith("TinyMoE")  # it may be meant
    assert taken(16).source.process == "chain" and taken(16).source.n_layers == 24
    for name, n_layers, top_k in (("deep", 30, 4), ("wide", 24, 6), ("flat", 4, 4)):
        _real_trace(store, name, n_layers, top_k)
    found = taken(16)
    assert found.source._target_.endswith("Trimmed") and "deep" in found.source.path
    assert (found.source.n_layers, found.source.top_k) == (24, 4)
    _real_trace(store, "same", 24, 4)
    assert str(taken(16).trace).endswith("same")


def _real_trace(store: Path, name: str, n_layers: int, top_k: int) -> None:
    """What looks like a sealed trace of a real model in this store."""
    from prefetch.trace.card import plain_card
    from prefetch.trace.provenance import Provenance
    from prefetch.trace.routing import trace_of
    from prefetch.trace.writer import TraceWriter

    folder = store / "trace" / name
    folder.mkdir(parents=True)
    card = plain_card(name, n_experts=32, top_k=top_k, layer_numbers=tuple(range(n_layers)))
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((8, n_layers, 32)), axis=2)[..., :top_k]
    writer = TraceWriter(folder, Provenance("real", "arrays"))
    writer.begin(card)
    writer.append(trace_of(card, ids, request_T=np.repeat([0, 1], 4)))
    writer.close()
    (folder / "manifest.json").write_text("{}")


def test_a_made_up_walk_where_no_chain_can_be(tmp_path):
    cfg = composed(tmp_path, "simulator.model_card=deepseek_v2_lite")
    hand = at_hand(cfg, Store(cfg.store, makers=cfg.makers))
    assert hand.cfg.source.process == "sticky" and "walk of repeating tokens" in hand.words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory=8GiB", "simulator.misses=host"], "tries every way by itself"),
        (["memory=8GiB", "advise.policies=[nobody]"], "nobody"),
        (["memory=100GiB"], "rtx4090_pcie4 has 23.99 GiB; memory=24564MiB is all of it"),
        (["memory=8GiB", "simulator.requests=all"], "counts on some requests"),
        (
            ["memory=8GiB", "simulator.phase=prefill"],
            "no step of the replayed requests makes a token",
        ),
        (["memory=8GiB", "advise.predictors=[]"], "names nobody"),
        (["memory=8GiB", "simulator.precision=int3"], "no precision 'int3'"),
    ],
)
def test_a_mistake_is_one_clear_line(store, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        advised(store, tmp_path / "run", *words)


@pytest.mark.parametrize(
    "word", ["memory=8GX", "advise.policies=[nobody]", "advise.predictors=[x]"]
)
def test_what_is_misspelt_is_said_before_a_trace_is_made(tmp_path, word):
    cfg, store = composed(tmp_path, word), Store(tmp_path / "store")
    with pytest.raises(ConfigError):
        advise.run(cfg, store, Outputs(tmp_path / "run", NoTracker()))
    assert not store.sealed("trace")


def test_what_a_study_is_told_of_an_uncalibrated_machine(store):
    found = studied(store, "memory=8GiB")
    assert found.error == (0.1, 1.5) and found.bench.hardware.measured_error is None
    told = "hardware.measured_error=0.05", "+hardware.sources.measured_error=here"
    sure = studied(store, "memory=8GiB", *told)
    assert sure.error == (0.05, 0.05) and "simulated steps were 5.0% off" in page(sure, "")
    assert advise.headline(sure)["tpot_ms_high"] < advise.headline(found)["tpot_ms_high"]


CASE = {
    "name": "a host and no cache, then a cache of half",
    "settings": [*SHAPE[:-2], "hardware=rtx3090_pcie4", "policy=static", "simulator.misses=host"],
    "before": ["simulator.cache=0", "predictor=none"],
    "after": ["simulator.cache=0.5", "predictor=none"],
}


def test_a_case_predicts_what_a_change_brings(store):
    """The host is fitted to what was measured before, and only the change is predicted."""
    cfg = composed(store, "tracker=none")
    (case,) = cases_of([{**CASE, "before_tokens_per_s": 20}])
    (row,) = predicted(cfg, Store(cfg.store, makers=cfg.makers), [case]).to_dict("records")
    assert row["before_tokens_per_s"] == pytest.approx(20, rel=1e-5) and row["host_was_fitted"]
    assert row["after_tokens_per_s"] > 30 and row["hit_rate_before"] == 0
    change = row["after_tokens_per_s"] / row["before_tokens_per_s"] - 1
    assert row["change_of_tokens_per_s"] == pytest.approx(change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"after": None}, "after is missing"),
        ({"afterwards": []}, "no afterwards"),
        ({"before_tokens_per_s": 1e9}, "no bandwidth of the host"),
        ({"before": ["simulator.cache=2.0"]}, "case a host and no cache.*at most 1.0"),
    ],
)
def test_a_case_that_cannot_be_run(store, change, said):
    told = {name: value for name, value in (CASE | change).items() if value is not None}
    cfg = composed(store, "tracker=none")
    with pytest.raises(ConfigError, match=said):
        predicted(cfg, Store(cfg.store, makers=cfg.makers), cases_of([told]))


@pytest.mark.parametrize(
    "told",
    [[], -0.5, "x", {"a": 1}, [3], [{**CASE, "after": "x"}], [{**CASE, "before_tokens_per_s": "20"}],
     [{**CASE, "before_tokens_per_s": 0}]],
)  # fmt: skip
def test_what_is_no_list_of_cases_is_refused_by_name(told):
    with pytest.raises(ConfigError, match=r"advise\.cases"):
        cases_of(told)


def test_the_published_cases_can_be_read():
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["experiment=published_ab"])
    assert len(cases_of(cfg.advise.cases)) == 6 and cfg.stage.name == "advise"


def test_the_published_cases_come_to_what_the_page_says(store, real_data, monkeypatch):
    monkeypatch.setenv("TRACES", str(real_data / "traces"))
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["experiment=published_ab", f"store={store}"])
    found = predicted(cfg, Store(cfg.store, makers=cfg.makers), cases_of(cfg.advise.cases))
    page_of = Path(config.CONFIGS).parent / "docs" / "published_ab.csv"
    told = pd.read_csv(page_of)
    assert found.case.tolist() == told.case.tolist()
    for name in ("before_tokens_per_s", "after_tokens_per_s", "change_of_tokens_per_s"):
        np.testing.assert_allclose(found[name], told[name], rtol=0.02, err_msg=name)


def test_when_guesses_win_the_page_and_the_settings_are_of_their_cell(store):
    """What the predictor takes of the memory is counted, and told."""
    slow = "hardware.host.bytes_per_s=2000000000", "hardware.device.fixed_ns_per_layer=1000000"
    found = studied(store, "memory=8GiB", "advise.predictors=[markov]", *slow)
    assert found.best.way == AHEAD
    placed = placement_of(found)
    assert sum(placed.room_G) == found.best.slots * placed.size_L[0]
    text = page(found, "")
    assert "| the predictor |" in text and f"| {int(found.best.slots)} of 768 experts |" in text
    assert found.pays is not None and 0 < found.pays.recall <= 1


def test_who_cheats_is_never_the_advice(store):
    found = studied(store, "memory=8GiB", "advise.predictors=[oracle]")
    assert found.best.way != AHEAD and found.pays is None
    assert "they cheat" in page(found, "")


def test_of_one_request_the_beginning_is_counted_and_the_end_is_timed(store):
    found = studied(store, "memory=8GiB", "source.n_requests=1", "source.new_tokens=60")
    assert found.bench.prior.uses_LE.sum(axis=1).tolist() == [4 * (64 - 20)] * 24
    assert found.bench.work.n_steps == 20
    text = page(found, "")
    assert "the end of requests on whose beginning" in text and "none, there is one request" in text


def test_several_requests_at_once_are_said(store):
    found = studied(store, "memory=8GiB", "simulator.batch=3")
    assert "a request waits for the whole step" in page(found, "")
