"""A real profile made here: a tiny model of transformers under the torch profiler, against the profiler's own table."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from analysis.device.diagnosis import Beside, Diagnosis, diagnose, read
from analysis.device.findings import NO_MOE, OK
from analysis.device.names import load_names
from analysis.device.profile_trace import OPERATION
from analysis.device.roofline import Peaks
from analysis.device.shapes import Known

transformers = pytest.importorskip("transformers")
NAMES = load_names()
TOKENS, LAYERS, HIDDEN, INNER, TOP_K = 48, 2, 64, 32, 2
HOST = Peaks("a host", 20e9, {"fp32": 1e12})


def recorded(model: torch.nn.Module, path: Path, *, trains: bool = False) -> dict[str, float]:
    """Own µs by operation, as the profiler itself adds them up."""
    ids = torch.arange(TOKENS).reshape(1, -1)
    with (
        torch.set_grad_enabled(trains),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_stack=True) as run,
    ):
        if trains:
            model(ids, labels=ids).loss.backward()
        else:
            model(ids)
    run.export_chrome_trace(str(path))
    own: Counter[str] = Counter()
    for row in run.key_averages():
        own[row.key] += row.self_cpu_time_total
    return dict(own)


def diagnosed(path: Path) -> Diagnosis:
    return diagnose(read(path, NAMES), Known(NAMES), Beside(HOST))


def tiny_moe() -> torch.nn.Module:
    shape = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
    }
    cfg = transformers.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_experts=8, num_experts_per_tok=TOP_K, **shape
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(cfg).eval()


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    path = tmp_path_factory.mktemp("cpu") / "moe.json.gz"
    return path, recorded(tiny_moe(), path)


def test_own_times_are_those_of_the_profilers_table(moe):
    path, table = moe
    found = read(path, NAMES)
    mine: Counter[str] = Counter()
    for name, took in zip(found.work.name_W, found.work.took_W, strict=True):
        mine[found.trace.names[name]] += took / 1e3
    assert len(mine) > 20 and set(mine) <= set(table)
    for name, took_us in mine.items():
        assert took_us == pytest.approx(table[name], abs=0.05)
    assert (found.trace.spans.kind == OPERATION).sum() == len(found.work.took_W)


def test_the_share_of_moe_is_what_the_table_gives_for_its_modules(moe):
    """The experts' products are in no other module: their time by the table is a part of ours, and exactly found."""
    path, table = moe
    found = diagnosed(path)
    assert found.status == OK and found.n_layers == LAYERS and found.times.unit.startswith("CPU")
    rows = found.kernels
    for name in ("aten::_grouped_mm", "aten::topk", "aten::silu"):
        (row,) = rows[rows.kernel == name].itertuples()
        assert row.is_moe and row.time_us == pytest.approx(table[name], abs=0.05)
    assert not rows[rows.kernel == "aten::rsqrt"].is_moe.any()  # of the norms
    operations_us = sum(took for name, took in table.items() if name.startswith("aten::"))
    assert found.times.kernel_ns / 1e3 == pytest.approx(operations_us, rel=0.01)
    share = rows[rows.is_moe].time_us.sum() / operations_us
    assert found.times.of_kernel_time == pytest.approx(share, rel=0.01)


def test_products_are_counted_once_from_the_sizes_they_were_called_with(moe):
    found = diagnosed(moe[0])
    products = {op.cost.flops for op in found.operations if op.role == "gemm" and op.is_modelled}
    rows = TOKENS * TOP_K
    assert {
        2.0 * rows * HIDDEN * 2 * INNER,
        2.0 * rows * INNER * HIDDEN,
        2.0 * TOKENS * HIDDEN * 8,
    } <= products


def test_a_dense_model_on_a_cpu_is_no_moe(tmp_path):
    shape = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    cfg = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, **shape)
    path = tmp_path / "dense.json"
    recorded(transformers.LlamaForCausalLM(cfg).eval(), path)
    found = diagnosed(path)
    assert found.status == NO_MOE and not found.hinted and found.times.moe_kernel_ns == 0
    assert json.loads(path.read_text())["traceEvents"]


def test_gradients_of_a_real_step_belong_to_their_layers(tmp_path):
    path = tmp_path / "train.json"
    recorded(tiny_moe(), path, trains=True)
    found, rows = read(path, NAMES), diagnosed(path).kernels
    assert np.unique(found.work.call_W[found.work.is_moe_W]).tolist() == list(range(LAYERS))
    of_moe = rows[rows.is_moe].kernel
    assert (
        of_moe.str.startswith("autograd::").any() and of_moe.str.contains("GroupedMmBackward").any()
    )
    others = rows[~rows.is_moe].kernel
    assert (
        others.str.contains("RsqrtBackward").any()
        and not of_moe.str.contains("RsqrtBackward").any()
    )
