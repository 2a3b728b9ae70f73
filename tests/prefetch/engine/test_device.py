"""Cells on a real device: this CPU. Copies are real, decisions are the simulator's, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from small_card import CARD

from prefetch import config, leaves
from prefetch.artifacts import Recipe, Store
from prefetch.config import Config
from prefetch.engine import validate
from prefetch.engine.backend import COMPUTE, COPY, EngineError
from prefetch.engine.clock import DeviceClock
from prefetch.engine.cpu import CpuBackend
from prefetch.engine.cuda import Spans
from prefetch.engine.kernel_body import KernelBody
from prefetch.engine.profiling.device import facts, place_of
from prefetch.engine.replay import need_runnable
from prefetch.engine.validating.calibrated import seal_error
from prefetch.engine.validating.compare import headline, pairs_in_order
from prefetch.engine.weights import layout_of
from prefetch.errors import ConfigError
from prefetch.kernels.experts import moe_torch
from prefetch.kernels.layout import ExpertLayout
from prefetch.runs.outputs import Outputs
from prefetch.sim import evaluate
from prefetch.sim.chosen import hardware_of
from prefetch.sim.tables.bench import Bench
from prefetch.sim.tables.grid import cell_of
from prefetch.sim.tables.resumed import Resumed
from prefetch.trace.card import plain_card
from prefetch.tracking import NoTracker
from tests.prefetch.sim.test_costs import machine

SMALL = (
    "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=10", "source.n_layers=4",
    "source.n_experts=8", "source.top_k=2", "simulator.cache=0.5", "evaluate.figures=false", "predictor=markov",
    "train.horizons=[1,2]", "simulator.horizon=2", "simulator.device=cpu",
)  # fmt: skip


def configured(tmp_path: Path, *words: str) -> Config:
    (tmp_path / "small.yaml").write_text(CARD)
    shared = (f"store={tmp_path / 'store'}", f"simulator.model_card={tmp_path / 'small.yaml'}")
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = cast(Config, compose("config", overrides=[*SMALL, *shared, *words]))
    config.check_values(cfg)
    return cfg


def ran(stage: Any, tmp_path: Path, *words: str) -> tuple[dict[str, float], Path]:
    cfg = configured(tmp_path, *words)
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    outputs = Outputs(folder, NoTracker())
    return stage.run(cfg, Store(cfg.store, makers=cfg.makers), outputs), folder


def test_a_table_on_the_device_has_the_simulators_hits_and_bytes(tmp_path):
    words = ("stage=evaluate", "evaluate.policies=[lru,static]", "simulator.rounds=2")
    simulated, there = ran(evaluate, tmp_path, *words)
    measured, here = ran(evaluate, tmp_path, *words, "simulator.clock=device")
    one, other = (pd.read_parquet(folder / "results.parquet") for folder in (there, here))
    alone = (one.predictor == "none") & (other.tpot_ms.notna())
    assert alone.sum() >= 4
    for name in ("hit_rate", "bytes_per_token", "demand_loads", "memory_savings"):
        assert one[name][alone].tolist() == other[name][alone].tolist(), name
    assert measured["memory_savings"] == simulated["memory_savings"]
    assert measured["tpot_ms"] > 0 and "tpot_bound_ms" not in measured
    assert other.mark[one.misses != "wait"].str.contains("misses computed on the host").all()
    summary = (here / "summary.md").read_text()
    assert "CPU" in summary.splitlines()[0] and "measured, drawn weights" in summary
    assert "simulated" not in summary.splitlines()[0]


def test_validation_finds_the_same_decisions_and_states_its_errors(tmp_path):
    words = (
        "stage=validate",
        "validate.batches=[1,3]",
        "validate.steps=20",
        "validate.figures=true",
    )
    card = f"validate.model_cards=[{tmp_path / 'small.yaml'}]"
    metrics, folder = ran(validate, tmp_path, *words, card, "validate.capacities=[0.25,3]")
    promised = {
        "hits_equal", "bytes_equal", "median_abs_error", "worst_abs_error", "rank_correlation", "engine_spread",
    }  # fmt: skip
    assert promised <= set(metrics) and metrics["hits_equal"] == metrics["bytes_equal"] == 1
    table = pd.read_parquet(folder / "cells.parquet")
    assert len(table) == 2 * 2 * 3 * 2 == metrics["cells"]
    errors = table.predicted_ms / table.measured_ms - 1
    assert metrics["median_abs_error"] == pytest.approx(float(errors.abs().median()))
    assert metrics["worst_abs_error"] == pytest.approx(float(errors.abs().max()))
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert predictions.predicted_ms.tolist() == table.predicted_ms.tolist()
    assert (folder / "predictions.csv").stat().st_mtime <= (folder / "cells.csv").stat().st_mtime
    text = (folder / "validation.md").read_text()
    assert "equal in every cell, access by access" in text and "not judged" in text
    assert f"{metrics['median_abs_error']:.1%}" in text and text.count("| small |") == len(table)
    assert (folder / "predicted_and_measured.png").stat().st_size > 10_000


def test_a_measured_machine_carries_the_error_of_what_is_simulated_on_it(tmp_path, caplog):
    """As on a GPU: validated with its file, sealed again, and told by every evaluation from then on."""
    fields = json.loads(
        json.dumps(machine().to_dict() | {"kind": "measured", "measured_error": None})
    )
    del fields["is_measured"]
    here = facts(place_of("cpu"))

    def build(folder: Path, _: Any) -> None:
        (folder / "hardware.json").write_text(json.dumps(fields))
        (folder / "machine.json").write_text(json.dumps(here))
        (folder / "copies.csv").write_text("")

    store = Store(tmp_path / "store", makers=configured(tmp_path).makers)
    store.make(Recipe(kind="hardware", version=1, config={}, build=build))
    words = ("stage=validate", "hardware=measured", "validate.steps=10", "validate.figures=false")
    small = f"validate.model_cards=[{tmp_path / 'small.yaml'}]"
    metrics, folder = ran(validate, tmp_path, *words, small, "validate.batches=[1]")
    table = pd.read_parquet(folder / "cells.parquet")
    off = float((table.file_ms / table.measured_ms - 1).abs().median())
    assert metrics["file_median_abs_error"] == pytest.approx(off)
    assert f"is {off:.1%} off in the median" in (folder / "validation.md").read_text()
    assert hardware_of(configured(tmp_path, "hardware=measured"), store).kind == "measured"
    other, of = here | {"device": "NVIDIA H200", "device_kind": "gpu"}, "stage=validate: 12 cells"
    assert seal_error(store, 0.5, of, other) is None  # the error is of another device
    assert "its device is " in caplog.text and "here 'NVIDIA H200'" in caplog.text
    assert "profile.device=cuda" in caplog.text
    assert hardware_of(configured(tmp_path, "hardware=measured"), store).kind == "measured"
    assert seal_error(store, 0.021, of, here) is not None
    found = hardware_of(configured(tmp_path, "hardware=measured"), store)
    assert (found.kind, found.measured_error) == ("calibrated", 0.021)
    _, told = ran(evaluate, tmp_path, "stage=evaluate", "hardware=measured")
    assert "calibrated: 2.1% off measured times" in (told / "summary.md").read_text()


def test_errors_and_orders_from_paper():
    rows = [
        {"model_card": "m", "batch": 1, "capacity": "1", "horizon": 0, "predicted_ms": p,
         "measured_ms": m, "error": p / m - 1,
         "hits_equal": True, "bytes_equal": i != 2, "engine_spread": 0.01, "free_hit_difference": 0.0,
         "predicted_stall": 0.2, "measured_stall": 0.25, "file_ms": np.nan,
         "roofline_ms": 0.5 * m, "constants_ms": 2 * m}
        for i, (p, m) in enumerate([(1.1, 1.0), (2.0, 2.0), (1.9, 4.0), (4.1, 4.1)])
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert pairs_in_order(table) == 4 / 5  # 2.0 < 4.0 is wrong; 4.0 and 4.1 are not apart
    metrics = headline(table)
    assert metrics["worst_abs_error"] == pytest.approx(1 - 1.9 / 4.0)
    assert metrics["median_abs_error"] == pytest.approx((0.1 + 0) / 2)
    assert (metrics["hits_equal"], metrics["bytes_equal"]) == (1, 0)
    assert (
        metrics["roofline_median_abs_error"] == 0.5 and metrics["constants_median_abs_error"] == 1
    )
    assert metrics["stall_error"] == pytest.approx(
        np.median([abs(0.8 * p - 1) for p in (1.1, 1, 0.475, 1)])
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simulator.clock=device", "simulator.misses=host"), "misses computed on the host"),
        (
            ("simulator.clock=device", "simulator.semantics=overshoot"),
            "cannot hold more than it has",
        ),
        (
            ("simulator.clock=device", "simulator.host_cache=0.5"),
            "host memory, which must hold all",
        ),
        (("simulator.clock=gpu",), "expected one of simulated, device"),
        (("simulator.clock=device", "simulator.device=tpu"), "expected auto, cpu, cuda or cuda:N"),
        (
            ("simulator.clock=device", "simulator.precision=mxfp4"),
            "the engine computes bf16, fp16, fp32",
        ),
    ],
)
def test_what_no_device_runs_is_said(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        ran(evaluate, tmp_path, "stage=evaluate", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="torch finds no CUDA device here"):
        ran(evaluate, tmp_path, "stage=evaluate", "simulator.clock=device", "simulator.device=cuda")


def test_own_is_a_card_and_a_datasheet_enters_nothing(tmp_path):
    """`own` is the trace's, whatever card is lent elsewhere; where the trace knows none, cards by name still run."""
    few = ("stage=validate", "validate.capacities=[0.5]", "validate.policies=[lru]", "validate.horizons=[0]",
           "validate.batches=[1]", "validate.steps=10", "validate.figures=false")  # fmt: skip
    small = str(tmp_path / "small.yaml")
    with pytest.raises(ConfigError, match="does not say how large an expert is"):
        ran(validate, tmp_path, *few, "validate.model_cards=[own]")
    _, folder = ran(
        validate, tmp_path, *few, f"validate.model_cards=[{small}]", "simulator.model_card=null"
    )
    page = (folder / "validation.md").read_text()
    assert "is a datasheet: no number of it enters here" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("validate.repeats=1",), "needs at least 2"),
        (("validate.horizons=[-1]",), "must be at least 0"),
        (("validate.policies=[]",), "names nothing"),
        (("validate.recall=2",), "from 0 to 1"),
        (("simulator.clock=device",), "leave it out"),
    ],
)
def test_validations_that_cannot_be(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        ran(validate, tmp_path, "stage=validate", *words)


def test_a_table_stands_where_not_all_experts_fit(tmp_path, monkeypatch):
    """34 slots of 6 KiB are too many, 30 are not: what offloading is for, and there is no slowdown to tell."""
    monkeypatch.setattr("prefetch.engine.weights._free_bytes", lambda: 250_000)
    words = ("stage=evaluate", "simulator.clock=device", "simulator.rounds=1")
    metrics, folder = ran(evaluate, tmp_path, *words)
    assert metrics["tpot_ms"] > 0 and "slowdown" not in metrics
    assert "all resident not measured" in (folder / "summary.md").read_text()
    with pytest.raises(ConfigError, match=r"a pool of 34 slots is .* free"):
        ran(evaluate, tmp_path, *words, "simulator.cache=1.0")
    few, _ = ran(validate, tmp_path, "stage=validate", "validate.capacities=[0.25,1.0]", "validate.steps=10",
                 "validate.batches=[1]", f"validate.model_cards=[{tmp_path / 'small.yaml'}]")  # fmt: skip
    assert few["cells"] == 3 * 2  # the larger cache was left out


def test_an_interrupted_table_goes_on_where_it_was(tmp_path, monkeypatch, caplog):
    """Three cells are measured, Ctrl-C; the others later. Then nothing of a clock is kept."""
    words = ("stage=evaluate", "simulator.clock=device", "simulator.rounds=2", "predictor=none")
    timed, stops_at, measured = DeviceClock.timed, [4], list[Any]()

    def counted(self: Any, cell: Any, work: Any) -> Any:
        if len(measured) + 1 == stops_at[0]:
            raise KeyboardInterrupt
        measured.append(timed(self, cell, work))
        return measured[-1]

    monkeypatch.setattr(DeviceClock, "timed", counted)
    with pytest.raises(KeyboardInterrupt):
        ran(evaluate, tmp_path, *words)
    cells, before, stops_at[0] = tmp_path / "store" / "cells", [*measured], 10**6
    assert len(list(cells.rglob("*.json"))) == len(before) == 3
    _, folder = ran(evaluate, tmp_path, *words)
    table = pd.read_parquet(folder / "results.parquet")
    assert "this table was interrupted" in caplog.text
    chosen, kept_ms = table[table.way == "chosen"].iloc[0], before[1].rounds_RS
    assert chosen["runs"] == len(kept_ms) == 2
    assert chosen["tpot_ms_least_run"] <= chosen["tpot_ms"] <= chosen["tpot_ms_most_run"]
    assert len(before) < len(measured)
    assert not list(cells.rglob("*.json"))  # asked for again, it is measured anew


def test_what_was_measured_comes_back_as_it_was_and_only_for_the_same_device(tmp_path):
    bench = Bench(
        configured(tmp_path, "stage=evaluate", "simulator.clock=device", "simulator.rounds=2"),
        Store(tmp_path / "store", makers=configured(tmp_path).makers),
    )
    cell, found = (
        cell_of(bench, "one", "lru", "none", 0.5, 1),
        bench.timed(cell_of(bench, "one", "lru", "none", 0.5, 1)),
    )

    class Never:
        machine, identity = "here", bench.clock.identity

        def timed(self, *_: Any) -> Any:
            raise AssertionError("measured again")

    again = Resumed(Never(), bench.store.root).timed(cell, bench.work)
    for name in ("time_S", "outcome_A", "rounds_RS"):
        one, other = getattr(again, name), getattr(found, name)
        assert one.dtype == other.dtype and (one == other).all(), name
    assert (again.counts, again.resident) == (found.counts, found.resident)
    Never.identity = ("another GPU", *bench.clock.identity[1:])
    with pytest.raises(AssertionError, match="measured again"):
        Resumed(Never(), bench.store.root).timed(cell, bench.work)


def test_cells_that_the_engine_refuses_before_anything_is_allocated(tmp_path):
    bench = Bench(
        configured(tmp_path, "stage=evaluate"),
        Store(tmp_path / "store", makers=configured(tmp_path).makers),
    )
    cell = cell_of(bench, "one", "lru", "none", 0.5, 1)
    need_runnable(cell)
    uneven = cell.machine._replace(bytes_L=np.array([1, 2, 3, 4]))
    with pytest.raises(ConfigError, match="of different sizes by layer"):
        need_runnable(type(cell)(cell.names, cell.policy, cell.budget, uneven))


def test_late_experts_give_the_numbers_of_experts_that_are_there():
    """Launched in three parts, in any order, as when all are there at once."""
    layout, draw = ExpertLayout(32, 16, torch.float32), torch.Generator().manual_seed(0)
    pool_SN = layout.random(6, 0)
    x_TD = torch.randn(5, 32, generator=draw)
    ids_TK = torch.stack([torch.randperm(6, generator=draw)[:3] for _ in range(5)]).int()
    weights_TK = torch.rand(5, 3, generator=draw)
    slots = {expert: 5 - expert for expert in range(6)}
    slot_E = torch.tensor([slots[e] for e in range(6)], dtype=torch.int32)
    whole = moe_torch(x_TD, ids_TK, weights_TK, pool_SN, layout, slot_E)
    body = KernelBody(pool_SN, layout, 6)
    body.take(x_TD, ids_TK, weights_TK, 6)
    for part in ([3, 4], [0], [5, 1, 2]):
        body.launch(0, dict.fromkeys(part, 1), slots)
    body.combine(0)
    assert torch.equal(body.out_TD, whole)
    for fuses in (False, True):
        body = KernelBody(pool_SN, layout, 6, fuses=fuses)
        body.take(x_TD, ids_TK, weights_TK, 6)
        body.launch(0, dict.fromkeys(range(6), 1), slots)
        body.combine(0)
        assert torch.equal(body.out_TD, whole)


class Nothing:
    def before(self, *_: Any) -> None: ...
    def launch(self, *_: Any) -> None: ...
    def combine(self, *_: Any) -> None: ...


def test_the_copy_thread_copies_in_order_and_says_when_it_fails():
    pool_SN, blocks = torch.zeros(2, 4), torch.arange(12.0).reshape(3, 4)
    backend = CpuBackend(pool_SN, lambda entry: blocks[entry[1]], Nothing())
    backend.copy((0, 1), 0)
    first = backend.record(COPY)
    backend.copy((0, 2), 1)
    backend.wait([backend.record(COPY)])
    assert backend.is_done(first) and torch.equal(pool_SN, blocks[1:])
    assert backend.is_done(backend.record(COMPUTE))
    backend.copy((0, 7), 1)
    with pytest.raises(EngineError, match="a copy failed: layer 0 expert 7 into slot 1"):
        backend.after(COMPUTE, backend.record(COPY), "stall_ns")
    backend.close()


class Moment:
    def __init__(self, at_ms: float) -> None:
        self.at_ms, self.has_passed = at_ms, False

    def query(self) -> bool:
        return self.has_passed

    def elapsed_time(self, end: Moment) -> float:
        return end.at_ms - self.at_ms


def test_times_on_a_gpu_are_added_up_as_they_pass():
    """In whatever order the two streams get there; what has passed is held no more."""
    spans, ends = Spans(), [Moment(3.5), Moment(4.0), Moment(9.0)]
    for name, end in zip(("link_ns", "stall_ns", "link_ns"), ends, strict=True):
        spans.add(name, Moment(1.0), end)
    assert sum(map(len, spans.under_way.values())) == 3 and not spans.ns
    ends[1].has_passed = True
    assert spans.settled() == {"stall_ns": 3_000_000}
    assert sum(map(len, spans.under_way.values())) == 2
    ends[0].has_passed = ends[2].has_passed = True
    assert spans.settled()["link_ns"] == 10_500_000 and not any(spans.under_way.values())


def test_sizes_of_a_card_become_a_layout():
    told = {"n_experts": 4, "top_k": 1, "layer_numbers": (0, 1), "hidden_size": 8}
    card = plain_card("one", **told, expert_bytes_L=(960, 960), expert_precision="bf16")
    layout = layout_of(card)
    assert (layout.hidden, layout.inner, layout.dtype) == (8, 20, torch.bfloat16)
    with pytest.raises(ConfigError, match="2 sizes of experts"):
        layout_of(plain_card("two", **told, expert_bytes_L=(960, 480), expert_precision="bf16"))


def test_the_device_clock_is_named_in_yaml(tmp_path):
    cfg = configured(tmp_path, "stage=evaluate")
    assert leaves.locate(cfg.clocks["device"]) is DeviceClock
    assert json.loads(json.dumps(dict(cfg.clocks))) == {
        "device": "prefetch.engine.clock.DeviceClock"
    }
