"""A real profile made here: a tiny model of transformers under the torch profiler, against the profiler's own table."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Truth:
    """Of the profiler itself: own µs by operation, and of those under MoE blocks in its own tree of calls."""

    table: dict[str, float]
    own: Counter[str]
    moe: Counter[str]


def recorded(model: torch.nn.Module, path: Path, *, trains: bool = False) -> Truth:
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
    table: Counter[str] = Counter()
    for row in run.key_averages():
        table[row.key] += row.self_cpu_time_total
    own, moe = Counter[str](), Counter[str]()
    for root in run.profiler.kineto_results.experimental_event_tree():
        add_own(root, own, moe, in_moe=False)
    return Truth(dict(table), own, moe)


def add_own(node: Any, own: Counter[str], moe: Counter[str], *, in_moe: bool) -> None:
    in_moe = in_moe or node.name.startswith("nn.Module: OlmoeSparseMoeBlock")
    if is_operation(node):
        took_us = (node.duration_time_ns - sum(op.duration_time_ns for op in called(node))) / 1e3
        own[node.name] += took_us
        moe[node.name] += took_us * in_moe
    for child in node.children:
        add_own(child, own, moe, in_moe=in_moe)


def called(node: Any) -> Iterator[Any]:
    """The outermost operations below; Python between them is nobody's."""
    for child in node.children:
        if is_operation(child):
            yield child
        else:
            yield from called(child)


def is_operation(node: Any) -> bool:
    return bool(node.typed[0] == torch._C._profiler._EventType.TorchOp)


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
def moe(tmp_path_factory) -> tuple[Path, Truth]:
    path = tmp_path_factory.mktemp("cpu") / "moe.json.gz"
    return path, recorded(tiny_moe(), path)


def test_own_times_are_those_of_the_profilers_table(moe):
    path, truth = moe
    found = read(path, NAMES)
    mine: Counter[str] = Counter()
    for name, took in zip(found.work.name_W, found.work.took_W, strict=True):
        mine[found.trace.names[name]] += took / 1e3
    assert len(mine) > 20 and set(mine) == set(truth.own)
    for name, took_us in mine.items():
        assert took_us == pytest.approx(truth.table[name], abs=0.01)
    assert (found.trace.spans.kind == OPERATION).sum() == len(found.work.took_W)


def test_the_share_of_moe_is_that_of_the_profilers_own_tree_and_table(moe):
    """Who is under a MoE block the profiler says itself; how long each took, its table and its tree."""
    path, truth = moe
    found = diagnosed(path)
    assert found.status == OK and found.n_layers == LAYERS and found.times.is_cpu
    rows = found.kernels[found.kernels.is_moe].groupby("kernel").time_us.sum()
    expected = {name: took for name, took in truth.moe.items() if took > 0}
    assert {name: took for name, took in rows.items() if took > 0} == pytest.approx(expected)
    total = sum(truth.table[name] for name in truth.own)
    assert found.times.of_kernel_time == pytest.approx(sum(expected.values()) / total, rel=1e-9)
    assert 0 < found.times.of_kernel_time < 1  # how much depends on what else the machine does
    assert found.times.of_busy_time == pytest.approx(found.times.of_kernel_time)  # one thread


def test_products_are_counted_once_from_the_sizes_they_were_called_with(moe):
    found = diagnosed(moe[0])
    products = {(op.role, op.cost.flops) for op in found.operations if op.is_modelled}
    rows = TOKENS * TOP_K
    assert {
        ("gemm", 2.0 * rows * HIDDEN * 2 * INNER),
        ("gemm", 2.0 * rows * INNER * HIDDEN),
        ("router", 2.0 * TOKENS * HIDDEN * 8),
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
    found, told = read(path, NAMES), diagnosed(path)
    rows = told.kernels
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
    # forward, and the gradient of the inputs, which is a product of the same sizes
    up = next(
        op for op in told.operations if op.role == "gemm" and f"{2 * INNER}, {HIDDEN}]" in op.args
    )
    assert up.calls == 2 * LAYERS
