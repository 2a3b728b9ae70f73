"""Real profiles of vLLM on NVIDIA and AMD: the numbers of TraceLens (171dd747), and of the raw events."""

import csv
import json

import pytest
from profiler_traces import real, shipped_hardware

from analysis.device.diagnosis import Beside, Diagnosis, diagnose, read
from analysis.device.findings import ANOMALY, BOTTLENECK, MOE_UNMODELED, OK
from analysis.device.names import load_names
from analysis.device.roofline import Peaks, peaks_of
from analysis.device.rows import rates
from analysis.device.shapes import ASSUMED, Given, Known
from analysis.device.tracelens import read_table
from prefetch.models.cards import load_architecture

NAMES = load_names()
MI300X = Peaks(
    "MI300X", 5.3e12, {"bf16": 708e12, "fp8": 1273e12, "fp32": 163.4e12}
)  # as TraceLens has it
B200 = peaks_of(shipped_hardware("b200_pcie5"))
UNIT = [
    "moe_01_many_experts_few_tokens", "moe_02_few_experts_many_tokens", "moe_03_top1_sparse", "moe_04_top2_dense",
    "moe_05_large_capacity", "moe_06_tiny_batch_many_experts",
]  # fmt: skip


def diagnosed(name: str, given: Given, card: str | None, peaks: Peaks) -> Diagnosis:
    profile = read(real(name), NAMES)
    known = Known(
        NAMES,
        given,
        load_architecture(card) if card else None,
        profile.step_tokens,
        profile.trace.ranks,
    )
    return diagnose(profile, known, Beside(peaks))


def test_b200_equals_the_sums_of_its_raw_events():
    found = diagnosed("b200__eager_trace.json.gz", Given(), None, B200)
    truth = json.loads(real("b200_moe_rollup.json").read_text())
    assert found.status == MOE_UNMODELED and (found.n_layers, found.times.n_moe_kernels) == (
        36,
        252,
    )
    assert found.moe_ns / 1e3 == pytest.approx(truth["moe_us"], abs=0.1)
    assert found.times.kernel_ns / 1e3 == pytest.approx(truth["all_kernel_us"], abs=0.1)
    assert f"{found.times.of_kernel_time:.1%}" == "56.0%"
    assert found.times.moe_busy_ns / 1e3 == pytest.approx(6009.1, abs=0.1)  # as TraceLens prints it
    assert found.times.elapsed_ns / 1e3 == pytest.approx(84_487.2, abs=0.1)
    assert found.layer_us.time_us.tolist() == pytest.approx(truth["per_layer_us"], abs=0.1)
    moe = found.kernels[found.kernels.is_moe]
    assert len(moe) == len(truth["per_kernel"])
    for prefix, (count, took_us) in truth["per_kernel"].items():
        row = moe[moe.kernel.str.startswith(prefix)]
        assert row["count"].tolist() == [count]
        assert row.time_us.tolist() == pytest.approx([took_us], abs=0.1)


def test_b200_with_its_card_needs_to_know_how_experts_were_cut():
    unsaid = diagnosed("b200__eager_trace.json.gz", Given(), "gpt_oss_120b", B200)
    assert unsaid.status == MOE_UNMODELED
    assert "tensor_parallel=8 or diagnose.expert_parallel=8" in unsaid.operations[0].why_not
    found = diagnosed("b200__eager_trace.json.gz", Given(tensor_parallel=8), "gpt_oss_120b", B200)
    up = found.operations[0]
    assert found.status == OK and up.role == "up" and up.tile == 16
    assert (up.shape.tokens, up.shape.hidden, up.shape.inner, up.shape.top_k) == (888, 3072, 360, 4)
    assert (up.shape.weight, up.shape.activation, up.judged.ran_in) == ("mxfp4", "fp8", "fp8")
    assert up.cost.flops == 2 * 888 * 4 * 3072 * 360 * 2
    assert any("model card, / 8 ranks" in text for text in up.shape.assumptions("up"))


def decode() -> Diagnosis:
    """Under the peer's assumptions: hidden and inner size as padded, scales of weights left out."""
    return diagnosed(
        "vllm_decode_full.json.gz",
        Given(hidden=3072, inner=3072, scales=False),
        "gpt_oss_20b",
        MI300X,
    )


def test_decode_equals_the_rows_of_tracelens_and_has_the_efficiency_it_lacks():
    found = decode()
    with real("vllm_decode_full.MoE_unfused_fwd.csv").open() as file:
        rows = {row["name"].rsplit("_", 1)[-1]: row for row in csv.DictReader(file)}
    assert found.status == OK and found.n_layers == 24
    for role, low, high in (("down", 0.180, 0.184), ("up", 0.413, 0.415)):
        op, row = next(op for op in found.operations if op.role == role), rows[role]
        assert op.calls == int(row["name_count"])
        assert op.time_ns / 1e3 == pytest.approx(float(row["Kernel Time (µs)_sum"]), rel=1e-3)
        assert op.cost.flops / 1e9 == pytest.approx(float(row["GFLOPS_first"]), rel=1e-3)
        assert op.cost.n_bytes / 2**20 == pytest.approx(
            float(row["Data Moved (MB)_first"]), rel=1e-3
        )
        intensity = op.cost.flops / op.cost.n_bytes
        assert intensity == pytest.approx(float(row["FLOPS/Byte_first"]), rel=1e-3)
        # its mean is over calls, of each call's rate; ours are totals over total time, and so lower
        mean_per_ns = op.mean_rate_per_ns
        assert op.cost.flops * mean_per_ns / 1e3 == pytest.approx(
            float(row["TFLOPS/s_mean"]), rel=1e-3
        )
        assert op.cost.n_bytes * mean_per_ns / 1e3 == pytest.approx(
            float(row["TB/s_mean"]), rel=1e-3
        )
        assert rates(op)[1] < float(row["TB/s_mean"])
        # bf16 x mxfp4 runs in bf16: there is a peak, where TraceLens looks for fp4's and finds none
        assert op.judged.ran_in == "bf16" and op.judged.bound == "memory"
        assert low < op.efficiency < high
        assert "inner=3072 (command line)" in op.shape.assumptions(role)


def test_decode_kernels_of_the_graph_are_found_by_name():
    found = decode()
    assert found.moe_ns / 1e3 == pytest.approx(7789.1, abs=0.1) and found.times.n_moe_kernels == 192
    assert f"{found.times.of_kernel_time:.1%}" == "73.0%"
    assert {op.shape.sources["tokens"] for op in found.operations} == {"step annotation"}
    assert {f.role for f in found.findings if f.kind == BOTTLENECK} == {
        "down",
        "routing",
    }  # up has 41 %


def test_the_table_of_tracelens_alone_gives_the_same_efficiencies():
    path = real("vllm_decode_full.MoE_unfused_fwd.csv")
    table = read_table(path, Known(NAMES), MI300X)
    for op in table:
        other = next(o for o in decode().operations if o.role == op.role)
        assert op.efficiency == pytest.approx(other.efficiency, rel=1e-4)
        assert op.shape.sources["inner"] == "assumed by TraceLens: the hidden size"


@pytest.mark.parametrize("name", UNIT)
def test_unit_traces_have_one_operation_by_formula_and_no_impossible_gain(name):
    truth = json.loads(real("unit/moe_wrapped_ground_truth.json").read_text())[name][0]
    found = diagnosed(f"unit/{name}.json", Given(), None, MI300X)
    (op,) = found.operations
    assert found.status == OK and op.calls == 1
    assert op.cost.flops / 1e9 == pytest.approx(float(truth["GFLOPS"]), rel=1e-6)
    assert op.cost.n_bytes / 2**20 == pytest.approx(float(truth["Data Moved (MB)"]), rel=1e-6)
    assert op.judged.roofline_ns / 1e3 == pytest.approx(
        float(truth["Roofline Time (µs)_first"]), rel=1e-6
    )
    assert 100 * op.judged.efficiency == pytest.approx(float(truth["Pct Roofline_mean"]), rel=1e-6)
    shape = op.shape
    told = {"num_tokens": shape.tokens, "hidden_dim": shape.hidden, "inter_dim": shape.inner,
            "num_experts": shape.experts, "topk": shape.top_k, "gated": shape.gated}  # fmt: skip
    for key, value in told.items():
        assert f"'{key}': {value}" in truth["perf_params"]
    assert ASSUMED not in {
        shape.sources[name] for name in ("tokens", "hidden", "inner", "experts", "top_k", "gated")
    }
    impossible = float(truth["Pct Roofline_mean"]) > 100
    assert [f.kind for f in found.findings if f.kind == ANOMALY] == [ANOMALY] * impossible
    if impossible:
        assert op.efficiency is None and op.anomaly
        assert all(f.recoverable_ns is None for f in found.findings)
        assert all(one.impact_us is None for one in found.recommendations)
